// Convolution + BatchNorm (training) + clamp, forward and backward, for AVX-512 CPUs: the kernels
// behind kd/fast/blocks.py.
//
// The plain step is bound by memory traffic. Around each convolution, BatchNorm and ReLU6 read and
// write the whole activation some ten times, forward and back. Here a layer i is one call each way. It
// keeps only y_i, the output of the convolution, and for each channel the line z = scale*y + shift
// that BatchNorm amounts to once its statistics are known. a_i = clamp(z) is never stored: whoever
// needs it computes it again while y_i passes through the cache.
//
//   forward,  layer i:  read y_{i-1}, write y_i, sum the statistics of y_i while it is in the cache
//   backward, layer i:  read g_i, y_i and y_{i-1}, write g_{i-1} = dL/dz_{i-1}, and sum what the
//                       backward of BatchNorm needs
//
// Backward of BatchNorm (Ioffe & Szegedy 2015, section 3), with g = dL/dz, xh = (y - mean)*invstd and
// m values in a channel:
//   dbeta = sum g,   dgamma = sum g*xh
//   dL/dy = gamma*invstd*(g - dbeta/m - xh*dgamma/m) = p*g + q*y + r
// So it is two multiply-adds while loading, with p, q and r fixed for a channel once the sums are known.
//
// The storage type T is float or bfloat16. Arithmetic, statistics and weights are float32; sums over
// rows are double. Results are deterministic: thread t always takes the same rows, and partial sums are
// added in the order of t.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>
#include <immintrin.h>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

namespace {
using at::Tensor;
using BF = at::BFloat16;
using V = __m512;                                   // 16 channels
using Mask = __mmask16;
using OptTensor = const std::optional<Tensor>&;

constexpr long up(long n, long to) { return (n + to - 1) / to * to; }

// A block of channels: all 16 (All), or the last few (Mask). Which of the two is a type, known when
// compiling, because masked accesses are slow.
struct All {};
template <class F> inline __attribute__((always_inline)) void blocks(long C, const F& f) {
  long c = 0;
  for (; c + 16 <= C; c += 16) f(c, All());
  if (c < C) f(c, Mask((1 << (C - c)) - 1));
}
inline V widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
inline __m256i narrow(V v) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(v);
#else                                               // round to nearest even by hand
  __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  u = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(u, 16));
#endif
}
inline V load(const float* p, All = {}) { return _mm512_loadu_ps(p); }
inline V load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
inline V load(const BF* p, All = {}) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
inline V load(const BF* p, Mask m) { return widen(_mm256_maskz_loadu_epi16(m, p)); }
inline void store(float* p, V v, All = {}) { _mm512_storeu_ps(p, v); }
inline void store(float* p, V v, Mask m) { _mm512_mask_storeu_ps(p, m, v); }
inline void store(BF* p, V v, All = {}) { _mm256_storeu_si256((__m256i*)p, narrow(v)); }
inline void store(BF* p, V v, Mask m) { _mm256_mask_storeu_epi16(p, m, narrow(v)); }
template <class T> inline V rounded(V v) {           // what a later load will read
  if constexpr (sizeof(T) == 4) return v;
  return widen(narrow(v));
}
inline void accumulate(double* p, V v) {            // p[0..16) += v
  _mm512_storeu_pd(p, _mm512_add_pd(_mm512_loadu_pd(p), _mm512_cvtps_pd(_mm512_castps512_ps256(v))));
  _mm512_storeu_pd(p + 8, _mm512_add_pd(_mm512_loadu_pd(p + 8), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1))));
}

// ---- matrix product --------------------------------------------------------------------------------------------
// C (m, 16*nv) = or += A (m, kw) B (kw, 16*nv), in 32-bit words. A word is one float, or two bfloat16
// neighbours along the summed dimension, which is what vdpbf16ps multiplies. Operands lie in scratch
// and are padded, so there are no column tails.
template <class T> constexpr long per = sizeof(float) / sizeof(T);

template <class T> inline V madd(V a, V b, V c) {
  if constexpr (per<T> == 1) return _mm512_fmadd_ps(a, b, c);
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#else
  auto low = [](V v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 16)); };
  auto high = [](V v) { return _mm512_and_ps(v, _mm512_castsi512_ps(_mm512_set1_epi32(0xffff0000))); };
  return _mm512_fmadd_ps(high(a), high(b), _mm512_fmadd_ps(low(a), low(b), c));
#endif
}

