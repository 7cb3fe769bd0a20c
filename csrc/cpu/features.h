// Feature losses against a frozen target, with their gradient made in the forward pass, and the guided target itself:
// REPA (arXiv 2410.06940), Self-Transcendence (arXiv 2601.07773), classifier-free guidance (arXiv 2207.12598).
#pragma once

#include "rows.h"

namespace ST_ISA {
namespace {

constexpr float kSmallestSquare = 1e-12f;  // EPS_NORM squared

// The bound keeps NaN: a comparison with it is false.
ST_INLINE float bounded(float square) { return square < kSmallestSquare ? kSmallestSquare : square; }

struct Pair {
  const float *q, *cond, *null;
};

template <bool GUIDED, class Lanes>
ST_INLINE Vec target(const Pair& r, float cfg_scale, int64_t i, Lanes lanes) {
  const Vec cond = load(r.cond + i, lanes);
  if (!GUIDED) return cond;
  const Vec null = load(r.null + i, lanes);
  return null + cfg_scale * (cond - null);
}

// Squared error of one row; dq = share * (q - f * f_scale).
template <bool GUIDED>
ST_INLINE double squared_row(const Pair& r, float cfg_scale, float f_scale, float share, float* dq, int64_t D,
                             bool past_cache) {
  Vec acc[4] = {};
  sweep(D, [&](int64_t i, auto lanes, auto slot) ST_LAMBDA {
    const Vec rest = load(r.q + i, lanes) - target<GUIDED>(r, cfg_scale, i, lanes) * f_scale;
    acc[slot.value] += rest * rest;
    store(dq + i, rest * share, lanes, past_cache);
  });
  return total(acc);
}

template <bool GUIDED>
ST_INLINE float inverse_rms(const Pair& r, float cfg_scale, int64_t D) {
  Vec acc[4] = {};
  sweep(D, [&](int64_t i, auto lanes, auto slot) ST_LAMBDA {
    const Vec f = target<GUIDED>(r, cfg_scale, i, lanes);
    acc[slot.value] += f * f;
  });
  return 1.0f / __builtin_sqrtf(bounded(total(acc) / static_cast<float>(D)));
}

// -cos(q, f) of one row; dq = share times its gradient. A q shorter than the bound is divided by a constant.
template <bool GUIDED>
ST_INLINE double cosine_row(const Pair& r, float cfg_scale, float share, float* dq, int64_t D,
                            bool past_cache) {
  Vec acc_qq[4] = {}, acc_ff[4] = {}, acc_qf[4] = {};
  sweep(D, [&](int64_t i, auto lanes, auto slot) ST_LAMBDA {
    const Vec q = load(r.q + i, lanes), f = target<GUIDED>(r, cfg_scale, i, lanes);
    acc_qq[slot.value] += q * q;
    acc_ff[slot.value] += f * f;
    acc_qf[slot.value] += q * f;
  });
  const float qq = total(acc_qq), qf = total(acc_qf);
  const float inverse_q = 1.0f / __builtin_sqrtf(bounded(qq));
  const float inverse_f = 1.0f / __builtin_sqrtf(bounded(total(acc_ff)));
  const float cosine = qf * inverse_q * inverse_f;
  const float along_f = -share * inverse_q * inverse_f;
  const float along_q = qq < kSmallestSquare ? 0.0f : share * cosine * inverse_q * inverse_q;
  sweep(D, [&](int64_t i, auto lanes, auto) ST_LAMBDA {
    store(dq + i, load(r.q + i, lanes) * along_q + target<GUIDED>(r, cfg_scale, i, lanes) * along_f, lanes,
          past_cache);
  });
  return -static_cast<double>(cosine);
}

template <bool GUIDED>
ST_INLINE double feature_row(const Feature& p, const Pair& r, float weight, float* dq) {
  const float per_token = weight / static_cast<float>(p.N);
  const bool past_cache = p.dq.past_cache;
  if (p.loss == FeatureLoss::kCosine) return cosine_row<GUIDED>(r, p.cfg_scale, per_token, dq, p.D, past_cache);
  const float share = 2.0f * (per_token / static_cast<float>(p.D));
  const float f_scale = p.loss == FeatureLoss::kMse ? 1.0f : inverse_rms<GUIDED>(r, p.cfg_scale, p.D);
  return squared_row<GUIDED>(r, p.cfg_scale, f_scale, share, dq, p.D, past_cache) / static_cast<double>(p.D);
}

void feature_loss(const Feature& p, int64_t begin, int64_t end) {
  const Scratch scratch(4, p.D);
  for (int64_t task = begin; task < end; ++task) {
    const Task t = token_task(task, p.N);
    const int64_t m = p.sample_of[t.b];
    double sum = 0;
    for (int64_t n = t.first; n < t.last; ++n) {
      float* dq = write_row(p.dq, t.b, n, scratch.row(3));
      if (m < 0) {
        std::memset(dq, 0, sizeof(float) * p.D);
      } else {
        const Pair r = {read_row(p.q, t.b, n, p.D, scratch.row(0)), read_row(p.cond, m, n, p.D, scratch.row(1)),
                        p.null.data ? read_row(p.null, m, n, p.D, scratch.row(2)) : nullptr};
        sum += r.null ? feature_row<true>(p, r, p.weight[m], dq) : feature_row<false>(p, r, p.weight[m], dq);
      }
      commit_row(p.dq, t.b, n, p.D, dq);
    }
    p.partial[task] = m < 0 ? 0.0 : p.weight[m] * sum / static_cast<double>(p.N);
  }
  drain();
}

}  // namespace
}  // namespace ST_ISA
