// Passes over whole tensors: the guided target alone, GELU in its tanh form and SwiGLU with their gradients.
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

// Calls f(row, at, count) on blocks of the rows of p.D elements that are tasks begin..end.
template <class F>
ST_INLINE void row_blocks(const Elementwise& p, int64_t begin, int64_t end, F&& f) {
  const int64_t rows = p.count / p.D, past = end * kTokensPerTask, last = past < rows ? past : rows;
  for (int64_t row = begin * kTokensPerTask; row < last; ++row)
    for (int64_t at = 0; at < p.D; at += kBlock) f(row, at, at + kBlock < p.D ? kBlock : p.D - at);
  drain();
}

constexpr float kFar = 87.0f;  // beyond +-87 silu(g) is g or 0 to the last bit; e^88 and more overflow

// silu(g) = g / (1 + e^-g) times the value; a row of h is D gates, then D values.
void swiglu(const Elementwise& p, int64_t begin, int64_t end) {
  const Scratch scratch(3, kBlock);
  const bool past_cache = p.out.past_cache;
  row_blocks(p, begin, end, [&](int64_t row, int64_t at, int64_t count) ST_LAMBDA {
    const float* gate = read_row(p.in[0], 0, 2 * row * p.D + at, count, scratch.row(0));
    const float* value = read_row(p.in[0], 0, (2 * row + 1) * p.D + at, count, scratch.row(1));
    float* out = write_row(p.out, 0, row * p.D + at, scratch.row(2));
    sweep(count, [&](int64_t i, auto lanes, auto) ST_LAMBDA {
      const Vec g = load(gate + i, lanes), silu = g / (1.0f + exponential(-g));
      store(out + i, (g < -kFar ? g * 0.0f : silu) * load(value + i, lanes), lanes, past_cache);
    });
    commit_row(p.out, 0, row * p.D + at, count, out);
  });
}

ST_INLINE Vec within_far(Vec g) {
  g = g > kFar ? splat(kFar) : g;
  return g < -kFar ? splat(-kFar) : g;
}

// d value = dy silu(g), d gate = dy value silu'(g), silu'(g) = s + g s (1 - s) with s = 1 / (1 + e^-g).
template <bool SUMS>
void swiglu_backward(const Elementwise& p, int64_t begin, int64_t end) {
  const Scratch scratch(5, kBlock);
  const bool past_cache = p.out.past_cache;
  row_blocks(p, begin, end, [&](int64_t row, int64_t at, int64_t count) ST_LAMBDA {
    const int64_t first = 2 * row * p.D + at, second = first + p.D;
    const float* gate = read_row(p.in[0], 0, first, count, scratch.row(0));
    const float* value = read_row(p.in[0], 0, second, count, scratch.row(1));
    const float* dy = read_row(p.in[1], 0, row * p.D + at, count, scratch.row(2));
    float* dgate = write_row(p.out, 0, first, scratch.row(3));
    float* dvalue = write_row(p.out, 0, second, scratch.row(4));
    float* sum = SUMS ? p.bias_partial + 2 * (row / kTokensPerTask) * p.D + at : nullptr;
    const bool fresh = row % kTokensPerTask == 0;
    sweep(count, [&](int64_t i, auto lanes, auto) ST_LAMBDA {
      const Vec g = load(gate + i, lanes), d = load(dy + i, lanes);
      const Vec v = within_far(g), e = exponential(-v), s = 1.0f / (1.0f + e);
      const Vec of_value = d * (g < -kFar ? g * 0.0f : g * s);
      const Vec of_gate = d * load(value + i, lanes) * (s + v * (e * s) * s);  // e s = 1 - s
      store(dgate + i, of_gate, lanes, past_cache);
      store(dvalue + i, of_value, lanes, past_cache);
      if constexpr (SUMS) {
        store(sum + i, fresh ? of_gate : load(sum + i, lanes) + of_gate, lanes);
        store(sum + p.D + i, fresh ? of_value : load(sum + p.D + i, lanes) + of_value, lanes);
      }
    });
    commit_row(p.out, 0, first, count, dgate);
    commit_row(p.out, 0, second, count, dvalue);
  });
}

}  // namespace
}  // namespace ST_ISA
