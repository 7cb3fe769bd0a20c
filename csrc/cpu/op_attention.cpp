// st_fast::attention and attention_heads, and their backward passes, on the CPU.
#include "tensors.h"

#include <cmath>

namespace st_fast {
namespace {

constexpr int64_t kMultiple = 32;  // of head_dim

Attention sized(const char* name, int64_t B, int64_t N, int64_t H, int64_t d) {
  check(d % kMultiple == 0, name, ": head size ", d, ", must be a multiple of ", kMultiple);
  Attention p = {};
  p.B = B;
  p.N = N;
  p.H = H;
  p.d = d;
  p.scale = 1.0f / std::sqrt(static_cast<float>(d));
  return p;
}

Attention packed(const Tensor& qkv) {
  check(qkv.dim() == 5 && qkv.size(2) == 3, "qkv: expected (B, N, 3, H, d), got ", qkv.dim(), " dimensions");
  Attention p = sized("qkv", qkv.size(0), qkv.size(1), qkv.size(3), qkv.size(4));
  check(is_float32(qkv) && qkv.is_contiguous(), "qkv: must be contiguous float32");
  for (int part = 0; part < 3; ++part) p.in[part] = part_of(qkv, part, "qkv");
  return p;
}

// q, k and v where they lie; a copy of one whose channels are not contiguous is held here.
struct Separate {
  Tensor held[3];
  Attention p;

  Separate(const Tensor& q, const Tensor& k, const Tensor& v) : held{q, k, v} {
    check(q.dim() == 4, "q: expected (B, H, N, d), got ", q.dim(), " dimensions");
    p = sized("q", q.size(0), q.size(2), q.size(1), q.size(3));
    const char* names[3] = {"q", "k", "v"};
    for (int part = 0; part < 3; ++part) {
      check(is_float32(held[part]), names[part], ": must be float32");
      expect_shape(held[part], names[part], {p.B, p.H, p.N, p.d});
      if (held[part].strides()[3] != 1) held[part] = torch::stable::contiguous(held[part]);
      p.in[part] = heads_of(held[part], names[part], {p.B, p.H, p.N, p.d});
    }
  }
};

float* matching(const Attention& p, const Tensor& t, const char* name) {
  expect_shape(t, name, {p.B, p.N, p.H, p.d});
  check(is_float32(t) && t.is_contiguous(), name, ": must be contiguous float32");
  return floats(t);
}

std::tuple<Tensor, Tensor> forward(Attention& p) {
  Tensor out = empty({p.B, p.N, p.H, p.d}, aoti_torch_dtype_float32());
  Tensor lse = empty({p.B, p.H, p.N}, aoti_torch_dtype_float32());
  p.out = floats(out);
  p.lse = floats(lse);
  run(kernels().attention, p, p.B * p.H, p.N * p.N);
  return {out, lse};
}

// Writes the gradients that p.grads points to.
void backward(Attention& p, const Tensor& dout, const Tensor& out, const Tensor& lse) {
  const Tensor packed = dout.is_contiguous() ? dout : torch::stable::contiguous(dout);
  p.dout = matching(p, packed, "dout");
  p.out = matching(p, out, "out");
  expect_shape(lse, "lse", {p.B, p.H, p.N});
  check(is_float32(lse) && lse.is_contiguous(), "lse: must be contiguous float32");
  p.lse = floats(lse);
  run(kernels().attention_backward, p, p.B * p.H, p.N * p.N);
}

std::tuple<Tensor, Tensor> attention(const Tensor& qkv) {
  Attention p = packed(qkv);
  return forward(p);
}

Tensor attention_backward(const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& lse) {
  Attention p = packed(qkv);
  Tensor dqkv = empty({p.B, p.N, 3, p.H, p.d}, aoti_torch_dtype_float32());
  for (int part = 0; part < 3; ++part) p.grads[part] = part_of(dqkv, part, "dqkv");
  backward(p, dout, out, lse);
  return dqkv;
}

std::tuple<Tensor, Tensor> attention_heads(const Tensor& q, const Tensor& k, const Tensor& v) {
  Separate heads(q, k, v);
  return forward(heads.p);
}

std::tuple<Tensor, Tensor, Tensor> attention_heads_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                            const Tensor& v, const Tensor& out, const Tensor& lse) {
  Separate heads(q, k, v);
  Attention& p = heads.p;
  Tensor grads[3];
  for (int part = 0; part < 3; ++part) {
    grads[part] = empty_token_major(p.B, p.H, p.N, p.d, aoti_torch_dtype_float32());
    p.grads[part] = heads_of(grads[part], "gradient", {p.B, p.H, p.N, p.d});
  }
  backward(p, dout, out, lse);
  return {grads[0], grads[1], grads[2]};
}

}  // namespace

ST_LIBRARY(CPU, m) {
  ST_IMPL(m, attention);
  ST_IMPL(m, attention_backward);
  ST_IMPL(m, attention_heads);
  ST_IMPL(m, attention_heads_backward);
}

}  // namespace st_fast
