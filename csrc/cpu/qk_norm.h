// LayerNorm or RMSNorm over head_dim of q and k (arXiv 2302.05442) and their rotation by position (RoPE, arXiv
// 2104.09864), read from the packed projection.
#pragma once

#include "rows.h"

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

// A token's rotation of its pairs of channels, the same for all heads of q and k: each angle's cosine twice, and its
// sine twice, first negated; d floats each. Without ROPE v stays as it is.
struct Rotation {
  const float *cos, *sin;

  template <bool ROPE, class Lanes>
  ST_INLINE Vec turn(Vec v, int64_t i, Lanes lanes) const {
    return ROPE ? v * load(cos + i, lanes) + swap_pairs(v) * load(sin + i, lanes) : v;
  }
  template <bool ROPE, class Lanes>
  ST_INLINE Vec turn_back(Vec v, int64_t i, Lanes lanes) const {
    return ROPE ? v * load(cos + i, lanes) - swap_pairs(v) * load(sin + i, lanes) : v;
  }
};

// Reads token n's row of the table; rows 0 and 1 of `scratch` hold it for all heads.
template <bool ROPE>
ST_INLINE Rotation rotation_of(const QKNorm& p, int64_t b, int64_t n, const Scratch& scratch) {
  if (!ROPE) return {};
  float *cos = scratch.row(0), *sin = scratch.row(1);
  const float* row = read_row(p.rope, b, n, p.d, scratch.row(2));
  const float* of_sin = row + p.d / 2;
  Vec sign;
  for (int lane = 0; lane < kWidth; ++lane) sign[lane] = lane % 2 ? 1.0f : -1.0f;
  int64_t i = 0;
  for (; i + kWidth <= p.d; i += kWidth) {
    store(cos + i, twice(row + i / 2), Full{});
    store(sin + i, twice(of_sin + i / 2) * sign, Full{});
  }
  for (; i < p.d; ++i) {
    cos[i] = row[i / 2];
    sin[i] = i % 2 ? of_sin[i / 2] : -of_sin[i / 2];
  }
  return {cos, sin};
}

// A vector (d,), or the number that stands for one that is absent.
ST_INLINE const float* vector_or(const Rows& vector, float otherwise, int64_t d, float* scratch) {
  if (vector.data != nullptr) return read_row(vector, 0, 0, d, scratch);
  for (int64_t i = 0; i < d; ++i) scratch[i] = otherwise;
  return scratch;
}

ST_INLINE float mean_square(const float* x, float mean, int64_t d) {
  Vec squares[4] = {};
  sweep(d, [&](int64_t i, auto lanes, auto slot) ST_LAMBDA {
    const Vec centred = keep(load(x + i, lanes) - mean, lanes);
    squares[slot.value] += centred * centred;
  });
  return total(squares) / static_cast<float>(d);
}

template <HeadNorm NORM, bool ROPE>
ST_INLINE void norm_head(const QKNorm& p, int part, int64_t b, int64_t h, int64_t n, const float* weight,
                         const float* bias, const Rotation& rotation, float* s0, float* s1) {
  const Rows in = at_head(p.in[part], h), out = at_head(p.out[part], h);
  const float* x = read_row(in, b, n, p.d, s0);
  const int64_t heads = p.B * p.N * p.H, at = (b * p.N + n) * p.H + h;
  float mean = 0.0f, rstd = 1.0f;
  if (NORM == HeadNorm::kLayer) {
    Vec acc[4] = {};
    sweep(p.d, [&](int64_t i, auto lanes, auto slot) ST_LAMBDA { acc[slot.value] += load(x + i, lanes); });
    mean = total(acc) / static_cast<float>(p.d);
    p.stats[2 * part * heads + at] = mean;
  }
  if (NORM != HeadNorm::kNone) {
    rstd = 1.0f / __builtin_sqrtf(mean_square(x, mean, p.d) + p.eps);
    p.stats[(NORM == HeadNorm::kLayer ? 2 * part + 1 : part) * heads + at] = rstd;
  }
  const bool past_cache = out.past_cache;
  float* y = write_row(out, b, n, s1);
  sweep(p.d, [&](int64_t i, auto lanes, auto) ST_LAMBDA {
    Vec v = load(x + i, lanes);
    if (NORM == HeadNorm::kLayer) v = (v - mean) * rstd * load(weight + i, lanes) + load(bias + i, lanes);
    if (NORM == HeadNorm::kRms) v = v * rstd * load(weight + i, lanes);
    store(y + i, rotation.turn<ROPE>(v, i, lanes), lanes, past_cache);
  });
  commit_row(out, b, n, p.d, y);
}