template <class T, int MR, int NV>                  // MR*NV accumulators stay in registers
void strip(long m, long kw, const float* A, long row, long col, const float* B, long ldb, float* C, long ldc,
           bool add) {
  for (; m >= MR; m -= MR, A += MR * row, C += MR * ldc) {
    V acc[MR][NV];
    for (int r = 0; r < MR; r++)
      for (int v = 0; v < NV; v++) acc[r][v] = add ? load(C + r * ldc + 16 * v) : _mm512_setzero_ps();
    const float *a = A, *b = B;
    for (long k = 0; k < kw; k++, a += col, b += ldb)
#pragma GCC unroll 16
      for (int r = 0; r < MR; r++) {
        V ar = _mm512_set1_ps(a[r * row]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) acc[r][v] = madd<T>(ar, load(b + 16 * v), acc[r][v]);
      }
    for (int r = 0; r < MR; r++)
      for (int v = 0; v < NV; v++) store(C + r * ldc + 16 * v, acc[r][v]);
  }
  if constexpr (MR > 1) if (m) strip<T, MR / 2, NV>(m, kw, A, row, col, B, ldb, C, ldc, add);
}

template <class T>
void gemm(long m, long nv, long kw, const float* A, long row, long col, const float* B, long ldb, float* C, long ldc,
          bool add) {
  for (long w; nv > 0; nv -= w, B += 16 * w, C += 16 * w) {
    w = nv == 5 || nv == 6 ? 3 : std::min(nv, 4L);  // no lone last column: 5 = 3 + 2
    (w == 4 ? strip<T, 6, 4> : w == 3 ? strip<T, 8, 3> : w == 2 ? strip<T, 12, 2> : strip<T, 16, 1>)(
        m, kw, A, row, col, B, ldb, C, ldc, add);
  }
}

// Two consecutive rows of 16 channels into scratch. `rows` is the (row, channel) matrix to sum over
// channels, `pairs` is the one to sum over rows. In float they are the same, and only `rows` is written.
template <class T> inline void put(float* rows, float* pairs, long ld, long r, long c, V v0, V v1) {
  if constexpr (per<T> == 1) {
    store(rows + r * ld + c, v0), store(rows + (r + 1) * ld + c, v1);
  } else {
    if (rows) store((BF*)rows + r * ld + c, v0), store((BF*)rows + (r + 1) * ld + c, v1);
    if (pairs) _mm512_storeu_si512(pairs + r / 2 * ld + c, _mm512_or_si512(
        _mm512_cvtepu16_epi32(narrow(v0)), _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(v1)), 16)));
  }
}

// m rows of value(row, channel, lanes), in the order of memory. A walk down a block of 16 channels would
// keep the coefficients in registers, but it jumps from row to row, which no prefetcher follows: it takes
// twice as long.
template <class T, class F> inline void put_all(const F value, float* rows, float* pairs, long ld, long C, long m) {
  const V none = _mm512_setzero_ps();
  for (long r = 0; r < m; r += 2)
    blocks(C, [&](long c, auto k) {
      put<T>(rows, pairs, ld, r, c, value(r, c, k), r + 1 < m ? value(r + 1, c, k) : none);
    });
}

// The weight as gemm's B: P[r / per][c] = src[r*sr + c*sc], and zero beyond (R, C).
template <class T> std::vector<float> pack(const float* src, long R, long C, long sr, long sc) {
  const long ld = up(C, 16), R2 = up(R, 2);
  std::vector<float> P(R2 * ld);
  at::parallel_for(0, ld / 16, 1, [&](long b, long e) {
    for (long c = b * 16; c < e * 16; c += 16)
      for (long r = 0; r < R2; r += 2) {
        float v[2][16] = {};
        for (long i = 0; i < 2 && r + i < R; i++)
          for (long j = 0; j < 16 && c + j < C; j++) v[i][j] = src[(r + i) * sr + (c + j) * sc];
        put<T>(per<T> == 1 ? P.data() : nullptr, P.data(), ld, r, c, load(v[0]), load(v[1]));
      }
  });
  return P;
}

