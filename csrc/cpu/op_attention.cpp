// st_fast::attention and attention_backward on the CPU.
#include "tensors.h"

#include <cmath>

namespace st_fast {
namespace {

constexpr int64_t kMultiple = 32;  // of tokens and of head_dim

Attention sizes_of(const Tensor& qkv) {
  check(qkv.dim() == 5 && qkv.size(2) == 3, "qkv: expected (B, N, 3, H, d), got ", qkv.dim(), " dimensions");
  check(is_float32(qkv) && qkv.is_contiguous(), "qkv: must be contiguous float32");
  Attention p = {};
  p.B = qkv.size(0);
  p.N = qkv.size(1);
  p.H = qkv.size(3);
  p.d = qkv.size(4);
  check(p.N % kMultiple == 0 && p.d % kMultiple == 0, "qkv: ", p.N, " tokens of head size ", p.d, ", both must be ",
        "multiples of ", kMultiple);
  p.scale = 1.0f / std::sqrt(static_cast<float>(p.d));
  p.qkv = floats(qkv);
  return p;
}

float* matching(const Attention& p, const Tensor& t, const char* name) {
  expect_shape(t, name, {p.B, p.N, p.H, p.d});
  check(is_float32(t) && t.is_contiguous(), name, ": must be contiguous float32");
  return floats(t);
}

std::tuple<Tensor, Tensor> attention(const Tensor& qkv) {
  Attention p = sizes_of(qkv);
  Tensor out = empty({p.B, p.N, p.H, p.d}, aoti_torch_dtype_float32());
  Tensor lse = empty({p.B, p.H, p.N}, aoti_torch_dtype_float32());
  p.out = floats(out);
  p.lse = floats(lse);
  run(kernels().attention, p, p.B * p.H, p.N * p.N);
  return {out, lse};
}

Tensor attention_backward(const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& lse) {
  Attention p = sizes_of(qkv);
  const Tensor packed = dout.is_contiguous() ? dout : torch::stable::contiguous(dout);
  Tensor dqkv = empty({p.B, p.N, 3, p.H, p.d}, aoti_torch_dtype_float32());
  p.dout = matching(p, packed, "dout");
  p.out = matching(p, out, "out");
  expect_shape(lse, "lse", {p.B, p.H, p.N});
  check(is_float32(lse) && lse.is_contiguous(), "lse: must be contiguous float32");
  p.lse = floats(lse);
  p.dqkv = floats(dqkv);
  run(kernels().attention_backward, p, p.B * p.H, p.N * p.N);
  return dqkv;
}

}  // namespace

ST_LIBRARY(CPU, m) {
  ST_IMPL(m, attention);
  ST_IMPL(m, attention_backward);
}

}  // namespace st_fast
