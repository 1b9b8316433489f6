// Convolution + BatchNorm (training) + clamp, forward and backward, on CPUs: the kernels behind kd/fast/blocks.py.
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
// An activation is a matrix (N*H*W, C), as channels_last lies in memory. It is float, or bfloat16 with
// AVX-512. Arithmetic, statistics and weights are float32; sums over rows are double. Only the factors of
// a matrix product are bfloat16 then, weights included. Results are deterministic: thread t always takes
// the same rows, and partial sums are added in the order of t.
//
// In this order: vectors of 16 channels; the matrix product; BatchNorm; the kernels of dense and of
// depthwise convolutions; the operators that Python calls.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

namespace {
using at::Tensor;
using BF = at::BFloat16;
using OptTensor = const std::optional<Tensor>&;

#define ALWAYS_INLINE __attribute__((always_inline))
#define INLINE inline ALWAYS_INLINE

constexpr long up(long n, long to) { return (n + to - 1) / to * to; }

// ---- vectors of 16 channels --------------------------------------------------------------------------
// All kernels work on 16 channels at a time. That is one register of AVX-512, two of AVX2 or four of NEON.
using Reg = at::vec::Vectorized<float>;
constexpr int W = Reg::size(), REGS = 16 / W;
struct V { Reg r[REGS]; };

template <class F> INLINE V each(const F& f) {      // a V of f(0), f(1), …
  V v;
#pragma GCC unroll 4
  for (int i = 0; i < REGS; i++) v.r[i] = f(i);
  return v;
}
INLINE V all(float x) { return each([&](int) ALWAYS_INLINE { return Reg(x); }); }
INLINE V operator+(V a, V b) { return each([&](int i) ALWAYS_INLINE { return a.r[i] + b.r[i]; }); }
INLINE V operator-(V a, V b) { return each([&](int i) ALWAYS_INLINE { return a.r[i] - b.r[i]; }); }
INLINE V madd(V a, V b, V c) {                      // a*b + c
  return each([&](int i) ALWAYS_INLINE { return at::vec::fmadd(a.r[i], b.r[i], c.r[i]); });
}
INLINE V clamp(V v, float lo, float hi) {           // NaN stays NaN
  return each([&](int i) ALWAYS_INLINE { return at::vec::clamp(v.r[i], Reg(lo), Reg(hi)); });
}
INLINE V where_inside(V z, float lo, float hi, V v) {   // v where lo < z < hi, else 0; 0 too where z is NaN
  return each([&](int i) ALWAYS_INLINE -> Reg {
#ifdef CPU_CAPABILITY_AVX512
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(z.r[i], Reg(lo), _CMP_GT_OQ) &
                               _mm512_cmp_ps_mask(z.r[i], Reg(hi), _CMP_LT_OQ), v.r[i]);
#else
    return v.r[i] & (z.r[i] > Reg(lo)) & (z.r[i] < Reg(hi));
#endif
  });
}

// Which of 16 channels there are, and how to store them: all 16, or the last n of an activation, or all 16
// past the caches. It is a type, known when compiling, because masked accesses are slow.
struct All {};
struct First { long n; };
struct Streamed : All {};

// A result that is much larger than the caches is gone from them before it is read. An ordinary store
// would even fetch each line from memory first. Measured on AVX2: the write takes half the time.
#ifdef CPU_CAPABILITY_AVX2
constexpr bool STREAMS = true;
INLINE void store(float* p, int i, Reg v, Streamed) { _mm256_stream_ps(p + i * W, v); }
inline void finish_streams() { _mm_sfence(); }      // before another thread reads
#else
constexpr bool STREAMS = false;
inline void finish_streams() {}
#endif
constexpr long STREAMED_BYTES = 4 << 20;

INLINE long count(All) { return 16; }
INLINE long count(First k) { return k.n; }
INLINE long count(First k, int i) { return std::clamp(k.n - i * W, 0L, long(W)); }   // in register i

// f(lanes) for the block that begins `left` channels before the end; f(c, lanes) for each block of C channels.
template <class F> INLINE void block(long left, bool streamed, const F& f) {
  if (left < 16) return f(First{left});
  if constexpr (STREAMS) if (streamed) return f(Streamed());
  f(All());
}
template <class F> INLINE void blocks(long C, const F& f) {
  long c = 0;
  for (; c + 16 <= C; c += 16) f(c, All());
  if (c < C) f(c, First{C - c});
}

INLINE Reg load(const float* p, int i, All) { return Reg::loadu(p + i * W); }
INLINE Reg load(const float* p, int i, First k) { return Reg::loadu(p + i * W, count(k, i)); }
INLINE void store(float* p, int i, Reg v, All) { v.store(p + i * W); }
INLINE void store(float* p, int i, Reg v, First k) { v.store(p + i * W, count(k, i)); }

