// The distillation loss and its gradient in one visit to each row, on the CPU.  The algebra is at the top of
// kd/losses.py; kd/fast/loss_cpu.py builds this file on first use.
//
// A row (1000 classes: 4 kB of student, 4 kB of teacher) is read from memory once, into L1, and stays there:
//   sweep 1   the maxima of s and t (and, for bf16 and fp16, the upcast into scratch)
//   sweep 2   e₁ = exp(s − max s), e = exp((s − max s)/T), u = exp((t − max t)/T), kept in scratch, and their
//             sums z₁, z, zₜ, with Σ u·((t − max t) − (s − max s)) for the KL
//   sweep 3   gradient = (1 − λ)·(e₁/z₁ − y) + λ·T·(e/z − u/zₜ), from the scratch: no exponential is taken twice
// so memory sees the floor: read s, read t, write the gradient.  Plain loops that g++ vectorises; no intrinsics,
// and no -ffast-math, which would break the infinities that the loss is specified on.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

namespace {

// Loops run over chunks of this many classes: what a chunk adds up in fp32 is added to the row's total in double,
// so the error of a sum does not grow with C.
constexpr int64_t kChunk = 1024;

// exp for x ≤ 0, within 1 ulp: x = k·ln 2 + r with |r| ≤ ln 2 / 2, exp x = 2^k · exp r, exp r by a minimax polynomial
// (relative error 3e-9).  Adding 1.5·2²³ rounds x·log₂e to an integer, which is then in the low bits of the sum;
// shifted by 23 they add k to the exponent of the result.  Below exp(−87) the answer is 0: no denormals, and
// exp(−∞) = 0 exactly.
inline float exp_(float x) {
  float shifted = std::fma(x, 1.44269504f, 12582912.f);
  float k = shifted - 12582912.f;
  float r = std::fma(k, -0x1.62e4p-1f, x);          // ln 2 in two parts: the first times k is exact
  r = std::fma(k, -0x1.7f7d1cp-20f, r);
  float p = 0x1.6a23d0p-10f;
  p = std::fma(p, r, 0x1.123a20p-7f);
  p = std::fma(p, r, 0x1.5558f2p-5f);
  p = std::fma(p, r, 0x1.555492p-3f);
  p = std::fma(p, r, 0x1.fffffcp-2f);
  p = std::fma(p, r, 1.f);
  p = std::fma(p, r, 1.f);
  uint32_t exponent, bits;
  std::memcpy(&exponent, &shifted, 4);
  std::memcpy(&bits, &p, 4);
  bits += exponent << 23;
  std::memcpy(&p, &bits, 4);
  return x < -87.f ? 0.f : p;
}

struct Terms {  // what multiplies what; the same for every row
  double temperature, kd_weight, label_smoothing, gradient_scale;  // gradient_scale: over the number of kept rows
};

// The row as fp32: itself, or its upcast in scratch.
inline const float* upcast(const float* row, float*, int64_t) { return row; }
template <typename T>
inline const float* upcast(const T* row, float* scratch, int64_t C) {
  for (int64_t j = 0; j < C; ++j) scratch[j] = static_cast<float>(row[j]);
  return scratch;
}

inline float maximum(const float* x, int64_t C) {
  constexpr int kLanes = 64;  // independent maxima, because a single one would wait for itself
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, -std::numeric_limits<float>::infinity());
  int64_t j = 0;
  for (; j + kLanes <= C; j += kLanes)
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) lanes[l] = x[j + l] > lanes[l] ? x[j + l] : lanes[l];
  for (; j < C; ++j) lanes[0] = x[j] > lanes[0] ? x[j] : lanes[0];
  return *std::max_element(lanes, lanes + kLanes);
}

// One row: returns its loss, and writes its gradient (G: the precision of the student's logits).
// HARD, SOFT: whether the CE and the KL take part. A term of weight 0 is left out, not multiplied by 0: it may be ∞.
template <bool HARD, bool SOFT, typename G>
double row(const float* s, const float* t, int64_t label, int64_t C, const Terms& w, float* e1, float* e, float* u,
           G* grad) {
  const float max_s = maximum(s, C), max_t = SOFT ? maximum(t, C) : 0.f;
  const float inverse_t = static_cast<float>(1 / w.temperature);
  const float s_label = HARD ? s[label] - max_s : 0.f;
  double z1 = 0, z = 0, zt = 0, dot = 0, sum_s = 0;
  for (int64_t begin = 0; begin < C; begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, C);
    float z1_ = 0, z_ = 0, zt_ = 0, dot_ = 0, sum_ = 0;
#pragma omp simd reduction(+ : z1_, z_, zt_, dot_, sum_)
    for (int64_t j = begin; j < end; ++j) {
      const float ds = s[j] - max_s;
      if (HARD) {
        e1[j] = exp_(ds);
        z1_ += e1[j];
        sum_ += ds;
      }
      if (SOFT) {
        const float dt = t[j] - max_t;
        e[j] = exp_(ds * inverse_t);
        u[j] = exp_(dt * inverse_t);
        z_ += e[j];
        zt_ += u[j];
        dot_ += u[j] > 0 ? u[j] * (dt - ds) : 0.f;  // 0·(−∞) is 0 here
      }
    }
    z1 += z1_, z += z_, zt += zt_, dot += dot_, sum_s += sum_;
  }

  double loss = 0;
  float a = 0, b = 0, c = 0, d = 0;
  if (HARD) {
    const double weight = 1 - w.kd_weight, eps = w.label_smoothing;
    loss += weight * (std::log(z1) - (1 - eps) * s_label);
    if (eps > 0) loss -= weight * eps * sum_s / C;
    a = static_cast<float>(weight * w.gradient_scale / z1);
    d = static_cast<float>(weight * w.gradient_scale * eps / C);
  }
  if (SOFT) {
    const double T = w.temperature, weight = w.kd_weight;
    loss += weight * T * T * (dot / (T * zt) + std::log(z) - std::log(zt));
    b = static_cast<float>(weight * T * w.gradient_scale / z);
    c = static_cast<float>(weight * T * w.gradient_scale / zt);
  }
  float on_label = 0;  // kept in fp32 until here: the gradient on the label is a difference of near equals
  if (HARD) {
    on_label = a * e1[label] + (SOFT ? b * e[label] - c * u[label] : 0.f) - d
        - static_cast<float>((1 - w.kd_weight) * (1 - w.label_smoothing) * w.gradient_scale);
  }