// ---- BatchNorm -------------------------------------------------------------------------------------------------
// The norm and clamp that turn y into a. Its numbers are the rows of one (4, C) tensor.
struct Norm {
  const float *mean, *invstd, *scale, *shift;
  float lo, hi;
  Norm(const Tensor& t, double lo, double hi) : mean(t.const_data_ptr<float>()), invstd(mean + t.size(1)),
      scale(invstd + t.size(1)), shift(scale + t.size(1)), lo(lo), hi(hi) {}
};
template <class T> struct Normed {                  // rows of a = clamp(scale*y + shift)
  const T* y; long C; Norm n;
  template <class M> V z(V y, long c, M m) const {
    return _mm512_fmadd_ps(y, load(n.scale + c, m), load(n.shift + c, m));
  }
  V clamp(V z) const {                              // in this order of operands NaN stays NaN
    return _mm512_min_ps(_mm512_set1_ps(n.hi), _mm512_max_ps(_mm512_set1_ps(n.lo), z));
  }
  Mask inside(V z) const {
    return _mm512_cmp_ps_mask(z, _mm512_set1_ps(n.lo), _CMP_GT_OQ) &
           _mm512_cmp_ps_mask(z, _mm512_set1_ps(n.hi), _CMP_LT_OQ);
  }
  template <class M> V operator()(long r, long c, M m) const { return clamp(z(load(y + r * C + c, m), c, m)); }
  Normed from(long row) const { return {y + row * C, C, n}; }
};
template <class T> struct Sloped {                  // rows of dL/dy = p*g + q*y + r
  const T *g, *y; long C; const float* coef;
  template <class M> V operator()(long i, long c, M m) const {
    return _mm512_fmadd_ps(load(g + i * C + c, m), load(coef + c, m),
                           _mm512_fmadd_ps(load(y + i * C + c, m), load(coef + C + c, m), load(coef + 2 * C + c, m)));
  }
  Sloped from(long row) const { return {g + row * C, y + row * C, C, coef}; }
};

// Two sums for each thread and channel. Statistics are taken about the thread's first row: digits would
// cancel if they were taken about 0.
struct Sums {
  long C, Cp, n;
  std::vector<double> s;
  std::vector<float> about;
  std::vector<long> count;
  Sums(long C, long threads) : C(C), Cp(up(C, 16)), n(threads), s(n * 2 * Cp), about(n * Cp), count(n) {}
  const double* first(long t) const { return &s[t * 2 * Cp]; }
  const double* second(long t) const { return &s[(t * 2 + 1) * Cp]; }

  V center(long t, long c, V first) {               // the thread's first row, as soon as there is one
    if (!count[t]) store(&about[t * Cp + c], first);
    return load(&about[t * Cp + c]);
  }
  void add(long t, long c, V s1, V s2) {
    accumulate(&s[t * 2 * Cp + c], s1), accumulate(&s[(t * 2 + 1) * Cp + c], s2);
  }

  // Merges the threads' means and squared deviations (Chan et al. 1979), moves the running statistics as
  // nn.BatchNorm2d does (unbiased variance), and gives the Norm's (4, C) tensor.
  Tensor norm(const Tensor& gamma, const Tensor& beta, Tensor running_mean, Tensor running_var, double momentum,
              double eps) {
    Tensor out = at::empty({4, C}, gamma.options());
    float *o = out.data_ptr<float>(), *rm = running_mean.data_ptr<float>(), *rv = running_var.data_ptr<float>();
    const float *ga = gamma.const_data_ptr<float>(), *be = beta.const_data_ptr<float>();
    const long rows = std::accumulate(count.begin(), count.end(), 0L);
    TORCH_CHECK_VALUE(rows > 1, "Expected more than 1 value per channel when training");
    for (long c = 0; c < C; c++) {
      double total = 0, mean = 0, m2 = 0;
      for (long t = 0; t < n; t++) if (count[t]) {
        double k = count[t], d = first(t)[c] / k, delta = about[t * Cp + c] + d - mean;
        m2 += second(t)[c] - k * d * d + delta * delta * total * k / (total + k);
        total += k, mean += delta * k / total;
      }
      double invstd = 1 / std::sqrt(m2 / total + eps), scale = ga[c] * invstd;
      o[c] = mean, o[C + c] = invstd, o[2 * C + c] = scale, o[3 * C + c] = be[c] - mean * scale;
      rm[c] = (1 - momentum) * rm[c] + momentum * mean;
      rv[c] = (1 - momentum) * rv[c] + momentum * m2 / (total - 1);
    }
    return out;
  }

  // From sum g and sum g*(y - mean) over `rows`: p, q and r of dL/dy, dgamma and dbeta, as one
  // (5, C) tensor.
  Tensor slope(const Norm& norm, double rows) {
    Tensor out = at::empty({5, C}, at::kFloat);
    float* o = out.data_ptr<float>();
    for (long c = 0; c < C; c++) {
      double dbeta = 0, dgamma = 0, is = norm.invstd[c], p = norm.scale[c];
      for (long t = 0; t < n; t++) dbeta += first(t)[c], dgamma += second(t)[c] * is;
      double q = -p * is * dgamma / rows;
      o[c] = p, o[C + c] = q, o[2 * C + c] = -p * dbeta / rows - q * norm.mean[c];
      o[3 * C + c] = dgamma, o[4 * C + c] = dbeta;
    }
    return out;
  }
};