#ifdef CPU_CAPABILITY_AVX512                        // bfloat16, where 16 channels are one register
INLINE Reg widen(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
INLINE __m256i narrow(Reg v) {
#ifdef __AVX512BF16__
  return (__m256i)_mm512_cvtneps_pbh(v);
#else                                               // round to nearest even by hand
  __m512i u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  u = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(u, 16));
#endif
}
INLINE __mmask16 mask(First k) { return (1 << k.n) - 1; }
INLINE Reg load(const BF* p, int, All) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
INLINE Reg load(const BF* p, int, First k) { return widen(_mm256_maskz_loadu_epi16(mask(k), p)); }
INLINE void store(BF* p, int, Reg v, All) { _mm256_storeu_si256((__m256i*)p, narrow(v)); }
INLINE void store(BF* p, int, Reg v, First k) { _mm256_mask_storeu_epi16(p, mask(k), narrow(v)); }

INLINE V pair(V v0, V v1) {                         // 16 words of two bfloat16: v0 in the low halves
  return {_mm512_castsi512_ps(_mm512_or_si512(
      _mm512_cvtepu16_epi32(narrow(v0.r[0])), _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(v1.r[0])), 16)))};
}
INLINE V madd_pairs(V a, V b, V c) {                // c + a.low*b.low + a.high*b.high
#ifdef __AVX512BF16__
  return {_mm512_dpbf16_ps(c.r[0], (__m512bh)(__m512)a.r[0], (__m512bh)(__m512)b.r[0])};
#else
  auto low = [](__m512 v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 16)); };
  auto high = [](__m512 v) { return _mm512_and_ps(v, _mm512_castsi512_ps(_mm512_set1_epi32(0xffff0000))); };
  return {_mm512_fmadd_ps(high(a.r[0]), high(b.r[0]), _mm512_fmadd_ps(low(a.r[0]), low(b.r[0]), c.r[0]))};
#endif
}
#endif

template <class P, class K = All> INLINE V load(const P* p, K k = {}) {
  return each([&](int i) ALWAYS_INLINE { return load(p, i, k); });
}
template <class P, class K = All> INLINE void store(P* p, V v, K k = {}) {
#pragma GCC unroll 4
  for (int i = 0; i < REGS; i++) store(p, i, v.r[i], k);
}
template <class T> INLINE V rounded(V v) {          // what a later load will read
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (sizeof(T) == 2) return {widen(narrow(v.r[0]))};
#endif
  return v;
}

struct Buffer {                                     // floats of scratch, from the start of a cache line on
  at::DataPtr data;
  explicit Buffer(long n) : data(c10::GetCPUAllocator()->allocate(n * sizeof(float))) {}
  Buffer(long n, float fill) : Buffer(n) { std::fill_n((float*)*this, n, fill); }
  operator float*() const { return (float*)data.get(); }
};

// ---- matrix product ----------------------------------------------------------------------------------
// A (m, kw) times B (kw, n), in 32-bit words. A word is one float, or two bfloat16 neighbours along the
// summed dimension, which is what vdpbf16ps multiplies. `per` is how many values a word holds.
//
// A strip of MR rows and 16*NV columns of the result stays in registers while k runs. Each step loads NV
// blocks of a row of B, and multiplies them by MR single words of A. B lies in panels: the 16 columns of a
// block, one row after the other. The processor then reads a panel from end to end, and it stays in the
// first-level cache while the strips pass over it. The result lies in panels too. Scratch is padded to
// whole blocks, so there are no column tails.
template <class T> constexpr long per = sizeof(float) / sizeof(T);

// Intel's matrix unit (AMX) multiplies bfloat16 in tiles of 16 rows of 16 words, and takes whole tiles only. So zeros
// fill up the summed dimension to a multiple of TILE words, and scratch has room for as many rows.
#ifdef __AMX_BF16__
template <class T> constexpr bool IN_TILES = per<T> == 2;
#else
template <class T> constexpr bool IN_TILES = false;
#endif
template <class T> constexpr long TILE = IN_TILES<T> ? 16 : 1;
template <class T> long words_of(long n) { return up(up(n, per<T>) / per<T>, TILE<T>); }    // of n summed values
template <class T> long row_of(long n) { return up(up(n, 16) / per<T>, TILE<T>); }  // words of a row of n values
// Scratch for n words of an operand: zeros, where they fill up tiles.
template <class T> Buffer operand(long n) { return IN_TILES<T> ? Buffer(n, 0) : Buffer(n); }

template <class T> INLINE V multiply_add(V a, V b, V c) {
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (per<T> == 2) return madd_pairs(a, b, c);
#endif
  return madd(a, b, c);
}

struct Left { const float* at; long row, col; };     // A: word (r, k) lies at `at + r*row + k*col`
struct Panels { const float* at; long size; };       // B: word (k, c) at `at + c/16*size + k*16 + c%16`

template <class T, int MR, int NV>
void strip(long m, long kw, Left A, Panels B, float* C, long panel, bool add) {
  for (; m >= MR; m -= MR, A.at += MR * A.row, C += MR * 16) {
    V acc[NV][MR];
    for (int v = 0; v < NV; v++)
      for (int r = 0; r < MR; r++) acc[v][r] = add ? load(C + v * panel + r * 16) : all(0);

    const float *a = A.at, *b = B.at;
    for (long k = 0; k < kw; k++, a += A.col, b += 16) {
      V bk[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) bk[v] = load(b + v * B.size);
#pragma GCC unroll 16
      for (int r = 0; r < MR; r++) {
        const V ar = all(a[r * A.row]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) acc[v][r] = multiply_add<T>(ar, bk[v], acc[v][r]);
      }
    }

    for (int v = 0; v < NV; v++)
      for (int r = 0; r < MR; r++) store(C + v * panel + r * 16, acc[v][r]);
  }
  if constexpr (MR > 1) if (m) strip<T, MR / 2, NV>(m, kw, A, B, C, panel, add);
}