template <HeadNorm NORM, bool ROPE>
void qk_norm(const QKNorm& p, int64_t begin, int64_t end) {
  const Scratch scratch(6, p.d), table(3, p.d);
  const float *weight[2], *bias[2];
  for (int part = 0; part < 2; ++part) {
    weight[part] = vector_or(p.weight[part], 1.0f, p.d, scratch.row(2 + part));
    bias[part] = vector_or(p.bias[part], 0.0f, p.d, scratch.row(4 + part));
  }
  for (int64_t task = begin; task < end; ++task) {
    const Task t = token_task(task, p.N);
    for (int64_t n = t.first; n < t.last; ++n) {
      const Rotation rotation = rotation_of<ROPE>(p, t.b, n, table);
      for (int part = 0; part < 2; ++part)
        for (int64_t h = 0; h < p.H; ++h)
          norm_head<NORM, ROPE>(p, part, t.b, h, n, weight[part], bias[part], rotation, scratch.row(0),
                                scratch.row(1));
    }
  }
  drain();
}

// What the gradient of a norm over a row takes of it, and of g = dy * weight: the means of g and of g * x_hat.
struct HeadSums {
  float mean, rstd, mean_g, mean_gx;

  template <HeadNorm NORM, class Lanes>
  ST_INLINE Vec hat(const float* x, int64_t i, Lanes lanes) const {
    return (NORM == HeadNorm::kLayer ? load(x + i, lanes) - mean : load(x + i, lanes)) * rstd;
  }
};

// Adds a row's share of the weight's gradient at `sums` and, of LayerNorm, of the bias's behind it. With ROPE the row g,
// of dy turned back, is kept in `g_row`.
template <HeadNorm NORM, bool ROPE>
ST_INLINE void head_sums(int64_t d, const float* dy, const float* x, const float* weight, const Rotation& rotation,
                         float* sums, float* g_row, HeadSums* m) {
  Vec acc_g[4] = {}, acc_gx[4] = {};
  sweep(d, [&](int64_t i, auto lanes, auto slot) ST_LAMBDA {
    const Vec dh = rotation.turn_back<ROPE>(load(dy + i, lanes), i, lanes);
    const Vec hat = keep(m->hat<NORM>(x, i, lanes), lanes);
    const Vec g = dh * load(weight + i, lanes);
    if (ROPE) store(g_row + i, g, lanes);
    if (NORM == HeadNorm::kLayer) acc_g[slot.value] += g;
    acc_gx[slot.value] += g * hat;
    if (NORM == HeadNorm::kLayer) store(sums + d + i, load(sums + d + i, lanes) + dh, lanes);
    store(sums + i, load(sums + i, lanes) + dh * hat, lanes);
  });
  if (NORM == HeadNorm::kLayer) m->mean_g = total(acc_g) / static_cast<float>(d);
  m->mean_gx = total(acc_gx) / static_cast<float>(d);
}