template <class F> void split(long rows, const F& f) {     // f(t, first, last): fixed shares, one a thread
  const long n = at::get_num_threads();
  at::parallel_for(0, n, 1, [&](long b, long e) {
    for (long t = b; t < e; t++) f(t, rows * t / n, rows * (t + 1) / n);
  });
}

// ---- 1x1 convolution, and the first one over the image, as matrix products over (N*H*W, C) -------------------------
struct Patches {                                    // row (n, oh, ow), column (channel, kh, kw) as in the weight
  const float* x;
  long H, W, OH, OW, C, stride, pad, sn, sh, sw;
  std::vector<int> offset, kh, kw;                  // of each column
  Patches(const Tensor& image, long k, long stride) : x(image.const_data_ptr<float>()), H(image.size(2)),
      W(image.size(3)), C(image.size(1) * k * k), stride(stride), pad(k / 2), sn(image.stride(0)),
      sh(image.stride(2)), sw(image.stride(3)), offset(up(C, 16)), kh(up(C, 16)), kw(up(C, 16)) {
    OH = (H - 1) / stride + 1, OW = (W - 1) / stride + 1;      // k is odd, padding k / 2
    for (long c = 0; c < C; c++)
      kh[c] = c / k % k, kw[c] = c % k, offset[c] = c / (k * k) * image.stride(1) + kh[c] * sh + kw[c] * sw;
  }
  struct From {
    const Patches& p; long first;
    template <class M> V operator()(long i, long c, M) const {
      const Mask m = p.C - c < 16 ? (1 << (p.C - c)) - 1 : 0xffff;
      const long r = first + i, h = r / p.OW % p.OH * p.stride - p.pad, w = r % p.OW * p.stride - p.pad;
      auto in = [](const int* k, long at, long size) {         // 0 <= at + k < size
        return _mm512_cmplt_epu32_mask(_mm512_add_epi32(_mm512_loadu_si512(k), _mm512_set1_epi32(at)),
                                       _mm512_set1_epi32(size));
      };
      return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), m & in(&p.kh[c], h, p.H) & in(&p.kw[c], w, p.W),
                                      _mm512_loadu_si512(&p.offset[c]),
                                      p.x + r / p.OW / p.OH * p.sn + h * p.sh + w * p.sw, 4);
    }
  };
  From from(long row) const { return {*this, row}; }
};

inline long chunk_rows(long words_a_row) { return std::max(48L, 65536 / words_a_row / 48 * 48); }  // fits in L2

// m rows of scratch to y, and their statistics.
template <class T> void finish(const float* C, long ldc, T* y, long m, long N, Sums& sums, long t) {
  for (long c = 0; c < N; c += 16) {
    const V center = sums.center(t, c, rounded<T>(load(C + c)));
    V s1 = _mm512_setzero_ps(), s2 = s1;
    for (long r = 0; r < m; r++) {
      const V d = _mm512_sub_ps(rounded<T>(load(C + r * ldc + c)), center);
      s1 = _mm512_add_ps(s1, d), s2 = _mm512_fmadd_ps(d, d, s2);
    }
    sums.add(t, c, s1, s2);
  }
  sums.count[t] += m;
  for (long r = 0; r < m; r++)
    blocks(N, [&](long c, auto k) { store(y + r * N + c, load(C + r * ldc + c), k); });
}

template <class T, class F>
void dense_forward(const F& input, const float* W, T* y, Sums& sums, long M, long K, long N) {
  const long Kp = up(K, 16), Np = up(N, 16), chunk = chunk_rows(K + N);
  const std::vector<float> P = pack<T>(W, K, N, 1, K);
  split(M, [&](long t, long begin, long end) {
    std::vector<float> A(chunk * Kp / per<T>), C(chunk * Np);
    for (long r0 = begin; r0 < end; r0 += chunk) {
      const long m = std::min(chunk, end - r0);
      put_all<T>(input.from(r0), A.data(), nullptr, Kp, K, m);
      gemm<T>(m, Np / 16, (K + per<T> - 1) / per<T>, A.data(), Kp / per<T>, 1, P.data(), Np, C.data(), Np, false);
      finish(C.data(), Np, y + r0 * N, m, N, sums, t);
    }
  });
}