#ifdef __AMX_BF16__
// Linux has to allow the process to use the unit: `has_matrix_unit` in blocks.py asks it.
struct TileShapes { uint8_t palette = 1, start = 0, unused[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; };
constexpr TileShapes eight_whole_tiles() {
  TileShapes shapes;
  for (int i = 0; i < 8; i++) shapes.bytes[i] = 64, shapes.rows[i] = 16;
  return shapes;
}
struct MatrixUnit {                                 // ready in this thread
  MatrixUnit() {
    static constexpr TileShapes shapes = eight_whole_tiles();
    static_assert(sizeof(shapes) == 64);
    _tile_loadconfig(&shapes);
  }
  ~MatrixUnit() { _tile_release(); }
};

// 16*R rows and 16*N columns of the result. Tiles 0 and 1 are its upper 16 rows, 2 and 3 the lower; 4 and 5 are of A,
// 6 and 7 of B. The words of a row of A must be neighbours. The macros of GCC 11.2 put no parentheses around a pointer.
template <int R, int N> void tile_strip(long kw, Left A, Panels B, float* C, long panel, bool add) {
  constexpr long LINE = 64, LOWER = 16 * 16;        // bytes from a row of a panel to the next; words to its 17th row
  const long row = A.row * sizeof(float);
  std::atomic_signal_fence(std::memory_order_seq_cst);      // GCC does not know that the unit reads memory
  if (add) {
    _tile_loadd(0, (C), LINE);
    if constexpr (N > 1) _tile_loadd(1, (C + panel), LINE);
    if constexpr (R > 1) _tile_loadd(2, (C + LOWER), LINE);
    if constexpr (R > 1 && N > 1) _tile_loadd(3, (C + panel + LOWER), LINE);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long k = 0; k < kw; k += 16) {
    _tile_loadd(4, (A.at + k), row);
    _tile_loadd(6, (B.at + k * 16), LINE);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) {
      _tile_loadd(7, (B.at + B.size + k * 16), LINE);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (R > 1) {
      _tile_loadd(5, (A.at + 16 * A.row + k), row);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, (C), LINE);
  if constexpr (N > 1) _tile_stored(1, (C + panel), LINE);
  if constexpr (R > 1) _tile_stored(2, (C + LOWER), LINE);
  if constexpr (R > 1 && N > 1) _tile_stored(3, (C + panel + LOWER), LINE);
}

inline void tile_strips(long width, long m, long kw, Left A, Panels B, float* C, long panel, bool add) {
  const MatrixUnit on;
  for (long r = 0; r < m; r += 32)
    for (long v = 0; v < width; v += 2) {
      const bool two_rows = m - r > 16, two_columns = width - v > 1;
      const auto run = two_rows ? two_columns ? tile_strip<2, 2> : tile_strip<2, 1>
                                : two_columns ? tile_strip<1, 2> : tile_strip<1, 1>;
      run(kw, {A.at + r * A.row, A.row, 1}, {B.at + v * B.size, B.size}, C + v * panel + r * 16, panel, add);
    }
}
#endif

// The width of the next strip, in blocks. AVX2 has 16 registers: 6 rows of one block fill 12, and B takes two.
// AVX-512 has 32, of a whole block each. The matrix unit takes a strip two blocks at a time.
template <class T> long strip_width(long left) {
  if (IN_TILES<T>) return std::min(left, 4L);
  if (REGS > 1) return 1;
  return left == 5 || left == 6 ? 3 : std::min(left, 4L);   // no lone last column: 5 = 3 + 2
}
template <class T> void strips(long width, long m, long kw, Left A, Panels B, float* C, long panel, bool add) {
#ifdef __AMX_BF16__
  if constexpr (IN_TILES<T>) return tile_strips(width, m, kw, A, B, C, panel, add);
#endif
  auto run = strip<T, (REGS > 1 ? 6 : 16), 1>;
  if constexpr (REGS == 1)
    if (width > 1) run = width == 4 ? strip<T, 6, 4> : width == 3 ? strip<T, 8, 3> : strip<T, 12, 2>;
  run(m, kw, A, B, C, panel, add);
}

// C += A B. C is in panels, of m rows filled up to whole tiles.
template <class T> void add_product(long m, long n, long kw, Left A, Panels B, float* C) {
  const long panel = up(m, TILE<T>) * 16;
  const Buffer turned(IN_TILES<T> ? up(m, TILE<T>) * kw : 0);
#ifdef __AMX_BF16__
  if constexpr (IN_TILES<T>) {                      // the words of a row become neighbours
    for (long r = 0; r < m; r += 16)
      for (long k = 0; k < kw; k += 16)
        at::vec::transpose_mxn<float>(A.at + r + k * A.col, A.col, turned + r * kw + k, kw, 16, 16);
    A = {turned, kw, 1};
  }
#endif
  for (long c = 0, w; c < n / 16; c += w) {
    w = strip_width<T>(n / 16 - c);
    strips<T>(w, m, kw, A, {B.at + c * B.size, B.size}, C + c * panel, panel, true);
  }
}

// A B, handed on while it is in the cache: sink(r, rows, c, out) takes `rows` rows of a block, from (r, c) on.
template <class T, class F> void product(long m, long n, long kw, Left A, Panels B, const F& sink) {
  constexpr long ROWS = 48;                         // a multiple of every strip's
  alignas(64) float out[4][ROWS * 16];
  for (long c = 0, w; c < n / 16; c += w) {
    w = strip_width<T>(n / 16 - c);
    for (long r = 0; r < m; r += ROWS) {
      const long rows = std::min(ROWS, m - r);
      strips<T>(w, rows, kw, {A.at + r * A.row, A.row, A.col}, {B.at + c * B.size, B.size}, out[0], ROWS * 16, false);
      for (long v = 0; v < w; v++) sink(r, rows, 16 * (c + v), out[v]);
    }
  }
}

// ---- operands of the product -------------------------------------------------------------------------
// A matrix in scratch, in words: block c / 16 of row r lies at `at + r*row + c/16*block`.
struct Matrix {
  float* at; long row, block;
  float* of(long r, long c) const { return at + r * row + c / 16 * block; }
};

// Two consecutive rows of 16 channels into scratch: into the matrix to sum over channels (`channels`), and
// into the one to sum over rows (`rows`). In float both have the same words, and the first is enough.
template <class T> INLINE void put(const Matrix* channels, const Matrix* rows, long r, long c, V v0, V v1) {
  if constexpr (per<T> == 1) {
    const Matrix* to = channels ? channels : rows;
    store(to->of(r, c), v0), store(to->of(r + 1, c), v1);
  }
#ifdef CPU_CAPABILITY_AVX512
  if constexpr (per<T> == 2) {
    if (channels) store((BF*)channels->of(r, c), v0), store((BF*)channels->of(r + 1, c), v1);
    if (rows) store(rows->of(r / 2, c), pair(v0, v1));
  }
#endif
}

// m rows of value(row, channel, lanes), in the order of memory. A walk down a block of 16 channels would
// keep the coefficients in registers, but it jumps from row to row, which no prefetcher follows: it takes
// twice as long.
template <class T, class F>
INLINE void put_all(const F& value, const Matrix* channels, const Matrix* rows, long C, long m) {
  if constexpr (per<T> == 1) {
    const Matrix to = channels ? *channels : *rows;
    for (long r = 0; r < m; r++)
      blocks(C, [&](long c, auto k) ALWAYS_INLINE { store(to.of(r, c), value(r, c, k)); });
  } else {
    for (long r = 0; r < m; r += 2)
      blocks(C, [&](long c, auto k) ALWAYS_INLINE {
        put<T>(channels, rows, r, c, value(r, c, k), r + 1 < m ? value(r + 1, c, k) : all(0));
      });
  }
}

// A weight as B: row r, column c is value(r, c), and zero beyond (R, C).
template <class T> struct Packed {
  long size;
  Buffer words;
  template <class F>
  Packed(long R, long C, const F value) :
      size(std::max(up(R, 2) / per<T>, words_of<T>(R)) * 16), words(operand<T>(up(C, 16) / 16 * size)) {
    const Matrix panels{words, 16, size};
    at::parallel_for(0, up(C, 16) / 16, 1, [&](long b, long e) {
      for (long c = b * 16; c < e * 16; c += 16)
        block(C - c, false, [&](auto k) {
          for (long r = 0; r < R; r += 2)
            put<T>(nullptr, &panels, r, c, value(r, c, k), r + 1 < R ? value(r + 1, c, k) : all(0));
        });
    });
  }
  operator Panels() const { return {words, size}; }
};

// ---- BatchNorm ---------------------------------------------------------------------------------------
// The norm and clamp that turn y into a. Its numbers are the rows of one (4, C) tensor.
struct Norm {
  const float *mean, *invstd, *scale, *shift;
  float lo, hi;
  Norm(const Tensor& t, double lo, double hi) : mean(t.const_data_ptr<float>()), invstd(mean + t.size(1)),
      scale(invstd + t.size(1)), shift(scale + t.size(1)), lo(lo), hi(hi) {}
};

template <class T> struct Normed {                  // rows of a = clamp(scale*y + shift)
  const T* y; long C; Norm n;
  template <class K> INLINE V z(V y, long c, K k) const { return madd(y, load(n.scale + c, k), load(n.shift + c, k)); }
  template <class K> INLINE V operator()(long r, long c, K k) const {
    return clamp(z(load(y + r * C + c, k), c, k), n.lo, n.hi);
  }
  Normed from(long row) const { return {y + row * C, C, n}; }
};

template <class T> struct Sloped {                  // rows of dL/dy = p*g + q*y + r
  const T *g, *y; long C; const float* coef;
  template <class K> INLINE V operator()(long i, long c, K k) const {
    return madd(load(g + i * C + c, k), load(coef + c, k),
                madd(load(y + i * C + c, k), load(coef + C + c, k), load(coef + 2 * C + c, k)));
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
  float* center(long t, long c) { return &about[t * Cp + c]; }

  void add(long t, long c, V s1, V s2) {            // to the sums of a block
    float v[2][16];
    store(v[0], s1), store(v[1], s2);
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 16; j++) s[(t * 2 + i) * Cp + c + j] += v[i][j];
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
    finish_streams();
  });
}

// Where a result goes: a tensor of rows, C values each.
template <class T> struct Output {
  T* at; long C; bool streamed;
  explicit Output(const Tensor& t) : at(t.data_ptr<T>()), C(t.size(1)),
      streamed(C % 16 == 0 && t.numel() * long(sizeof(T)) >= STREAMED_BYTES) {}
};

// 16 channels of m rows of y, from scratch into memory and into the statistics. `first` says that the
// thread begins here.
template <class T>
void keep(const float* from, const Output<T>& y, long row, long m, long c, Sums& sums, long t, bool first) {
  float* about = sums.center(t, c);
  if (first) store(about, rounded<T>(load(from)));
  block(y.C - c, y.streamed, [&](auto k) {
    const V center = load(about);
    V s1 = all(0), s2 = all(0);
    for (long i = 0; i < m; i++) {
      const V v = rounded<T>(load(from + i * 16)), d = v - center;
      store(y.at + (row + i) * y.C + c, v, k);
      s1 = s1 + d, s2 = madd(d, d, s2);
    }
    sums.add(t, c, s1, s2);
  });
}

// 16 channels of m rows of g = dL/dz, from dL/da = da(i, lanes): zero where the clamp holds, plus skip. Also the
// two sums of BatchNorm's backward. Without g, only they.
template <class T, class F>
void through_clamp(const F& da, const Normed<T>& a, const T* skip, const Output<T>* g, long row, long m, long c,
                   Sums& sums, long t) {
  block(a.C - c, g && g->streamed, [&](auto k) {
    const V mean = load(a.n.mean + c, k);
    V s1 = all(0), s2 = all(0);
    for (long i = 0; i < m; i++) {
      const long at = (row + i) * a.C + c;
      const V y = load(a.y + at, k), v = where_inside(a.z(y, c, k), a.n.lo, a.n.hi, da(i, k));
      if (g) store(g->at + at, skip ? v + load(skip + at, k) : v, k);
      s1 = s1 + v, s2 = madd(v, y - mean, s2);
    }
    sums.add(t, c, s1, s2);
  });
}

// ---- 1x1 convolution, and the first one over the image, as matrix products over (N*H*W, C) -------------
// Rows of the image's patches: row (n, oh, ow), column (kh, kw, channel), as a channels_last weight lies in memory.
struct Patches {
  const float* x;
  long H, W, OH, OW, channels, kernel, stride, C;
  Patches(const Tensor& image, long k, long stride) : x(image.const_data_ptr<float>()), H(image.size(2)),
      W(image.size(3)), OH((H - 1) / stride + 1), OW((W - 1) / stride + 1), channels(image.size(1)), kernel(k),
      stride(stride), C(k * k * channels) {}        // k is odd, padding k / 2

