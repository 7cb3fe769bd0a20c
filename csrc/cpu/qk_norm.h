// LayerNorm with affine over head_dim of q and k, read from the packed projection (arXiv 2302.05442).
#pragma once

#include "adaln.h"

namespace ST_ISA {
namespace {

ST_INLINE Rows at_head(const Heads& heads, int64_t h) {
  Rows rows = heads.rows;
  rows.data = static_cast<char*>(rows.data) + h * heads.head * (rows.dtype == DType::kFloat32 ? 4 : 2);
  return rows;
}

ST_INLINE void add_row(float* sums, const float* row, int64_t d) {
  sweep(d, [&](int64_t i, auto lanes, auto) ST_LAMBDA {
    store(sums + i, load(sums + i, lanes) + load(row + i, lanes), lanes);
  });
}

// Copies one row; adds it to `sums`, if there are any.
ST_INLINE void copy_head(const Rows& in, const Rows& out, int64_t b, int64_t n, int64_t d, float* sums,
                         float* scratch) {
  const float* from = read_row(in, b, n, d, scratch);
  if (sums != nullptr) add_row(sums, from, d);
  if (out.dtype != DType::kFloat32) return commit_row(out, b, n, d, from);
  const bool past_cache = out.past_cache;
  float* to = write_row(out, b, n, scratch);
  sweep(d, [&](int64_t i, auto lanes, auto) ST_LAMBDA { store(to + i, load(from + i, lanes), lanes, past_cache); });
}

ST_INLINE void norm_head(const QKNorm& p, int part, int64_t b, int64_t h, int64_t n, const float* weight,
                         const float* bias, float* s0, float* s1) {
  const Rows in = at_head(p.in[part], h), out = at_head(p.out[part], h);
  const float* x = read_row(in, b, n, p.d, s0);
  Vec acc[4] = {}, squares[4] = {};
  sweep(p.d, [&](int64_t i, auto lanes, auto slot) ST_LAMBDA { acc[slot.value] += load(x + i, lanes); });
  const float mean = total(acc) / static_cast<float>(p.d);
  sweep(p.d, [&](int64_t i, auto lanes, auto slot) ST_LAMBDA {
    const Vec centred = keep(load(x + i, lanes) - mean, lanes);
    squares[slot.value] += centred * centred;
  });
  const float rstd = 1.0f / __builtin_sqrtf(total(squares) / static_cast<float>(p.d) + p.eps);
  const int64_t heads = p.B * p.N * p.H, at = (b * p.N + n) * p.H + h;
  p.stats[2 * part * heads + at] = mean;
  p.stats[(2 * part + 1) * heads + at] = rstd;
  const bool past_cache = out.past_cache;
  float* y = write_row(out, b, n, s1);
  sweep(p.d, [&](int64_t i, auto lanes, auto) ST_LAMBDA {
    store(y + i, (load(x + i, lanes) - mean) * rstd * load(weight + i, lanes) + load(bias + i, lanes), lanes,
          past_cache);
  });
  commit_row(out, b, n, p.d, y);
}

void qk_norm(const QKNorm& p, int64_t begin, int64_t end) {
  const Scratch scratch(6, p.d);
  const float *weight[2], *bias[2];
  for (int part = 0; part < 2; ++part) {
    weight[part] = read_row(p.weight[part], 0, 0, p.d, scratch.row(2 + part));
    bias[part] = read_row(p.bias[part], 0, 0, p.d, scratch.row(4 + part));
  }
  for (int64_t task = begin; task < end; ++task) {
    const Task t = token_task(task, p.N);
    for (int64_t n = t.first; n < t.last; ++n) {
      for (int part = 0; part < 2; ++part)
        for (int64_t h = 0; h < p.H; ++h)
          norm_head(p, part, t.b, h, n, weight[part], bias[part], scratch.row(0), scratch.row(1));
    }
  }
  drain();
}

// Backward: in[] is dqkv's parts (written), out[] dq, dk, dv (read), x[] qkv's parts.
ST_INLINE void norm_head_backward(const QKNorm& p, int part, int64_t b, int64_t h, int64_t n, const float* weight,
                                  float* sums, float* dx_sum, const Scratch& scratch) {
  const float* dy = read_row(at_head(p.out[part], h), b, n, p.d, scratch.row(0));
  const float* x = read_row(at_head(p.x[part], h), b, n, p.d, scratch.row(1));
  const Rows to = at_head(p.in[part], h);
  const int64_t heads = p.B * p.N * p.H, at = (b * p.N + n) * p.H + h;
  const float mean = p.stats[2 * part * heads + at], rstd = p.stats[(2 * part + 1) * heads + at];
  float mean_g, mean_gx;
  norm_sums<false>(p.d, dy, x, weight, mean, rstd, {nullptr, sums + p.d, sums}, &mean_g, &mean_gx);
  const bool past_cache = to.past_cache;
  float* dx = write_row(to, b, n, scratch.row(2));
  sweep(p.d, [&](int64_t i, auto lanes, auto) ST_LAMBDA {
    const Vec hat = (load(x + i, lanes) - mean) * rstd;
    const Vec out = (load(dy + i, lanes) * load(weight + i, lanes) - mean_g - hat * mean_gx) * rstd;
    if (dx_sum != nullptr) store(dx_sum + i, load(dx_sum + i, lanes) + out, lanes);
    store(dx + i, out, lanes, past_cache);
  });
  commit_row(to, b, n, p.d, dx);
}

// Adds up the heads' sums (H, 4, d): one head's tokens first, then the heads, which keeps the rounding error small.
ST_INLINE void sum_heads(const float* of_heads, int64_t H, int64_t count, float* sums) {
  std::memset(sums, 0, sizeof(float) * count);
  for (int64_t h = 0; h < H; ++h) add_row(sums, of_heads + h * count, count);
}

void qk_norm_backward(const QKNorm& p, int64_t begin, int64_t end) {
  const Scratch scratch(5, p.d), heads(1, p.H * 4 * p.d);
  const float* weight[2];
  for (int part = 0; part < 2; ++part) weight[part] = read_row(p.weight[part], 0, 0, p.d, scratch.row(3 + part));
  for (int64_t task = begin; task < end; ++task) {
    const Task t = token_task(task, p.N);
    float *of_heads = heads.row(0), *sums = p.partial + task * p.sums * p.d;
    float* of_qkv = p.sums > 4 ? sums + 4 * p.d : nullptr;  // (3, H, d)
    std::memset(of_heads, 0, sizeof(float) * p.H * 4 * p.d);
    std::memset(sums, 0, sizeof(float) * p.sums * p.d);
    const auto of_part = [&](int part, int64_t h) { return of_qkv ? of_qkv + (part * p.H + h) * p.d : nullptr; };
    for (int64_t n = t.first; n < t.last; ++n) {
      for (int part = 0; part < 2; ++part)
        for (int64_t h = 0; h < p.H; ++h)
          norm_head_backward(p, part, t.b, h, n, weight[part], of_heads + (4 * h + 2 * part) * p.d, of_part(part, h),
                             scratch);
      for (int64_t h = 0; h < p.H; ++h)
        copy_head(at_head(p.out[2], h), at_head(p.in[2], h), t.b, n, p.d, of_part(2, h), scratch.row(0));
    }
    sum_heads(of_heads, p.H, 4 * p.d, sums);
  }
  drain();
}

}  // namespace
}  // namespace ST_ISA