// g = dL/dz from dL/da = da(row, channel, lanes): zero where the clamp holds. Also the two sums of
// BatchNorm's backward. s is scratch.
template <class T, class F>
void through_clamp(const F da, const Normed<T> a, const T* skip, T* g, long m, std::vector<float>& s, Sums& sums,
                   long t) {
  const long Cp = up(a.C, 16);
  s.assign(2 * Cp, 0);
  float *s1 = s.data(), *s2 = s1 + Cp;
  for (long r = 0; r < m; r++)
    blocks(a.C, [=](long c, auto k) {
      const long at = r * a.C + c;
      const V y = load(a.y + at, k), v = _mm512_maskz_mov_ps(a.inside(a.z(y, c, k)), da(r, c, k));
      if (g) store(g + at, skip ? _mm512_add_ps(v, load(skip + at, k)) : v, k);
      store(s1 + c, _mm512_add_ps(load(s1 + c), v));
      store(s2 + c, _mm512_fmadd_ps(v, _mm512_sub_ps(y, load(a.n.mean + c, k)), load(s2 + c)));
    });
  for (long c = 0; c < Cp; c += 16) sums.add(t, c, load(s1 + c), load(s2 + c));
}

// dL/dy from g and y, dW (N, K) = dL/dy^T a, and g_in = dL/dz of the input. For the image g_in is null.
template <class T, class F>
void dense_backward(const F& input, const Normed<T>& a, const Sloped<T>& dy, const float* W, const T* skip, T* g_in,
                    float* dW, Sums& sums, long M, long K, long N) {
  const long Kp = up(K, 16), Np = up(N, 16), chunk = chunk_rows(2 * K + N), n = at::get_num_threads();
  const std::vector<float> P = g_in ? pack<T>(W, N, K, K, 1) : std::vector<float>();
  std::vector<float> dWs(n * N * Kp);
  split(M, [&](long t, long begin, long end) {
    std::vector<float> G(chunk * Np), G2(per<T> == 2 ? chunk * Np / 2 : 0), A(chunk * Kp / per<T>), X(chunk * Kp);
    std::vector<float> s;
    float* pairs = per<T> == 2 ? G2.data() : G.data();
    const auto da = [x = X.data(), Kp](long r, long c, auto) { return load(x + r * Kp + c); };
    for (long r0 = begin; r0 < end; r0 += chunk) {
      const long m = std::min(chunk, end - r0);
      put_all<T>(dy.from(r0), G.data(), pairs, Np, N, m);
      put_all<T>(input.from(r0), per<T> == 1 ? A.data() : nullptr, A.data(), Kp, K, m);
      gemm<T>(N, Kp / 16, (m + per<T> - 1) / per<T>, pairs, 1, Np, A.data(), Kp, &dWs[t * N * Kp], Kp, true);
      if (!g_in) continue;
      gemm<T>(m, Kp / 16, (N + per<T> - 1) / per<T>, G.data(), Np / per<T>, 1, P.data(), Kp, X.data(), Kp, false);
      through_clamp(da, a.from(r0), skip ? skip + r0 * K : nullptr, g_in + r0 * K, m, s, sums, t);
    }
  });
  at::parallel_for(0, N, 64, [&](long b, long e) {
    for (long i = b; i < e; i++)
      for (long k = 0; k < K; k++) {
        float v = 0;
        for (long t = 0; t < n; t++) v += dWs[(t * N + i) * Kp + k];
        dW[i * K + k] = v;
      }
  });
}

// ---- depthwise 3x3 convolution, padding 1, stride 1 or 2 ---------------------------------------------------------
// Rows live in rings of three, in float, as [channel / 16][column][16]: the nine taps of a pixel are
// neighbours. A ring holds the image's row `row` at slot row % 3. fill(row, buffer) makes a row when it
// is first needed. Rows outside the image are zero.
struct Ring {
  long size, held[3] = {-1, -1, -1};
  std::vector<float> buffer;
  explicit Ring(long size) : size(size), buffer(4 * size) {}
  template <class F> const float* get(long image, long row, long rows, const F& fill) {
    if (row < 0 || row >= rows) return &buffer[3 * size];
    const long id = image * rows + row, slot = row % 3;
    if (held[slot] != id) fill(id, &buffer[slot * size]), held[slot] = id;
    return &buffer[slot * size];
  }
};

inline std::vector<float> taps(const float* W, long C) {   // (C, 9) -> [C / 16][9][16], padded with zeros
  std::vector<float> out(up(C, 16) * 9);
  for (long c = 0; c < C; c++) for (long k = 0; k < 9; k++) out[c / 16 * 144 + k * 16 + c % 16] = W[c * 9 + k];
  return out;
}