  void copy(long r, float* to) const {              // columns [left, right) of the kernel lie in the image
    const long h = r / OW % OH * stride - kernel / 2, w = r % OW * stride - kernel / 2;
    const long left = std::max(0L, -w), right = std::min(kernel, W - w), row = kernel * channels;
    const float* image = x + r / OW / OH * H * W * channels;
    for (long kh = 0; kh < kernel; kh++, to += row) {
      const bool inside = h + kh >= 0 && h + kh < H;
      if (!inside || right - left < kernel) std::fill_n(to, row, 0.f);
      if (inside)
        std::copy_n(image + ((h + kh) * W + w + left) * channels, (right - left) * channels, to + left * channels);
    }
  }
  struct From {
    const Patches& p; long first;
    std::vector<float> two = std::vector<float>(2 * up(p.C, 16));   // put_all takes two rows by turns
    template <class K> V operator()(long i, long c, K) const {
      float* patch = const_cast<float*>(&two[i % 2 * two.size() / 2]);
      if (c == 0) p.copy(first + i, patch);
      return load(patch + c);
    }
  };
  From from(long row) const { return {*this, row}; }
};

inline long chunk_rows(long words_a_row) { return std::max(48L, 65536 / words_a_row / 48 * 48); }  // fits in L2

// y (M, N) = input (M, K) times the weight (N, K), transposed.
template <class T, class F>
void dense_forward(const F& input, const float* weight, const Output<T>& y, Sums& sums, long M, long K, long N) {
  const long Np = up(N, 16), chunk = chunk_rows(K + N), kw = words_of<T>(K), row = row_of<T>(K);
  const Packed<T> B(K, N, [=](long r, long c, auto k) {
    float column[16] = {};
    for (long j = 0; j < count(k); j++) column[j] = weight[(c + j) * K + r];
    return load(column);
  });
  split(M, [&](long t, long begin, long end) {
    const Buffer words = operand<T>(chunk * row);
    const Matrix A{words, row, 16 / per<T>};
    for (long r0 = begin; r0 < end; r0 += chunk) {
      const long m = std::min(chunk, end - r0);
      put_all<T>(input.from(r0), &A, nullptr, K, m);
      product<T>(m, Np, kw, {A.at, A.row, 1}, B, [&](long r, long rows, long c, const float* out) {
        keep(out, y, r0 + r, rows, c, sums, t, r0 + r == begin);
      });
    }
    sums.count[t] = end - begin;
  });
}

// dL/dy (M, N) from g and y. dW (N, K) = dL/dy^T a, and g_in = dL/dz of the input, which the image has not.
template <class T, class F>
void dense_backward(const F& input, const Normed<T>& a, const Sloped<T>& dy, const float* weight, const T* skip,
                    const Output<T>* g_in, float* dW, Sums& sums, long M, long K, long N) {
  const long Kp = up(K, 16), Np = up(N, 16), chunk = chunk_rows(K + N), n = at::get_num_threads();
  const long kw = words_of<T>(N), row = row_of<T>(N);
  const long panel = up(N, TILE<T>) * 16, dw_size = Kp / 16 * panel;
  const Packed<T> B(g_in ? N : 0, K, [=](long r, long c, auto k) { return load(weight + r * K + c, k); });
  const Buffer dWs(n * dw_size, 0);                 // of each thread, in panels
  split(M, [&](long t, long begin, long end) {
    const long height = words_of<T>(chunk);
    const Buffer dy_words = operand<T>(chunk * row), dy_pairs = operand<T>(per<T> == 2 ? height * Np : 0);
    const Buffer a_words = operand<T>(height * Kp);
    const Matrix by_row{dy_words, row, 16 / per<T>}, by_pair{per<T> == 2 ? dy_pairs : dy_words, Np, 16};
    const Matrix panels{a_words, 16, height * 16};
    for (long r0 = begin; r0 < end; r0 += chunk) {
      const long m = std::min(chunk, end - r0);
      put_all<T>(dy.from(r0), &by_row, &by_pair, N, m);
      put_all<T>(input.from(r0), nullptr, &panels, K, m);
      const long summed = words_of<T>(m);
      for (long r = up(m, per<T>) / per<T>; r < summed; r++) {      // where the chunk before left its rows
        std::fill_n(by_pair.of(r, 0), Np, 0.f);
        for (long c = 0; c < Kp; c += 16) std::fill_n(panels.of(r, c), 16, 0.f);
      }
      add_product<T>(N, Kp, summed, {by_pair.at, 1, by_pair.row}, {panels.at, panels.block}, dWs + t * dw_size);
      if (!g_in) continue;
      product<T>(m, Kp, kw, {by_row.at, by_row.row, 1}, B,
                 [&](long r, long rows, long c, const float* out) {
        through_clamp([=](long i, auto) ALWAYS_INLINE { return load(out + i * 16); }, a, skip, g_in, r0 + r, rows, c,
                      sums, t);
      });
    }
  });
  at::parallel_for(0, N, 64, [&](long b, long e) {
    for (long i = b; i < e; i++)
      blocks(K, [&](long c, auto k) {
        V v = all(0);
        for (long t = 0; t < n; t++) v = v + load(dWs + t * dw_size + c / 16 * panel + i * 16);
        store(dW + i * K + c, v, k);
      });
  });
}

// ---- depthwise 3x3 convolution, padding 1, stride 1 or 2 -----------------------------------------------
// Rows live in rings of three, in float, as [channel / 16][column][16]: the nine taps of a pixel are
// neighbours. A ring holds the image's row `row` at slot row % 3. fill(row, buffer) makes a row when it
// is first needed. Rows outside the image are zero.
struct Ring {
  long size, held[3] = {-1, -1, -1};
  Buffer buffer;
  explicit Ring(long size) : size(size), buffer(4 * size, 0) {}
  template <class F> const float* get(long image, long row, long rows, const F& fill) {
    if (row < 0 || row >= rows) return buffer + 3 * size;
    const long id = image * rows + row, slot = row % 3;
    if (held[slot] != id) fill(id, buffer + slot * size), held[slot] = id;
    return buffer + slot * size;
  }
};

inline Buffer taps(const float* weight, long C) {   // (C, 9) -> [C / 16][9][16], padded with zeros
  Buffer out(up(C, 16) * 9, 0);
  for (long c = 0; c < C; c++) for (long k = 0; k < 9; k++) out[c / 16 * 144 + k * 16 + c % 16] = weight[c * 9 + k];
  return out;
}

// A row from memory into scratch: `step` columns apart, after the column of zeros at its left.
template <class F> inline void spread(const F value, float* to, long pitch, long columns, long step, long C) {
  for (long i = 0; i < columns; i++)
    blocks(C, [=](long c, auto k) ALWAYS_INLINE {
      store(to + c / 16 * pitch + 16 * (i * step + 1), value(i, c, k));
    });
}

// 16 channels of one output row. They go a register at a time: the nine weights fill nine registers.
inline void depthwise_out(const float* const in[3], const float* weight, float* out, long OW, long s) {
  for (int p = 0; p < REGS; p++, weight += W, out += W) {
    const float *a = in[0] + p * W, *b = in[1] + p * W, *c = in[2] + p * W;
    Reg wk[9];
#pragma GCC unroll 9
    for (int j = 0; j < 9; j++) wk[j] = Reg::loadu(weight + 16 * j);
    for (long i = 0; i < OW; i++) {
      Reg v = wk[0] * Reg::loadu(a + 16 * i * s);
#pragma GCC unroll 9
      for (int j = 1; j < 9; j++)
        v = at::vec::fmadd(wk[j], Reg::loadu((j < 3 ? a : j < 6 ? b : c) + 16 * (i * s + j % 3)), v);
      v.store(out + 16 * i);
    }
  }
}

template <class T>
void depthwise_forward(const Normed<T>& input, const float* weight, const Output<T>& y, Sums& sums, long N, long H,
                       long WI, long s) {
  const long C = input.C, OH = (H - 1) / s + 1, OW = (WI - 1) / s + 1, pitch = (WI + 2) * 16;
  const Buffer w = taps(weight, C);
  split(N * OH, [&](long t, long begin, long end) {
    Ring ring(up(C, 16) / 16 * pitch);
    const Buffer out(OW * 16);
    auto fill = [&](long row, float* to) { spread(input.from(row * WI), to, pitch, WI, 1, C); };
    for (long o = begin; o < end; o++) {
      const float* in[3];
      for (long k = 0; k < 3; k++) in[k] = ring.get(o / OH, o % OH * s - 1 + k, H, fill);
      for (long c = 0; c < C; c += 16) {
        depthwise_out(in, w + c * 9, out, OW, s);
        keep<T>(out, y, o * OW, OW, c, sums, t, o == begin);
        for (auto& row : in) row += pitch;
      }
    }
    sums.count[t] = (end - begin) * OW;
  });
}

// 16 channels of one input row. Each value of dL/dy meets its weight for dL/da, and a for dW, in the
// same visit. Rows of dL/dy are spread to the input's columns, with zeros between them where the stride
// is 2. Bit kh of ROWS says whether there is a row for kh.
template <int ROWS>
void depthwise_in(const float* const d[3], const float* weight, const float* a, float* da, float* dw, long WI) {
  for (int p = 0; p < REGS; p++, weight += W, a += W, da += W, dw += W) {
    const float *d0 = d[0] + p * W, *d1 = d[1] + p * W, *d2 = d[2] + p * W;
    Reg acc[9];
#pragma GCC unroll 9
    for (int j = 0; j < 9; j++) acc[j] = Reg::loadu(dw + 16 * j);
    for (long i = 0; i < WI; i++) {
      const Reg av = Reg::loadu(a + 16 * (i + 1));
      Reg v(0.f);
#pragma GCC unroll 9
      for (int j = 0; j < 9; j++) if (ROWS >> j / 3 & 1) {
        const Reg dv = Reg::loadu((j < 3 ? d0 : j < 6 ? d1 : d2) + 16 * (i + 2 - j % 3));
        v = at::vec::fmadd(dv, Reg::loadu(weight + 16 * j), v), acc[j] = at::vec::fmadd(dv, av, acc[j]);
      }
      v.store(da + 16 * i);
    }
#pragma GCC unroll 9
    for (int j = 0; j < 9; j++) acc[j].store(dw + 16 * j);
  }
}

template <class T>
void depthwise_backward(const Normed<T>& input, const Sloped<T>& dy, const float* weight, const Output<T>& g_in,
                        float* dW, Sums& sums, long N, long H, long WI, long s) {
  const long C = input.C, Cp = up(C, 16), OH = (H - 1) / s + 1, OW = (WI - 1) / s + 1, pitch = (WI + 2) * 16;
  const long n = at::get_num_threads();
  const Buffer w = taps(weight, C);
  const Buffer dWs(n * Cp * 9, 0);
  split(N * H, [&](long t, long begin, long end) {
    Ring ring(Cp / 16 * pitch);
    const Buffer a(ring.size), da(WI * 16);
    auto fill = [&](long row, float* to) { spread(dy.from(row * OW), to, pitch, OW, s, C); };
    for (long r = begin; r < end; r++) {
      const float* d[3] = {};
      int some = 0;                                 // y row o meets input row r through kh = r + 1 - o*s
      for (long k = 0; k < 3; k++) if ((r % H + 1 - k) % s == 0)
        d[k] = ring.get(r / H, (r % H + 1 - k) / s, OH, fill), some |= 1 << k;
      spread(input.from(r * WI), a, pitch, WI, 1, C);
      const auto run = some == 7 ? depthwise_in<7> : some == 2 ? depthwise_in<2> : depthwise_in<5>;
      for (long c = 0, at = 0; c < C; c += 16, at += pitch) {
        run(d, w + c * 9, a + at, da, dWs + t * Cp * 9 + c * 9, WI);
        through_clamp([&](long i, auto) ALWAYS_INLINE { return load(da + i * 16); }, input, (const T*)nullptr, &g_in,
                      r * WI, WI, c, sums, t);
        for (auto& row : d) row += pitch;
      }
    }
  });
  for (long c = 0; c < C; c++) for (long k = 0; k < 9; k++) {
    float v = 0;
    for (long t = 0; t < n; t++) v += dWs[t * Cp * 9 + c / 16 * 144 + k * 16 + c % 16];
    dW[c * 9 + k] = v;
  }
}

// ---- operators ---------------------------------------------------------------------------------------
template <class F> void dispatch(const Tensor& t, const F& f) {
#ifdef CPU_CAPABILITY_AVX512
  if (t.scalar_type() == at::kBFloat16) return f(BF());
#endif
  TORCH_CHECK(t.scalar_type() == at::kFloat, "kd_blocks: activations in ", t.scalar_type(), " need AVX-512");
  f(float());
}
template <class T> const T* in(const Tensor& t) { return t.const_data_ptr<T>(); }
template <class T> const T* in(OptTensor t) { return t ? t->const_data_ptr<T>() : nullptr; }
Tensor identity(long C) {
  return at::tensor({0.f, 1.f, 1.f, 0.f}).unsqueeze(1).expand({4, C}).contiguous();
}
constexpr double inf = std::numeric_limits<double>::infinity();
constexpr auto NHWC = at::MemoryFormat::ChannelsLast;
bool is_depthwise(const Tensor& w) { return w.size(1) == 1 && w.size(2) == 3; }

// x is y_{i-1}, and norm its norm; or x is the image, in float. Returns y_i and its norm.
std::tuple<Tensor, Tensor> conv_forward(const Tensor& x, OptTensor norm, double lo, double hi, const Tensor& w,
    long stride, bool image, const Tensor& gamma, const Tensor& beta, const Tensor& rmean, const Tensor& rvar,
    double momentum, double eps, bool half) {
  const Tensor nt = norm ? *norm : identity(x.size(1));
  const Norm nm(nt, norm ? lo : -inf, norm ? hi : inf);
  const long N = x.size(0), C = x.size(1), O = w.size(0), k = w.size(2);
  Tensor y = at::empty({N, O, (x.size(2) - 1) / stride + 1, (x.size(3) - 1) / stride + 1},
                       x.options().dtype(half ? at::kBFloat16 : at::kFloat), NHWC);
  Sums sums(O, at::get_num_threads());
  const Tensor weight = w.contiguous(NHWC);
  const float* wp = in<float>(weight);
  const long M = y.numel() / O;
  dispatch(y, [&](auto v) {
    using T = decltype(v);
    const Output<T> out(y);
    if (image) dense_forward(Patches(x, k, stride), wp, out, sums, M, C * k * k, O);
    else if (is_depthwise(w)) depthwise_forward({in<T>(x), C, nm}, wp, out, sums, N, x.size(2), x.size(3), stride);
    else dense_forward(Normed<T>{in<T>(x), C, nm}, wp, out, sums, M, C, O);
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
  const Tensor weight = w.contiguous(NHWC);
  Tensor g_in = image ? Tensor() : at::empty_like(x), dw = at::empty(w.sizes(), w.options(), NHWC);
  Sums sums(C, at::get_num_threads());
  const float *wp = in<float>(weight), *coef = in<float>(slope);
  float* dW = dw.data_ptr<float>();
  dispatch(y, [&](auto v) {
    using T = decltype(v);
    const Sloped<T> dy{in<T>(g), in<T>(y), O, coef};
    const Normed<T> a{image ? nullptr : in<T>(x), C, nm};
    if (image)
      return dense_backward<T>(Patches(x, k, stride), a, dy, wp, nullptr, nullptr, dW, sums, M, C * k * k, O);
    const Output<T> to(g_in);
    if (is_depthwise(w)) depthwise_backward(a, dy, wp, to, dW, sums, N, x.size(2), x.size(3), stride);
    else dense_backward(a, a, dy, wp, in<T>(skip), &to, dW, sums, M, C, O);
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
        blocks(C, [=](long c, auto k) {
          const V v = a(r, c, k);
          store(op + r * C + c, sp ? v + load(sp + r * C + c, k) : v, k);
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
  const long C = y.size(1), chunk = 48;
  Sums sums(C, at::get_num_threads());
  dispatch(y, [&](auto v) {
    using T = decltype(v);
    const T* dp = in<T>(da);
    const Normed<T> a{in<T>(y), C, nm};
    const Output<T> out(g);
    split(y.numel() / C, [&](long t, long begin, long end) {
      for (long r = begin; r < end; r += chunk)
        for (long c = 0; c < C; c += 16)
          through_clamp([=](long i, auto k) ALWAYS_INLINE { return load(dp + (r + i) * C + c, k); }, a,
                        (const T*)nullptr, clamped ? &out : nullptr, r, std::min(chunk, end - r), c, sums, t);
    });
  });
  return {g, sums.slope(nm, y.numel() / C)};
}
}  // namespace

TORCH_LIBRARY(kd_blocks, m) {
  m.def("in_tiles() -> bool", [] { return IN_TILES<BF>; });     // whether bfloat16 is multiplied in the matrix unit
  m.def("conv_forward(Tensor x, Tensor? norm, float lo, float hi, Tensor w, int stride, bool image, Tensor gamma, "
        "Tensor beta, Tensor(a!) rmean, Tensor(b!) rvar, float momentum, float eps, bool half) -> (Tensor, Tensor)",
        &conv_forward);
  m.def("conv_backward(Tensor g, Tensor slope, Tensor y, Tensor x, Tensor? norm, float lo, float hi, Tensor w, "
        "int stride, bool image, Tensor? skip) -> (Tensor, Tensor, Tensor)", &conv_backward);
  m.def("norm_forward(Tensor y, Tensor norm, float lo, float hi, Tensor? skip) -> Tensor", &norm_forward);
  m.def("norm_backward(Tensor da, Tensor y, Tensor norm, float lo, float hi) -> (Tensor, Tensor)", &norm_backward);
}
