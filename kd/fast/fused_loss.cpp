// The distillation loss and its gradient on the CPU, in one visit to each row.
// The algebra is at the top of kd/losses.py. kd/fast/fused_loss.py builds this file on first use.
//
// Memory traffic is what a loss on large (B, C) logits waits for. A row of 1000 classes is 4 kB of
// student and 4 kB of teacher: it is read from memory once, into the L1 cache, and stays there.
//
//   sweep 1   the maxima of s and t; bf16 and fp16 are upcast into scratch
//   sweep 2   e1 = exp(s − max s), e = exp((s − max s)/T) and u = exp((t − max t)/T), into scratch;
//             their sums z1, z and zt, and Σ u·((t − max t) − (s − max s)) for the KL
//   sweep 3   gradient = (1 − λ)·(e1/z1 − y) + λ·T·(e/z − u/zt), from the exponentials in scratch
//
// So memory sees the least traffic there can be: read s, read t, write the gradient.
//
// The loops are plain C++ that the compiler vectorises. -ffast-math would break the infinities that
// the loss is specified on. With -ffp-contract=off a product and a sum are fused only where the code
// says std::fma, so the bits do not depend on what the optimiser happens to fuse.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace {

constexpr int64_t kNoLabel = -100;  // NO_LABEL of kd/losses.py

// A chunk of this many classes is summed in fp32, and chunks are summed in double.
// The error of a sum therefore does not grow with C.
constexpr int64_t kChunk = 1024;

// exp(x) for x ≤ 0, within 1 ulp.
//
// x = k·ln 2 + r with |r| ≤ ln 2 / 2, so exp x = 2^k · exp r. A minimax polynomial gives exp r with a
// relative error of 3e-9. Adding 1.5·2²³ rounds x·log₂e to the integer k, which is then in the low
// bits of the sum; shifted left by 23 bits, k adds to the exponent of the result.
// Below −87 the result is 0, so there are no denormals, and exp(−∞) is exactly 0.
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

struct Settings {  // the same for every row
  double temperature, kd_weight;
  double gradient_scale;  // multiplies the gradient; the 1/B of the mean is in it
};

// The row in fp32: the row itself, or its upcast in scratch.
inline const float* upcast(const float* row, float*, int64_t) { return row; }
template <typename T>
inline const float* upcast(const T* row, float* scratch, int64_t C) {
  for (int64_t j = 0; j < C; ++j) scratch[j] = static_cast<float>(row[j]);
  return scratch;
}

inline float maximum(const float* x, int64_t C) {
  constexpr int kLanes = 64;  // independent maxima: with only one, each step would wait for the last
  float lanes[kLanes];
  std::fill(lanes, lanes + kLanes, -std::numeric_limits<float>::infinity());
  int64_t j = 0;
  for (; j + kLanes <= C; j += kLanes)
#pragma omp simd
    for (int l = 0; l < kLanes; ++l) lanes[l] = x[j + l] > lanes[l] ? x[j + l] : lanes[l];
  for (; j < C; ++j) lanes[0] = x[j] > lanes[0] ? x[j] : lanes[0];
  return *std::max_element(lanes, lanes + kLanes);
}

// One row: returns its loss and writes its gradient in G, the precision of the student's logits.
// CE and KL say which terms take part. A term of weight 0 is left out, because 0·∞ is not 0.
template <bool CE, bool KL, typename G>
double row(const float* s, const float* t, int64_t label, int64_t C, const Settings& settings,
           float* e1, float* e, float* u, G* grad) {
  const double T = settings.temperature;
  const float max_s = maximum(s, C), max_t = KL ? maximum(t, C) : 0.f;
  const float inverse_t = static_cast<float>(1 / T);

  // ---- sweep 2: exponentials and their sums ----
  double z1 = 0, z = 0, zt = 0, dot = 0;
  for (int64_t begin = 0; begin < C; begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, C);
    float z1_ = 0, z_ = 0, zt_ = 0, dot_ = 0;
#pragma omp simd reduction(+ : z1_, z_, zt_, dot_)
    for (int64_t j = begin; j < end; ++j) {
      const float ds = s[j] - max_s;
      if (CE) {
        e1[j] = exp_(ds);
        z1_ += e1[j];
      }
      if (KL) {
        const float dt = t[j] - max_t;
        e[j] = exp_(ds * inverse_t);
        u[j] = exp_(dt * inverse_t);
        z_ += e[j];
        zt_ += u[j];
        dot_ += u[j] > 0 ? u[j] * (dt - ds) : 0.f;  // 0·(−∞) counts as 0
      }
    }
    z1 += z1_, z += z_, zt += zt_, dot += dot_;
  }

  // ---- the loss, and the factors of the gradient ----
  double loss = 0;
  float a = 0, b = 0, c = 0;  // gradient = a·e1 + b·e − c·u, and less `one` on the label
  float one = 0;
  if (CE) {
    const double weight = 1 - settings.kd_weight;
    loss = weight * (std::log(z1) - (s[label] - max_s));
    a = static_cast<float>(weight * settings.gradient_scale / z1);
    one = static_cast<float>(weight * settings.gradient_scale);
  }
  if (KL) {
    const double weight = settings.kd_weight;
    const double kl = dot / (T * zt) + std::log(z) - std::log(zt);
    loss = std::fma(weight * T * T, kl, loss);
    b = static_cast<float>(weight * T * settings.gradient_scale / z);
    c = static_cast<float>(weight * T * settings.gradient_scale / zt);
  }

  // ---- sweep 3: the gradient ----
  // On the label it is a difference of near equals, so it stays in fp32 until it is complete.
  float on_label = 0;
  if (CE) {
    const float from_kl = KL ? std::fma(b, e[label], -(c * u[label])) : 0.f;
    on_label = std::fma(a, e1[label], from_kl) - one;
  }