// A row from memory into scratch: `step` columns apart, after the column of zeros at its left.
template <class F> inline void spread(const F value, float* to, long pitch, long columns, long step, long C) {
  for (long i = 0; i < columns; i++)
    blocks(C, [=](long c, auto k) { store(to + c / 16 * pitch + 16 * (i * step + 1), value(i, c, k)); });
}

template <class T>                                  // 16 channels of one output row, and its statistics
void depthwise_out(const float* a, const float* b, const float* c, const float* w, float* y, long OW, long s, long ch,
                   Sums& sums, long t) {
  V wk[9];
#pragma GCC unroll 9
  for (int k = 0; k < 9; k++) wk[k] = load(w + 16 * k);
  auto pixel = [=](long i) {
    V v = _mm512_mul_ps(wk[0], load(a + 16 * i * s));
#pragma GCC unroll 9
    for (int k = 1; k < 9; k++)
      v = _mm512_fmadd_ps(wk[k], load((k < 3 ? a : k < 6 ? b : c) + 16 * (i * s + k % 3)), v);
    return rounded<T>(v);
  };
  const V center = sums.center(t, ch, pixel(0));
  V s1 = _mm512_setzero_ps(), s2 = s1;
  for (long i = 0; i < OW; i++) {
    const V v = pixel(i), d = _mm512_sub_ps(v, center);
    store(y + 16 * (i + 1), v);
    s1 = _mm512_add_ps(s1, d), s2 = _mm512_fmadd_ps(d, d, s2);
  }
  sums.add(t, ch, s1, s2);
}

template <class T>
void depthwise_forward(const Normed<T>& input, const float* W, T* y, Sums& sums, long N, long H, long WI, long s) {
  const long C = input.C, OH = (H - 1) / s + 1, OW = (WI - 1) / s + 1, pitch = (WI + 2) * 16;
  const std::vector<float> w = taps(W, C);
  split(N * OH, [&](long t, long begin, long end) {
    Ring ring(up(C, 16) / 16 * pitch);
    std::vector<float> out(ring.size);
    auto fill = [&](long row, float* to) { spread(input.from(row * WI), to, pitch, WI, 1, C); };
    for (long o = begin; o < end; o++) {
      const float* in[3];
      for (long k = 0; k < 3; k++) in[k] = ring.get(o / OH, o % OH * s - 1 + k, H, fill);
      for (long c = 0, at = 0; c < C; c += 16, at += pitch)
        depthwise_out<T>(in[0] + at, in[1] + at, in[2] + at, &w[c * 9], &out[at], OW, s, c, sums, t);
      for (long i = 0; i < OW; i++)
        blocks(C, [=, from = out.data()](long c, auto k) {
          store(y + (o * OW + i) * C + c, load(from + c / 16 * pitch + 16 * (i + 1)), k);
        });
      sums.count[t] += OW;
    }
  });
}

// 16 channels of one input row. Each value of dL/dy meets its weight for dL/da, and a for dW, in the
// same visit. Rows of dL/dy are spread to the input's columns, with zeros between them where the stride
// is 2. Bit kh of ROWS says whether there is a row for kh.
template <int ROWS>
void depthwise_in(const float* d0, const float* d1, const float* d2, const float* w, const float* a, float* da, float* dw,
                  long WI) {
  V wk[9], acc[9];
#pragma GCC unroll 9
  for (int k = 0; k < 9; k++) wk[k] = load(w + 16 * k), acc[k] = load(dw + 16 * k);
  for (long i = 0; i < WI; i++) {
    const V av = load(a + 16 * (i + 1));
    V v = _mm512_setzero_ps();
#pragma GCC unroll 9
    for (int k = 0; k < 9; k++) if (ROWS >> k / 3 & 1) {
      const V d = load((k < 3 ? d0 : k < 6 ? d1 : d2) + 16 * (i + 2 - k % 3));
      v = _mm512_fmadd_ps(d, wk[k], v), acc[k] = _mm512_fmadd_ps(d, av, acc[k]);
    }
    store(da + 16 * (i + 1), v);
  }
#pragma GCC unroll 9
  for (int k = 0; k < 9; k++) store(dw + 16 * k, acc[k]);
}