#pragma omp simd
  for (int64_t j = 0; j < C; ++j) {
    float g = 0;
    if (HARD) g = a * e1[j] - d;
    if (SOFT) g += b * e[j] - c * u[j];
    grad[j] = static_cast<G>(g);
  }
  if (HARD) grad[label] = static_cast<G>(on_label);
  return loss;
}

template <typename S, typename T>
double rows(const at::Tensor& student, const std::optional<at::Tensor>& teacher, const int64_t* labels,
            int64_t ignore_index, const Terms& w, at::Tensor& grad) {
  const int64_t B = student.size(0), C = student.size(1);
  const int64_t padded = (C + 15) / 16 * 16;
  const bool soft = w.kd_weight > 0, hard = w.kd_weight < 1;
  const int64_t grain = std::max<int64_t>(1, 8192 / C);  // less than this is not worth waking a thread for
  at::Tensor scratch = at::empty({at::get_num_threads(), 5, padded}, at::kFloat);
  std::vector<double> losses(B);  // added up in order afterwards: the same result for any number of threads
  at::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
    float* mine = scratch.mutable_data_ptr<float>() + at::get_thread_num() * 5 * padded;
    float *e1 = mine, *e = mine + padded, *u = mine + 2 * padded;
    for (int64_t i = begin; i < end; ++i) {
      S* g = grad.mutable_data_ptr<S>() + i * grad.stride(0);
      if (labels[i] == ignore_index) {
        std::fill(g, g + C, S(0));
        continue;
      }
      const float* s = upcast(student.const_data_ptr<S>() + i * student.stride(0), mine + 3 * padded, C);
      const float* t = soft ? upcast(teacher->const_data_ptr<T>() + i * teacher->stride(0), mine + 4 * padded, C)
                            : nullptr;
      losses[i] = !soft ? row<true, false>(s, t, labels[i], C, w, e1, e, u, g)
          : hard        ? row<true, true>(s, t, labels[i], C, w, e1, e, u, g)
                        : row<false, true>(s, t, labels[i], C, w, e1, e, u, g);
    }
  });
  double sum = 0;
  for (double loss : losses) sum += loss;
  return sum;
}

// Writes gradient_scale · ∂loss/∂student over `grad` (which may be the student's logits) and returns the loss.
// The caller (kd/losses.py) has checked shapes and dtypes, and that classes are contiguous within a row.
at::Tensor loss_and_grad_(const at::Tensor& student, const std::optional<at::Tensor>& teacher,
                          const at::Tensor& labels_, double temperature, double kd_weight, int64_t ignore_index,
                          double label_smoothing, double gradient_scale, at::Tensor grad) {
  const int64_t B = student.size(0), C = student.size(1);
  const at::Tensor labels = labels_.contiguous();
  const int64_t* y = labels.const_data_ptr<int64_t>();
  int64_t kept = 0;
  for (int64_t i = 0; i < B; ++i) {
    if (y[i] == ignore_index) continue;
    TORCH_CHECK_VALUE(y[i] >= 0 && y[i] < C, "labels must be in [0, ", C, ") or ", ignore_index, ", got ", y[i]);
    ++kept;
  }
  const double n = static_cast<double>(std::max<int64_t>(kept, 1));
  const Terms w{temperature, kd_weight, label_smoothing, gradient_scale / n};
  const at::ScalarType S = student.scalar_type();
  const at::ScalarType T = kd_weight > 0 ? teacher->scalar_type() : S;
  double sum = 0;
  const auto with_teacher = [&](auto s) {
    using St = decltype(s);
    sum = T == at::kFloat      ? rows<St, float>(student, teacher, y, ignore_index, w, grad)
        : T == at::kBFloat16   ? rows<St, at::BFloat16>(student, teacher, y, ignore_index, w, grad)
                               : rows<St, at::Half>(student, teacher, y, ignore_index, w, grad);
  };
  if (S == at::kFloat) with_teacher(float{});
  else if (S == at::kBFloat16) with_teacher(at::BFloat16{});
  else with_teacher(at::Half{});
  at::Tensor loss = at::empty({}, at::kFloat);
  *loss.mutable_data_ptr<float>() = static_cast<float>(sum / n);
  return loss;
}

// grad *= factor; free where the factor is 1, as it is without a gradient scaler or accumulation.
void scale_(at::Tensor grad, const at::Tensor& factor) {
  const float f = *factor.const_data_ptr<float>();
  if (f != 1.f) grad.mul_(f);
}

}  // namespace

TORCH_LIBRARY_IMPL(kd, CPU, m) {  // declared in kd/losses.py
  m.impl("loss_and_grad_", loss_and_grad_);
  m.impl("scale_", scale_);
}
