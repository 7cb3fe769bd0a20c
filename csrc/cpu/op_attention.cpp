// st_fast::attention and attention_heads, and their backward passes, on the CPU.
#include "tensors.h"

#include <cmath>
#include <optional>

namespace st_fast {
namespace {

constexpr int64_t kMultiple = 32;  // of head_dim
using Lengths = std::optional<std::vector<int64_t>>;

// The arguments of a call, and the groups of its tokens, which they point to.
struct Call : Attention {
  Call(const char* name, int64_t B_, int64_t N_, int64_t H_, int64_t d_, const Lengths& lengths) : Attention() {
    check(d_ % kMultiple == 0, name, ": head size ", d_, ", must be a multiple of ", kMultiple);
    B = B_;
    N = N_;
    H = H_;
    d = d_;
    scale = 1.0f / std::sqrt(static_cast<float>(d));
    if (!lengths) cut.push_back({0, N});
    int64_t first = 0;
    for (size_t i = 0; lengths && i < lengths->size(); ++i) {
      const int64_t length = (*lengths)[i];
      check(length >= 1 && length <= N - first, "lengths[", i, "] = ", length, ": allowed are 1 to ", N - first);
      cut.push_back({first, length});
      first += length;
    }
    check(!lengths || first == N, "lengths: they sum to ", first, ", expected ", N);
    for (const TokenGroup& one : cut) longest = one.length > longest ? one.length : longest;
    group = cut.data();
    groups = static_cast<int64_t>(cut.size());
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  int64_t tasks() const { return B * H * groups; }
  int64_t scores_a_task() const { return groups > 0 ? longest * longest : 0; }

 private:
  std::vector<TokenGroup> cut;
};

struct Packed : Call {
  Packed(const Tensor& qkv, const Lengths& lengths)
      : Call("qkv", size(qkv, 0), size(qkv, 1), size(qkv, 3), size(qkv, 4), lengths) {
    check(is_float32(qkv) && qkv.is_contiguous(), "qkv: must be contiguous float32");
    for (int part = 0; part < 3; ++part) in[part] = part_of(qkv, part, "qkv");
  }

 private:
  static int64_t size(const Tensor& qkv, int64_t axis) {
    check(qkv.dim() == 5 && qkv.size(2) == 3, "qkv: expected (B, N, 3, H, d), got ", qkv.dim(), " dimensions");
    return qkv.size(axis);
  }
};

// q, k and v where they lie; a copy of one whose channels are not contiguous is held here.
struct Separate : Call {
  Separate(const Tensor& q, const Tensor& k, const Tensor& v, const Lengths& lengths)
      : Call("q", size(q, 0), size(q, 2), size(q, 1), size(q, 3), lengths), held{q, k, v} {
    const char* names[3] = {"q", "k", "v"};
    for (int part = 0; part < 3; ++part) {
      check(is_float32(held[part]), names[part], ": must be float32");
      expect_shape(held[part], names[part], {B, H, N, d});
      if (held[part].strides()[3] != 1) held[part] = torch::stable::contiguous(held[part]);
      in[part] = heads_of(held[part], names[part], {B, H, N, d});
    }
  }

 private:
  Tensor held[3];

  static int64_t size(const Tensor& q, int64_t axis) {
    check(q.dim() == 4, "q: expected (B, H, N, d), got ", q.dim(), " dimensions");
    return q.size(axis);
  }
};

float* matching(const Attention& p, const Tensor& t, const char* name) {
  expect_shape(t, name, {p.B, p.N, p.H, p.d});
  check(is_float32(t) && t.is_contiguous(), name, ": must be contiguous float32");
  return floats(t);
}

std::tuple<Tensor, Tensor> forward(Call& p) {
  Tensor out = empty({p.B, p.N, p.H, p.d}, aoti_torch_dtype_float32());
  Tensor lse = empty({p.B, p.H, p.N}, aoti_torch_dtype_float32());
  p.out = floats(out);
  p.lse = floats(lse);
  run<Attention>(kernels().attention, p, p.tasks(), p.scores_a_task());
  return {out, lse};
}

// Writes the gradients that p.grads points to.
void backward(Call& p, const Tensor& dout, const Tensor& out, const Tensor& lse) {
  const Tensor packed = dout.is_contiguous() ? dout : torch::stable::contiguous(dout);
  p.dout = matching(p, packed, "dout");
  p.out = matching(p, out, "out");
  expect_shape(lse, "lse", {p.B, p.H, p.N});
  check(is_float32(lse) && lse.is_contiguous(), "lse: must be contiguous float32");
  p.lse = floats(lse);
  run<Attention>(kernels().attention_backward, p, p.tasks(), p.scores_a_task());
}

std::tuple<Tensor, Tensor> attention(const Tensor& qkv, Lengths lengths) {
  Packed p(qkv, lengths);
  return forward(p);
}

Tensor attention_backward(const Tensor& dout, const Tensor& qkv, const Tensor& out, const Tensor& lse,
                          Lengths lengths) {
  Packed p(qkv, lengths);
  Tensor dqkv = empty({p.B, p.N, 3, p.H, p.d}, aoti_torch_dtype_float32());
  for (int part = 0; part < 3; ++part) p.grads[part] = part_of(dqkv, part, "dqkv");
  backward(p, dout, out, lse);
  return dqkv;
}

std::tuple<Tensor, Tensor> attention_heads(const Tensor& q, const Tensor& k, const Tensor& v, Lengths lengths) {
  Separate p(q, k, v, lengths);
  return forward(p);
}

std::tuple<Tensor, Tensor, Tensor> attention_heads_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                            const Tensor& v, const Tensor& out, const Tensor& lse,
                                                            Lengths lengths) {
  Separate p(q, k, v, lengths);
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