template <class T>
void depthwise_backward(const Normed<T>& input, const Sloped<T>& dy, const float* W, T* g_in, float* dW, Sums& sums,
                        long N, long H, long WI, long s) {
  const long C = input.C, Cp = up(C, 16), OH = (H - 1) / s + 1, OW = (WI - 1) / s + 1, pitch = (WI + 2) * 16;
  const long n = at::get_num_threads();
  const std::vector<float> w = taps(W, C);
  std::vector<float> dWs(n * Cp * 9);
  split(N * H, [&](long t, long begin, long end) {
    Ring ring(Cp / 16 * pitch);
    std::vector<float> a(ring.size), da(ring.size), s1;
    const auto value = [p = da.data(), pitch](long i, long c, auto) {
      return load(p + c / 16 * pitch + 16 * (i + 1));
    };
    auto fill = [&](long row, float* to) { spread(dy.from(row * OW), to, pitch, OW, s, C); };
    for (long r = begin; r < end; r++) {
      const float* d[3] = {};
      int some = 0;                                 // y row o meets input row r through kh = r + 1 - o*s
      for (long k = 0; k < 3; k++) if ((r % H + 1 - k) % s == 0)
        d[k] = ring.get(r / H, (r % H + 1 - k) / s, OH, fill), some |= 1 << k;
      spread(input.from(r * WI), a.data(), pitch, WI, 1, C);
      for (long c = 0, at = 0; c < C; c += 16, at += pitch)
        (some == 7 ? depthwise_in<7> : some == 2 ? depthwise_in<2> : depthwise_in<5>)(
            d[0] + at, d[1] + at, d[2] + at, &w[c * 9], &a[at], &da[at], &dWs[t * Cp * 9 + c * 9], WI);
      through_clamp(value, input.from(r * WI), (const T*)nullptr, g_in + r * WI * C, WI, s1, sums, t);
    }
  });
  for (long c = 0; c < C; c++) for (long k = 0; k < 9; k++) {
    float v = 0;
    for (long t = 0; t < n; t++) v += dWs[t * Cp * 9 + c / 16 * 144 + k * 16 + c % 16];
    dW[c * 9 + k] = v;
  }
}

// ---- operators -------------------------------------------------------------------------------------------------
template <class F> void dispatch(const Tensor& t, const F& f) { t.scalar_type() == at::kFloat ? f(float()) : f(BF()); }
template <class T> const T* in(const Tensor& t) { return t.const_data_ptr<T>(); }
template <class T> const T* in(OptTensor t) { return t ? t->const_data_ptr<T>() : nullptr; }
Tensor identity(long C) {
  return at::tensor({0.f, 1.f, 1.f, 0.f}).unsqueeze(1).expand({4, C}).contiguous();
}
constexpr double inf = std::numeric_limits<double>::infinity();
bool is_depthwise(const Tensor& w) { return w.size(1) == 1 && w.size(2) == 3; }

// x is y_{i-1}, and norm its norm; or x is the image, a float tensor of any layout. Returns y_i and its norm.
std::tuple<Tensor, Tensor> conv_forward(const Tensor& x, OptTensor norm, double lo, double hi, const Tensor& w,
    long stride, bool image, const Tensor& gamma, const Tensor& beta, const Tensor& rmean, const Tensor& rvar,
    double momentum, double eps, bool half) {
  const Tensor nt = norm ? *norm : identity(x.size(1));
  const Norm nm(nt, norm ? lo : -inf, norm ? hi : inf);
  const long N = x.size(0), C = x.size(1), O = w.size(0), k = w.size(2);
  Tensor y = at::empty({N, O, (x.size(2) - 1) / stride + 1, (x.size(3) - 1) / stride + 1},
                       x.options().dtype(half ? at::kBFloat16 : at::kFloat), at::MemoryFormat::ChannelsLast);
  Sums sums(O, at::get_num_threads());
  const Tensor plain = w.contiguous();              // a channels_last weight is not (O, C*k*k) in memory
  const float* W = in<float>(plain);
  const long M = y.numel() / O;
  dispatch(y, [&](auto v) {
    using T = decltype(v);
    T* out = y.data_ptr<T>();
    if (image) dense_forward<T>(Patches(x, k, stride), W, out, sums, M, C * k * k, O);
    else if (is_depthwise(w)) depthwise_forward<T>({in<T>(x), C, nm}, W, out, sums, N, x.size(2), x.size(3), stride);
    else dense_forward<T>(Normed<T>{in<T>(x), C, nm}, W, out, sums, M, C, O);
  });
  return {y, sums.norm(gamma, beta, rmean, rvar, momentum, eps)};
}