// Backward: in[] is dqkv's parts (written), out[] dq, dk, dv (read), x[] qkv's parts.
template <HeadNorm NORM, bool ROPE>
ST_INLINE void norm_head_backward(const QKNorm& p, int part, int64_t b, int64_t h, int64_t n, const float* weight,
                                  float* sums, float* dx_sum, const Rotation& rotation, const Scratch& scratch) {
  const float* dy = read_row(at_head(p.out[part], h), b, n, p.d, scratch.row(0));
  const Rows to = at_head(p.in[part], h);
  const float *x = nullptr, *g = scratch.row(5);
  HeadSums m = {};
  if (NORM != HeadNorm::kNone) {
    x = read_row(at_head(p.x[part], h), b, n, p.d, scratch.row(1));
    const int64_t heads = p.B * p.N * p.H, at = (b * p.N + n) * p.H + h;
    if (NORM == HeadNorm::kLayer) m.mean = p.stats[2 * part * heads + at];
    m.rstd = p.stats[(NORM == HeadNorm::kLayer ? 2 * part + 1 : part) * heads + at];
    head_sums<NORM, ROPE>(p.d, dy, x, weight, rotation, sums, scratch.row(5), &m);
  }
  const bool past_cache = to.past_cache;
  float* dx = write_row(to, b, n, scratch.row(2));
  sweep(p.d, [&](int64_t i, auto lanes, auto) ST_LAMBDA {
    Vec out;
    if (NORM == HeadNorm::kNone) {
      out = rotation.turn_back<ROPE>(load(dy + i, lanes), i, lanes);
    } else {
      out = ROPE ? load(g + i, lanes) : load(dy + i, lanes) * load(weight + i, lanes);
      if (NORM == HeadNorm::kLayer) out = out - m.mean_g;
      out = (out - m.hat<NORM>(x, i, lanes) * m.mean_gx) * m.rstd;
    }
    if (dx_sum != nullptr) store(dx_sum + i, load(dx_sum + i, lanes) + out, lanes);
    store(dx + i, out, lanes, past_cache);
  });
  commit_row(to, b, n, p.d, dx);
}

// Adds up the heads' sums (H, count): one head's tokens first, then the heads, which keeps the rounding error small.
ST_INLINE void sum_heads(const float* of_heads, int64_t H, int64_t count, float* sums) {
  std::memset(sums, 0, sizeof(float) * count);
  for (int64_t h = 0; h < H; ++h) add_row(sums, of_heads + h * count, count);
}

template <HeadNorm NORM, bool ROPE>
void qk_norm_backward(const QKNorm& p, int64_t begin, int64_t end) {
  constexpr int64_t kVectors = NORM == HeadNorm::kLayer ? 4 : NORM == HeadNorm::kRms ? 2 : 0;  // if there are weights
  const Scratch scratch(6, p.d), table(3, p.d), heads(1, p.H * kVectors * p.d);
  const float* weight[2];
  for (int part = 0; part < 2; ++part) weight[part] = vector_or(p.weight[part], 1.0f, p.d, scratch.row(3 + part));
  for (int64_t task = begin; task < end; ++task) {
    const Task t = token_task(task, p.N);
    float *of_heads = heads.row(0), *sums = p.partial + task * p.sums * p.d;
    float* of_qkv = p.sums > p.affine ? sums + p.affine * p.d : nullptr;  // (3, H, d)
    std::memset(of_heads, 0, sizeof(float) * p.H * kVectors * p.d);
    std::memset(sums, 0, sizeof(float) * p.sums * p.d);
    const auto of_part = [&](int part, int64_t h) { return of_qkv ? of_qkv + (part * p.H + h) * p.d : nullptr; };
    for (int64_t n = t.first; n < t.last; ++n) {
      const Rotation rotation = rotation_of<ROPE>(p, t.b, n, table);
      for (int part = 0; part < 2; ++part)
        for (int64_t h = 0; h < p.H; ++h)
          norm_head_backward<NORM, ROPE>(p, part, t.b, h, n, weight[part],
                                         of_heads + (kVectors * h + kVectors / 2 * part) * p.d, of_part(part, h),
                                         rotation, scratch);
      for (int64_t h = 0; h < p.H; ++h)
        copy_head(at_head(p.out[2], h), at_head(p.in[2], h), t.b, n, p.d, of_part(2, h), scratch.row(0));
    }
    if (p.affine) sum_heads(of_heads, p.H, kVectors * p.d, sums);
  }
  drain();
}

}  // namespace
}  // namespace ST_ISA
