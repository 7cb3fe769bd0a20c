// LayerNorm or RMSNorm + adaLN modulation and the gated residual, forward and backward (DiT, arXiv 2212.09748).
#pragma once

#include "rows.h"

namespace ST_ISA {
namespace {

ST_INLINE void one_plus(const float* scale, float* to, int64_t D) {
  sweep(D, [&](int64_t i, auto lanes, auto) ST_LAMBDA { store(to + i, load(scale + i, lanes) + 1.0f, lanes); });
}

// The vectors of the tokens at hand, each read once for all of them; w = 1 + scale.
struct Modulation {
  const float *gate, *shift, *w;
  int64_t b = -1, run = -1;
};

// Those of run `run`, or of token `run` where every token has its own. `rows`: four for the converted ones and for w.
template <bool GATED, bool NORM, bool SHIFT>
ST_INLINE void read_modulation(const AdaLN& p, int64_t b, int64_t run, const Scratch& scratch, int64_t rows,
                               Modulation* m) {
  if (m->b == b && m->run == run) return;
  if (GATED) m->gate = read_row(p.gate, b, run, p.D, scratch.row(rows));
  if (SHIFT) m->shift = read_row(p.shift, b, run, p.D, scratch.row(rows + 1));
  if (NORM) {
    one_plus(read_row(p.scale, b, run, p.D, scratch.row(rows + 2)), scratch.row(rows + 3), p.D);
    m->w = scratch.row(rows + 3);
  }
  m->b = b;
  m->run = run;
}

// x_out = x + gate * a, returned as it is stored (a 16-bit type rounds it), since the statistics are taken of that.
ST_INLINE const float* add_gated(const AdaLN& p, int64_t b, int64_t n, const float* gate, float* s0, float* s1,
                                 float* s2) {
  const float* x = read_row(p.x, b, n, p.D, s0);
  const float* a = read_row(p.a, b, n, p.D, s1);
  const bool past_cache = p.x_out.past_cache;
  float* out = write_row(p.x_out, b, n, s2);
  float* kept = past_cache ? s2 : out;
  sweep(p.D, [&](int64_t i, auto lanes, auto) ST_LAMBDA {
    const Vec sum = load(x + i, lanes) + load(gate + i, lanes) * load(a + i, lanes);
    store(kept + i, sum, lanes);
    if (past_cache) store(out + i, sum, lanes, true);
  });
  commit_row(p.x_out, b, n, p.D, out);
  return p.x_out.dtype == DType::kFloat32 ? kept : read_row(p.x_out, b, n, p.D, s2);
}

ST_INLINE void normalise(const AdaLN& p, int64_t b, int64_t n, const float* x, const float* w, const float* shift,
                         float* scratch) {
  float mean = 0;  // RMSNorm's arithmetic is LayerNorm's of rows whose mean is 0
  if (p.mean) {
    Vec acc[4] = {};
    sweep(p.D, [&](int64_t i, auto lanes, auto slot) ST_LAMBDA { acc[slot.value] += load(x + i, lanes); });
    mean = p.mean[b * p.N + n] = total(acc) / static_cast<float>(p.D);
  }
  Vec squares[4] = {};
  sweep(p.D, [&](int64_t i, auto lanes, auto slot) ST_LAMBDA {
    const Vec centred = keep(load(x + i, lanes) - mean, lanes);
    squares[slot.value] += centred * centred;
  });
  const float rstd = 1.0f / __builtin_sqrtf(total(squares) / static_cast<float>(p.D) + p.eps);
  p.rstd[b * p.N + n] = rstd;
  const bool past_cache = p.y.past_cache;
  float* y = write_row(p.y, b, n, scratch);
  sweep(p.D, [&](int64_t i, auto lanes, auto) ST_LAMBDA {
    const Vec hat = (load(x + i, lanes) - mean) * rstd;
    store(y + i, hat * load(w + i, lanes) + load(shift + i, lanes), lanes, past_cache);
  });
  commit_row(p.y, b, n, p.D, y);
}

template <bool GATED, bool NORM>
void adaln_forward(const AdaLN& p, int64_t begin, int64_t end) {
  const Scratch scratch(7, p.D);
  float *s0 = scratch.row(0), *s1 = scratch.row(1), *s2 = scratch.row(2);
  Modulation m = {};
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.chunks;
    const Chunk& t = p.chunk[task % p.chunks];
    for (int64_t n = t.first; n < t.last; ++n) {
      read_modulation<GATED, NORM, NORM>(p, b, p.per_token ? n : t.run, scratch, 3, &m);
      const float* x = GATED ? add_gated(p, b, n, m.gate, s0, s1, s2) : read_row(p.x, b, n, p.D, s0);
      if (NORM) normalise(p, b, n, x, m.w, m.shift, s1);
    }
  }
  drain();
}

// Rows of a modulation's gradients: sums over the tokens of a task, or, TOKENS, those of one token.
struct Sums {
  float *gate, *shift, *scale;
  bool past_cache;
};

template <bool TOKENS, class Lanes>
ST_INLINE void add(float* sum, Vec value, int64_t i, const Sums& sums, Lanes lanes) {
  if (TOKENS) store(sum + i, value, lanes, sums.past_cache);
  else store(sum + i, load(sum + i, lanes) + value, lanes);
}

// The two means that the norm's backward needs, of g = dy * (1 + scale) and of g * x_hat; adds dshift and dscale.
template <bool TOKENS>
ST_INLINE void norm_sums(int64_t D, const float* dy, const float* x, const float* w, float mean, float rstd,
                         const Sums& sums, float* mean_g, float* mean_gx) {
  Vec acc_g[4] = {}, acc_gx[4] = {};
  sweep(D, [&](int64_t i, auto lanes, auto slot) ST_LAMBDA {
    const Vec d = load(dy + i, lanes);
    const Vec hat = keep((load(x + i, lanes) - mean) * rstd, lanes);
    const Vec g = d * load(w + i, lanes);
    acc_g[slot.value] += g;
    acc_gx[slot.value] += g * hat;
    add<TOKENS>(sums.shift, d, i, sums, lanes);
    add<TOKENS>(sums.scale, d * hat, i, sums, lanes);
  });
  *mean_g = total(acc_g) / static_cast<float>(D);
  *mean_gx = total(acc_gx) / static_cast<float>(D);
}

// TOKENS: every token has vectors of its own, whose gradients are no sums.
template <bool GATED, bool NORM, bool TOKENS, bool BIAS = false>
void adaln_backward(const AdaLN& p, int64_t begin, int64_t end) {
  const Scratch scratch(13, p.D);
  const bool dx_past = p.dx.past_cache, da_past = p.da.past_cache;
  Modulation m = {};
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / p.chunks;
    const Chunk& t = p.chunk[task % p.chunks];
    float* sums_at = TOKENS ? nullptr : p.partial + task * p.sums * p.D;
    if (!TOKENS) std::memset(sums_at, 0, sizeof(float) * p.sums * p.D);
    float* bias = BIAS ? p.bias_partial + task * p.D : nullptr;
    if (BIAS) std::memset(bias, 0, sizeof(float) * p.D);
    for (int64_t n = t.first; n < t.last; ++n) {
      read_modulation<GATED, NORM, false>(p, b, TOKENS ? n : t.run, scratch, 6, &m);
      if (TOKENS) sums_at = write_row(p.dmod, b, n, scratch.row(10));  // rows of D side by side
      const Sums sums = {sums_at, sums_at + (GATED ? p.D : 0), sums_at + (GATED ? 2 : 1) * p.D, p.dmod.past_cache};
      const float *gate = m.gate, *w = m.w;
      const float *dy = nullptr, *x = nullptr, *dx_out = nullptr, *a = nullptr;
      float *dx = nullptr, *da = nullptr, mean = 0, rstd = 0, mean_g = 0, mean_gx = 0;
      if (NORM) {
        dy = read_row(p.dy, b, n, p.D, scratch.row(0));
        x = read_row(p.x_out, b, n, p.D, scratch.row(1));
        mean = p.mean ? p.mean[b * p.N + n] : 0;
        rstd = p.rstd[b * p.N + n];
        dx = write_row(p.dx, b, n, scratch.row(2));
        norm_sums<TOKENS>(p.D, dy, x, w, mean, rstd, sums, &mean_g, &mean_gx);
        if (!p.mean) mean_g = 0;  // nothing was subtracted that has a gradient
      }
      if (GATED) {
        dx_out = read_row(p.dx_out, b, n, p.D, scratch.row(3));
        a = read_row(p.a, b, n, p.D, scratch.row(4));
        da = write_row(p.da, b, n, scratch.row(5));
      }
      sweep(p.D, [&](int64_t i, auto lanes, auto) ST_LAMBDA {
        Vec d = {};
        if (NORM) {
          const Vec hat = (load(x + i, lanes) - mean) * rstd;
          d = (load(dy + i, lanes) * load(w + i, lanes) - mean_g - hat * mean_gx) * rstd;
        }
        if (GATED) d += load(dx_out + i, lanes);
        if (NORM) store(dx + i, d, lanes, dx_past);
        if (GATED) {
          const Vec gated = d * load(gate + i, lanes);
          store(da + i, gated, lanes, da_past);
          if (BIAS) store(bias + i, load(bias + i, lanes) + gated, lanes);
          add<TOKENS>(sums.gate, d * load(a + i, lanes), i, sums, lanes);
        }
      });
      if (NORM) commit_row(p.dx, b, n, p.D, dx);
      if (GATED) commit_row(p.da, b, n, p.D, da);
      if (TOKENS) commit_row(p.dmod, b, n, p.sums * p.D, sums_at);
    }
  }
  drain();
}