// Takes g = dL/dz_i, slope_i (5, C), y_i, then the layer's input as in conv_forward. skip, the gradient
// of the residual, is added to the result. Returns g_{i-1}, dW and slope_{i-1}.
std::tuple<Tensor, Tensor, Tensor> conv_backward(const Tensor& g, const Tensor& slope, const Tensor& y, const Tensor& x,
    OptTensor norm, double lo, double hi, const Tensor& w, long stride, bool image, OptTensor skip) {
  const Tensor nt = norm ? *norm : identity(x.size(1));
  const Norm nm(nt, norm ? lo : -inf, norm ? hi : inf);
  const long N = x.size(0), C = x.size(1), O = w.size(0), k = w.size(2), M = y.numel() / O;
  const Tensor plain = w.contiguous();
  Tensor g_in = image ? Tensor() : at::empty_like(x), dw = at::empty(w.sizes(), w.options());
  Sums sums(C, at::get_num_threads());
  const float *W = in<float>(plain), *coef = in<float>(slope);
  float* dW = dw.data_ptr<float>();
  dispatch(y, [&](auto v) {
    using T = decltype(v);
    const Sloped<T> dy{in<T>(g), in<T>(y), O, coef};
    const Normed<T> a{image ? nullptr : in<T>(x), C, nm};
    T* to = image ? nullptr : g_in.data_ptr<T>();
    if (image) dense_backward<T>(Patches(x, k, stride), a, dy, W, nullptr, to, dW, sums, M, C * k * k, O);
    else if (is_depthwise(w)) depthwise_backward<T>(a, dy, W, to, dW, sums, N, x.size(2), x.size(3), stride);
    else dense_backward<T>(a, a, dy, W, in<T>(skip), to, dW, sums, M, C, O);
  });
  return {g_in, dw, sums.slope(nm, x.numel() / C)};
}

// The end of a chain, where a must exist in memory: clamp(scale*y + shift), plus the block's input where
// there is a residual.
Tensor norm_forward(const Tensor& y, const Tensor& norm, double lo, double hi, OptTensor skip) {
  Tensor out = at::empty_like(y);
  const Norm nm(norm, lo, hi);
  const long C = y.size(1);
  dispatch(y, [&](auto v) {
    using T = decltype(v);
    split(y.numel() / C, [&](long, long begin, long end) {
      const Normed<T> a = Normed<T>{in<T>(y), C, nm}.from(begin);
      const T* sp = skip ? in<T>(skip) + begin * C : nullptr;
      T* op = out.data_ptr<T>() + begin * C;
      for (long r = 0; r < end - begin; r++)
        blocks(C, [=](long c, auto m) {
          const V v = a(r, c, m);
          store(op + r * C + c, sp ? _mm512_add_ps(v, load(sp + r * C + c, m)) : v, m);
        });
    });
  });
  return out;
}

// Backward of norm_forward: dL/dz from dL/da, and the slope. Where nothing is clamped, dL/dz is the
// tensor of dL/da itself.
std::tuple<Tensor, Tensor> norm_backward(const Tensor& da, const Tensor& y, const Tensor& norm, double lo, double hi) {
  const bool clamped = lo > -inf || hi < inf;
  Tensor g = clamped ? at::empty_like(y) : da;
  const Norm nm(norm, lo, hi);
  const long C = y.size(1), chunk = chunk_rows(2 * C);
  Sums sums(C, at::get_num_threads());
  dispatch(y, [&](auto v) {
    using T = decltype(v);
    const T *dp = in<T>(da), *yp = in<T>(y);
    T* gp = clamped ? g.data_ptr<T>() : nullptr;
    split(y.numel() / C, [&](long t, long begin, long end) {
      std::vector<float> s;
      for (long r0 = begin; r0 < end; r0 += chunk)
        through_clamp([p = dp + r0 * C, C](long r, long c, auto k) { return load(p + r * C + c, k); },
                      Normed<T>{yp + r0 * C, C, nm}, (const T*)nullptr, gp ? gp + r0 * C : nullptr,
                      std::min(chunk, end - r0), s, sums, t);
    });
  });
  return {g, sums.slope(nm, y.numel() / C)};
}
}  // namespace

TORCH_LIBRARY(kd_blocks, m) {
  m.def("conv_forward(Tensor x, Tensor? norm, float lo, float hi, Tensor w, int stride, bool image, Tensor gamma, "
        "Tensor beta, Tensor(a!) rmean, Tensor(b!) rvar, float momentum, float eps, bool half) -> (Tensor, Tensor)",
        &conv_forward);
  m.def("conv_backward(Tensor g, Tensor slope, Tensor y, Tensor x, Tensor? norm, float lo, float hi, Tensor w, "
        "int stride, bool image, Tensor? skip) -> (Tensor, Tensor, Tensor)", &conv_backward);
  m.def("norm_forward(Tensor y, Tensor norm, float lo, float hi, Tensor? skip) -> Tensor", &norm_forward);
  m.def("norm_backward(Tensor da, Tensor y, Tensor norm, float lo, float hi) -> (Tensor, Tensor)", &norm_backward);
}
