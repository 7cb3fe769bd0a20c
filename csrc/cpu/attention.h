// Self-attention on q, k and v where they lie, packed or each by itself, one head of one sample's group of tokens at a
// time: softmax over blocks of queries that stay in the caches, the probabilities recomputed in the backward pass
// (FlashAttention, arXiv 2205.14135).
#pragma once

#include "product.h"
#include "rows.h"

#include <cmath>

namespace ST_ISA {
namespace {

constexpr int64_t kQueries = 64;  // in a block

// What a task works on: one head of one group's N tokens, and where they begin in `out` and `lse`.
struct HeadTask {
  int64_t b, h, first, N, out, lse;

  ST_INLINE HeadTask(const Attention& p, int64_t task) {
    const TokenGroup group = p.group[task % p.groups];
    h = task / p.groups % p.H;
    b = task / p.groups / p.H;
    first = group.first;
    N = group.length;
    out = (b * p.N + first) * p.H * p.d + h * p.d;
    lse = (b * p.H + h) * p.N + first;
  }
};

// Its q, k, v or their gradients, (N, d) each; tokens are `ld` floats apart.
struct HeadParts {
  float* part[3];
  int64_t ld[3];
};

ST_INLINE HeadParts parts_of(const Heads* heads, const HeadTask& of) {
  HeadParts found = {};
  for (int i = 0; i < 3; ++i) {
    const Rows& rows = heads[i].rows;
    found.part[i] = static_cast<float*>(rows.data) + of.b * rows.batch + of.first * rows.token + of.h * heads[i].head;
    found.ld[i] = rows.token;
  }
  return found;
}

// Scores → e^(scale · (score − the row's largest)); returns the sum, and the row's largest scaled.
ST_INLINE float softmax_row(float* row, int64_t n, float scale, float* largest) {
  Vec most[4];
  for (Vec& m : most) m = splat(-INFINITY);
  sweep(n, [&](int64_t i, auto lanes, auto slot) ST_LAMBDA {
    const Vec v = load(row + i, lanes);
    most[slot.value] = v > most[slot.value] ? v : most[slot.value];
  });
  float top = -INFINITY;
  for (const Vec& m : most)
    for (int i = 0; i < kWidth; ++i) top = m[i] > top ? m[i] : top;
  *largest = top * scale;
  Vec acc[4] = {};
  sweep(n, [&](int64_t i, auto lanes, auto slot) ST_LAMBDA {
    const Vec e = exponential((load(row + i, lanes) - top) * scale);
    store(row + i, e, lanes);
    acc[slot.value] += e;
  });
  return total(acc);
}

void attention(const Attention& p, int64_t begin, int64_t end) {
  const int64_t d = p.d, out_ld = p.H * d, most = in_panels(p.longest);
  const Scratch scratch(2, most * d), scores(1, kQueries * most);
  float *keys = scratch.row(0), *values = scratch.row(1), *s = scores.row(0);
  for (int64_t task = begin; task < end; ++task) {
    const HeadTask of(p, task);
    const int64_t N = of.N, S = in_panels(N);  // a row of scores
    const HeadParts in = parts_of(p.in, of);
    float* out = p.out + of.out;
    into_panels_transposed(in.part[1], in.ld[1], N, d, keys);
    into_panels(in.part[2], in.ld[2], N, d, values);
    for (int64_t first = 0; first < N; first += kQueries) {
      const int64_t rows = first + kQueries < N ? kQueries : N - first;
      product<false>(rows, S / kPanel, d, in.part[0] + first * in.ld[0], in.ld[0], keys, d * kPanel, s, S, false);
      float inverse[kQueries];
      for (int64_t i = 0; i < rows; ++i) {
        float largest, *row = s + i * S;
        for (int64_t j = N; j < S; ++j) row[j] = -INFINITY;  // no keys: e^-87 of the largest at most
        const float sum = softmax_row(row, S, p.scale, &largest);
        inverse[i] = 1.0f / sum;
        p.lse[of.lse + first + i] = largest + std::log(sum);
      }
      float* to = out + first * out_ld;
      product<false>(rows, d / kPanel, N, s, S, values, N * kPanel, to, out_ld, false);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < d; c += kWidth)
          store(to + i * out_ld + c, load(to + i * out_ld + c, Full{}) * inverse[i], Full{});
    }
  }
}

// P = e^(scale · score − lse) in place of the scores, and dS = scale · P ∘ (dP − dO·O) in place of dP.
ST_INLINE void score_gradient_row(float* s, float* dp, int64_t n, float scale, float lse, float delta) {
  sweep(n, [&](int64_t i, auto lanes, auto) ST_LAMBDA {
    const Vec probability = exponential(load(s + i, lanes) * scale - lse);
    store(s + i, probability, lanes);
    store(dp + i, probability * (load(dp + i, lanes) - delta) * scale, lanes);
  });
}

ST_INLINE float dot(const float* a, const float* b, int64_t n) {
  Vec acc[4] = {};
  sweep(n, [&](int64_t i, auto lanes, auto slot) ST_LAMBDA {
    acc[slot.value] += load(a + i, lanes) * load(b + i, lanes);
  });
  return total(acc);
}

void attention_backward(const Attention& p, int64_t begin, int64_t end) {
  const int64_t d = p.d, out_ld = p.H * d, wide = d * kPanel, most = in_panels(p.longest);
  const Scratch panels(5, most * d), blocks(2, kQueries * most);
  float *keys_t = panels.row(0), *values_t = panels.row(1), *queries = panels.row(2), *keys = panels.row(3),
        *dout = panels.row(4), *s = blocks.row(0), *ds = blocks.row(1);
  for (int64_t task = begin; task < end; ++task) {
    const HeadTask of(p, task);
    const int64_t N = of.N, tall = N * kPanel, S = in_panels(N);
    const HeadParts in = parts_of(p.in, of), to = parts_of(p.grads, of);
    const float *out = p.out + of.out, *dy = p.dout + of.out;
    into_panels_transposed(in.part[1], in.ld[1], N, d, keys_t);
    into_panels_transposed(in.part[2], in.ld[2], N, d, values_t);
    into_panels(in.part[0], in.ld[0], N, d, queries);
    into_panels(in.part[1], in.ld[1], N, d, keys);
    into_panels(dy, out_ld, N, d, dout);
    for (int64_t first = 0; first < N; first += kQueries) {
      const int64_t rows = first + kQueries < N ? kQueries : N - first;
      const bool add = first > 0;
      product<false>(rows, S / kPanel, d, in.part[0] + first * in.ld[0], in.ld[0], keys_t, wide, s, S, false);
      product<false>(rows, S / kPanel, d, dy + first * out_ld, out_ld, values_t, wide, ds, S, false);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = (first + i) * out_ld;
        score_gradient_row(s + i * S, ds + i * S, N, p.scale, p.lse[of.lse + first + i],
                           dot(dy + at, out + at, d));
      }
      product<false>(rows, d / kPanel, N, ds, S, keys, tall, to.part[0] + first * to.ld[0], to.ld[0], false);
      product<true>(N, d / kPanel, rows, ds, S, queries + first * kPanel, tall, to.part[1], to.ld[1], add);
      product<true>(N, d / kPanel, rows, s, S, dout + first * kPanel, tall, to.part[2], to.ld[2], add);
    }
  }
}

}  // namespace
}  // namespace ST_ISA