// dmod[b, run, sum] = the partial sums of a run of sample b, added in the order of their tasks.
void sum_partials(const AdaLN& p, int64_t begin, int64_t end) {
  const Scratch scratch(1, p.D);
  const int64_t pitch = p.sums * p.D;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sum = task % p.sums, run = task / p.sums % p.runs, b = task / (p.sums * p.runs);
    const int64_t first = run ? p.chunk_end[run - 1] : 0, count = p.chunk_end[run] - first;
    const float* from = p.partial + (b * p.chunks + first) * pitch + sum * p.D;
    float* acc = scratch.row(0);
    std::memset(acc, 0, sizeof(float) * p.D);
    for (int64_t c = 0; c < count; ++c) {
      sweep(p.D, [&](int64_t i, auto lanes, auto) ST_LAMBDA {
        store(acc + i, load(acc + i, lanes) + load(from + c * pitch + i, lanes), lanes);
      });
    }
    Rows out = p.dmod;  // one row of D in the slab
    if (out.dtype == DType::kFloat32) std::memcpy(static_cast<float*>(out.data) + task * p.D, acc, 4 * p.D);
    else {
      out.data = static_cast<uint16_t*>(out.data) + task * p.D;
      commit_row(out, 0, 0, p.D, acc);
    }
  }
}

}  // namespace
}  // namespace ST_ISA
