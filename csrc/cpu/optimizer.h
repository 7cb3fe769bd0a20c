// The optimiser's two passes: the sum of squares that the clip needs, and AdamW + EMA + low-precision copy.
#pragma once

#include "elementwise.h"

namespace ST_ISA {
namespace {

constexpr int kDoubles = kWidth / 2;
typedef double VecDouble __attribute__((vector_size(8 * kDoubles)));

ST_INLINE VecDouble load_doubles(const float* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtps_pd(0xFF, _mm256_loadu_ps(p));
#elif defined(__AVX2__)
  return _mm256_cvtps_pd(_mm_loadu_ps(p));
#else
  VecDouble v;
  for (int i = 0; i < kDoubles; ++i) v[i] = p[i];
  return v;
#endif
}

// Sum of x^2 in double: a float's square is exact there, so the order of adding hardly matters.
double sum_of_squares(const void* data, DType dtype, int64_t count) {
  const Scratch scratch(1, kBlock);
  const Rows rows = {const_cast<void*>(data), dtype, 0, 1, 1};
  VecDouble acc[4] = {};
  double rest = 0;
  for (int64_t at = 0; at < count; at += kBlock) {
    const int64_t n = at + kBlock < count ? kBlock : count - at;
    const float* x = read_row(rows, 0, at, n, scratch.row(0));
    int64_t i = 0;
    for (; i + 4 * kDoubles <= n; i += 4 * kDoubles) {
      for (int k = 0; k < 4; ++k) {
        const VecDouble v = load_doubles(x + i + k * kDoubles);
        acc[k] += v * v;
      }
    }
    for (; i < n; ++i) rest += static_cast<double>(x[i]) * x[i];
  }
  const VecDouble all = (acc[0] + acc[1]) + (acc[2] + acc[3]);
  for (int i = 0; i < kDoubles; ++i) rest += all[i];
  return rest;
}

// The order of operations is torch.optim.AdamW's; every element sees the same ones wherever it lies in its block.
template <bool EMA>
ST_INLINE void adamw_block(const AdamW& c, float* param, float* exp_avg, float* exp_avg_sq, float* ema,
                           const float* grad, int64_t count) {
  sweep(count, [&](int64_t i, auto lanes, auto) ST_LAMBDA {
    const Vec g = load(grad + i, lanes) * c.clip;
    Vec m = load(exp_avg + i, lanes), v = load(exp_avg_sq + i, lanes), p = load(param + i, lanes) * c.decay;
    m += c.one_minus_beta1 * (g - m);
    v = v * c.beta2 + c.one_minus_beta2 * g * g;
    p -= c.step_size * m / (square_root(v) / c.bias2_sqrt + c.eps);
    store(exp_avg + i, m, lanes);
    store(exp_avg_sq + i, v, lanes);
    store(param + i, p, lanes);
    if (EMA) {
      const Vec e = load(ema + i, lanes);
      store(ema + i, e + c.ema_weight * (p - e), lanes);
    }
  });
}

void adamw_ema(const AdamW& c, const ParamBlock& p) {
  const Scratch scratch(1, kBlock);
  const Rows grads = {const_cast<void*>(p.grad), p.grad_dtype, 0, 1, 1}, copies = {p.copy, p.copy_dtype, 0, 1, 1};
  for (int64_t at = 0; at < p.count; at += kBlock) {
    const int64_t n = at + kBlock < p.count ? kBlock : p.count - at;
    const float* grad = read_row(grads, 0, at, n, scratch.row(0));
    if (p.ema) adamw_block<true>(c, p.param + at, p.exp_avg + at, p.exp_avg_sq + at, p.ema + at, grad, n);
    else adamw_block<false>(c, p.param + at, p.exp_avg + at, p.exp_avg_sq + at, nullptr, grad, n);
    if (p.copy) commit_row(copies, 0, at, n, p.param + at);
  }
}

}  // namespace
}  // namespace ST_ISA
