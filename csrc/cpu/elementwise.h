// Passes over whole tensors: the guided target alone, and GELU in its tanh form with its gradient.
#pragma once

#include "rows.h"

namespace ST_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // elements converted at a time: stays in the first-level cache

// Runs f(in0, in1, out, count) on blocks of the tasks begin..end; in1 is only read when `INPUTS` is 2.
template <int INPUTS, class F>
ST_INLINE void blocks(const Elementwise& p, int64_t begin, int64_t end, F&& f) {
  const Scratch scratch(3, kBlock);
  const int64_t last = end * kElementsPerTask < p.count ? end * kElementsPerTask : p.count;
  for (int64_t at = begin * kElementsPerTask; at < last; at += kBlock) {
    const int64_t count = at + kBlock < last ? kBlock : last - at;
    const float* first = read_row(p.in[0], 0, at, count, scratch.row(0));
    const float* second = INPUTS == 2 ? read_row(p.in[1], 0, at, count, scratch.row(1)) : nullptr;
    float* out = write_row(p.out, 0, at, scratch.row(2));
    f(first, second, out, count);
    commit_row(p.out, 0, at, count, out);
  }
  drain();
}

void cfg_extrapolate(const Elementwise& p, int64_t begin, int64_t end) {
  const bool past_cache = p.out.past_cache;
  blocks<2>(p, begin, end, [&](const float* cond, const float* null, float* out, int64_t count) ST_LAMBDA {
    sweep(count, [&](int64_t i, auto lanes, auto) ST_LAMBDA {
      const Vec base = load(null + i, lanes);
      store(out + i, base + p.scalar * (load(cond + i, lanes) - base), lanes, past_cache);
    });
  });
}

constexpr float kTwoRootTwoOverPi = 1.5957691216057308f;
constexpr float kCubic = 0.044715f;

// (1 + tanh u) / 2 = 1 / (1 + e^-2u) with u = sqrt(2/pi) (x + 0.044715 x^3): no cancellation where tanh nears -1.
ST_INLINE Vec gelu_exponent(Vec x) {
  return x * (-kTwoRootTwoOverPi - (kTwoRootTwoOverPi * kCubic) * x * x);
}

void gelu_tanh(const Elementwise& p, int64_t begin, int64_t end) {
  const bool past_cache = p.out.past_cache;
  blocks<1>(p, begin, end, [&](const float* x, const float*, float* out, int64_t count) ST_LAMBDA {
    sweep(count, [&](int64_t i, auto lanes, auto) ST_LAMBDA {
      const Vec v = load(x + i, lanes), exponent = gelu_exponent(v);
      const Vec gated = v / (1.0f + exponential(exponent));
      store(out + i, exponent > 87.0f ? v * 0.0f : gated, lanes, past_cache);
    });
  });
}

// Beyond +-30 the slope is 1 or 0 to the last bit; the bound keeps x^3 finite there.
ST_INLINE Vec within_thirty(Vec v) {
  v = v > 30.0f ? splat(30.0f) : v;
  return v < -30.0f ? splat(-30.0f) : v;
}

ST_INLINE Vec gelu_slope(Vec x) {
  const Vec v = within_thirty(x), e = exponential(gelu_exponent(v)), s = 1.0f / (1.0f + e);
  const Vec slope = v * (kTwoRootTwoOverPi + (3.0f * kTwoRootTwoOverPi * kCubic) * v * v);
  return s + slope * (e * s * s);  // e s = 1 - s
}

void gelu_tanh_backward(const Elementwise& p, int64_t begin, int64_t end) {
  const bool past_cache = p.out.past_cache;
  blocks<2>(p, begin, end, [&](const float* dy, const float* x, float* out, int64_t count) ST_LAMBDA {
    sweep(count, [&](int64_t i, auto lanes, auto) ST_LAMBDA {
      store(out + i, load(dy + i, lanes) * gelu_slope(load(x + i, lanes)), lanes, past_cache);
    });
  });
}

void gelu_tanh_bias_backward(const Elementwise& p, int64_t begin, int64_t end) {
  const Scratch scratch(3, p.D);
  const bool past_cache = p.out.past_cache;
  for (int64_t task = begin; task < end; ++task) {
    float* sum = p.bias_partial + task * p.D;
    std::memset(sum, 0, sizeof(float) * p.D);
    const int64_t rows = p.count / p.D, past = (task + 1) * kTokensPerTask, last = past < rows ? past : rows;
    for (int64_t row = task * kTokensPerTask; row < last; ++row) {
      const float* dy = read_row(p.in[0], 0, row * p.D, p.D, scratch.row(0));
      const float* x = read_row(p.in[1], 0, row * p.D, p.D, scratch.row(1));
      float* out = write_row(p.out, 0, row * p.D, scratch.row(2));
      sweep(p.D, [&](int64_t i, auto lanes, auto) ST_LAMBDA {
        const Vec dx = load(dy + i, lanes) * gelu_slope(load(x + i, lanes));
        store(out + i, dx, lanes, past_cache);
        store(sum + i, load(sum + i, lanes) + dx, lanes);
      });
      commit_row(p.out, 0, row * p.D, p.D, out);
    }
  }
  drain();
}

}  // namespace
}  // namespace ST_ISA