#pragma omp simd
  for (int64_t j = 0; j < C; ++j) {
    float g = 0;
    if (CE) g = a * e1[j];
    if (KL) g += std::fma(b, e[j], -(c * u[j]));
    grad[j] = static_cast<G>(g);
  }
  if (CE) grad[label] = static_cast<G>(on_label);
  return loss;
}

// All rows: returns the sum of their losses. S and T are the logits' precisions.
template <typename S, typename T>
double rows(const at::Tensor& student, const std::optional<at::Tensor>& teacher, const int64_t* labels,
            const Settings& settings, at::Tensor& grad) {
  const int64_t B = student.size(0), C = student.size(1);
  const int64_t padded = (C + 15) / 16 * 16;
  const int64_t grain = std::max<int64_t>(1, 8192 / C);  // less work is not worth waking a thread for
  at::Tensor scratch = at::empty({at::get_num_threads(), 5, padded}, at::kFloat);
  std::vector<double> losses(B);

  at::parallel_for(0, B, grain, [&](int64_t begin, int64_t end) {
    float* mine = scratch.mutable_data_ptr<float>() + at::get_thread_num() * 5 * padded;
    float *e1 = mine, *e = mine + padded, *u = mine + 2 * padded;
    for (int64_t i = begin; i < end; ++i) {
      S* g = grad.mutable_data_ptr<S>() + i * C;
      const bool kl = settings.kd_weight > 0;
      const bool ce = settings.kd_weight < 1 && labels[i] != kNoLabel;
      if (!ce && !kl) {
        std::fill(g, g + C, S(0));
        continue;
      }
      const S* s_row = student.const_data_ptr<S>() + i * student.stride(0);
      const float* s = upcast(s_row, mine + 3 * padded, C);
      const float* t = nullptr;
      if (kl) {
        const T* t_row = teacher->const_data_ptr<T>() + i * teacher->stride(0);
        t = upcast(t_row, mine + 4 * padded, C);
      }
      losses[i] = !kl ? row<true, false>(s, t, labels[i], C, settings, e1, e, u, g)
          : ce        ? row<true, true>(s, t, labels[i], C, settings, e1, e, u, g)
                      : row<false, true>(s, t, kNoLabel, C, settings, e1, e, u, g);
    }
  });

  double sum = 0;  // in order, so the result is the same for any number of threads
  for (double loss : losses) sum += loss;
  return sum;
}

// Returns the loss in fp32 and gradient_scale · ∂loss/∂student in the student's precision.
// kd/fast/fused_loss.py has checked shapes and dtypes, and classes are contiguous within a row.
std::tuple<at::Tensor, at::Tensor> loss_and_grad(
    const at::Tensor& student, const std::optional<at::Tensor>& teacher, const at::Tensor& labels_,
    double temperature, double kd_weight, double gradient_scale) {
  const int64_t B = student.size(0), C = student.size(1);
  const at::Tensor labels = labels_.contiguous();
  const int64_t* y = labels.const_data_ptr<int64_t>();
  if (kd_weight < 1)  // at 1 no label is read
    for (int64_t i = 0; i < B; ++i)
      TORCH_CHECK_VALUE(y[i] == kNoLabel || (y[i] >= 0 && y[i] < C), "labels must be in [0, ", C,
                        ") or ", kNoLabel, ", got ", y[i]);

  const double n = static_cast<double>(std::max<int64_t>(B, 1));
  const Settings settings{temperature, kd_weight, gradient_scale / n};
  at::Tensor grad = at::empty_like(student, at::MemoryFormat::Contiguous);
  const at::ScalarType S = student.scalar_type();
  const at::ScalarType T = kd_weight > 0 ? teacher->scalar_type() : S;
  double sum = 0;
  const auto with_student = [&](auto s) {
    using St = decltype(s);
    sum = T == at::kFloat      ? rows<St, float>(student, teacher, y, settings, grad)
        : T == at::kBFloat16   ? rows<St, at::BFloat16>(student, teacher, y, settings, grad)
                               : rows<St, at::Half>(student, teacher, y, settings, grad);
  };
  if (S == at::kFloat) with_student(float{});
  else if (S == at::kBFloat16) with_student(at::BFloat16{});
  else with_student(at::Half{});

  at::Tensor loss = at::empty({}, at::kFloat);
  *loss.mutable_data_ptr<float>() = static_cast<float>(sum / n);
  return {loss, grad};
}

// grad *= factor. It costs nothing where the factor is 1, as it is without a gradient scaler.
void scale_(at::Tensor grad, const at::Tensor& factor) {
  const float f = *factor.const_data_ptr<float>();
  if (f != 1.f) grad.mul_(f);
}

}  // namespace

TORCH_LIBRARY_IMPL(kd, CPU, m) {  // declared in kd/fast/fused_loss.py
  m.impl("loss_and_grad", loss_and_grad);
  m.impl("scale_", scale_);
}
