// st_fast::qk_norm and qk_norm_backward on the CPU.
#include "tensors.h"

namespace st_fast {
namespace {

QKNorm sizes_of(const Tensor& qkv) {
  check(qkv.dim() == 5 && qkv.size(2) == 3, "qkv: expected (B, N, 3, H, d), got ", qkv.dim(),
                  " dimensions");
  QKNorm p = {};
  p.B = qkv.size(0);
  p.N = qkv.size(1);
  p.H = qkv.size(3);
  p.d = qkv.size(4);
  return p;
}

using Vector = std::optional<Tensor>;

Rows affine(const QKNorm& p, const Vector& t, const char* name) {
  if (!t) return {};
  expect_shape(*t, name, {p.d});
  return rows(*t, name);
}

HeadNorm norm_named(const std::string& name) {
  check(name == "layer" || name == "rms" || name == "none", "norm = '", name, "': one of layer, rms, none");
  return name == "layer" ? HeadNorm::kLayer : name == "rms" ? HeadNorm::kRms : HeadNorm::kNone;
}

// Numbers that are kept of a token and head.
int64_t statistics(HeadNorm norm) { return norm == HeadNorm::kLayer ? 4 : norm == HeadNorm::kRms ? 2 : 0; }

Rows table(const QKNorm& p, const Vector& rope) {
  if (!rope) return {};
  check(p.d % 2 == 0, "rope: pairs of channels are turned, but d = ", p.d);
  check(is_float32(*rope), "rope: must be float32");
  const bool shared = rope->dim() == 3 && rope->size(0) == 1;  // by all samples
  expect_shape(*rope, "rope", {shared ? 1 : p.B, p.N, p.d});
  Rows r = rows(*rope, "rope");
  if (shared) r.batch = 0;
  return r;
}

using Kernel = void (*)(const QKNorm&, int64_t, int64_t);

void run_tokens(Kernel kernel, const QKNorm& p) {
  run(kernel, p, p.B * divide_up(p.N, kTokensPerTask), kTokensPerTask * 3 * p.H * p.d);
}

std::tuple<Tensor, Tensor, Tensor> qk_norm(const Tensor& qkv, Vector q_weight, Vector q_bias, Vector k_weight,
                                           Vector k_bias, double eps, bool heads_first, std::string norm,
                                           Vector rope) {
  QKNorm p = sizes_of(qkv);
  const HeadNorm kind = norm_named(norm);
  Tensor out[2];
  const char* names[2] = {"q", "k"};
  for (int part = 0; part < 2; ++part) {
    out[part] = heads_first ? empty_as({p.B, p.H, p.N, p.d}, qkv)
                            : empty_token_major(p.B, p.H, p.N, p.d, dtype_code(qkv.get()));
    p.in[part] = part_of(qkv, part, "qkv");
    p.out[part] = heads_of(out[part], names[part], {p.B, p.H, p.N, p.d});
    p.out[part].rows.past_cache = past_cache(out[part], p.d);
  }
  Tensor stats = empty({statistics(kind), p.B, p.N, p.H}, aoti_torch_dtype_float32());
  p.eps = static_cast<float>(eps);
  p.weight[0] = affine(p, q_weight, "q_weight");
  p.weight[1] = affine(p, k_weight, "k_weight");
  p.bias[0] = affine(p, q_bias, "q_bias");
  p.bias[1] = affine(p, k_bias, "k_bias");
  p.rope = table(p, rope);
  p.stats = floats(stats);
  run_tokens(kernels().qk_norm[static_cast<int>(kind)][rope.has_value()], p);
  return {out[0], out[1], stats};
}

// `count` sums over all tasks, in order, as `like`'s dtype; a task's sums begin `step` apart.
Tensor sum_of(const float* partial, int64_t tasks, int64_t step, std::initializer_list<int64_t> shape,
              const Tensor& like) {
  Tensor sum = empty(shape, aoti_torch_dtype_float32());
  const int64_t count = sum.numel();
  std::vector<double> acc(count, 0.0);
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t i = 0; i < count; ++i) acc[i] += partial[task * step + i];
  for (int64_t i = 0; i < count; ++i) floats(sum)[i] = static_cast<float>(acc[i]);
  return is_float32(like) ? sum : torch::stable::to(sum, like.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> qk_norm_backward(const Tensor& dq, const Tensor& dk, const Tensor& dv,
                                                    const Tensor& qkv, Vector q_weight, Vector k_weight,
                                                    Vector qkv_bias, const Tensor& stats, std::string norm,
                                                    Vector rope) {
  QKNorm p = sizes_of(qkv);
  const HeadNorm kind = norm_named(norm);
  expect_shape(stats, "stats", {statistics(kind), p.B, p.N, p.H});
  check(is_float32(stats) && stats.is_contiguous(), "stats: must be contiguous float32");
  Tensor dqkv = empty_as({p.B, p.N, 3, p.H, p.d}, qkv);
  const Tensor* grads[3] = {&dq, &dk, &dv};
  const char* names[3] = {"dq", "dk", "dv"};
  for (int part = 0; part < 3; ++part) {
    p.in[part] = part_of(dqkv, part, "dqkv");
    p.in[part].rows.past_cache = past_cache(dqkv, p.d);
    p.x[part] = part_of(qkv, part, "qkv");
    p.out[part] = heads_of(*grads[part], names[part], {p.B, p.H, p.N, p.d});
  }
  p.weight[0] = affine(p, q_weight, "q_weight");
  p.weight[1] = affine(p, k_weight, "k_weight");
  check(q_weight.has_value() == k_weight.has_value(), "q_weight, k_weight: both or neither");
  p.rope = table(p, rope);
  p.stats = floats(stats);
  p.affine = q_weight ? statistics(kind) : 0;
  p.sums = p.affine + (qkv_bias ? 3 * p.H : 0);
  const int64_t tasks = p.B * divide_up(p.N, kTokensPerTask);
  const std::unique_ptr<float[]> partial(new float[tasks * p.sums * p.d]);
  p.partial = partial.get();
  run_tokens(kernels().qk_norm_backward[static_cast<int>(kind)][rope.has_value()], p);
  const Tensor& like = q_weight ? *q_weight : qkv;
  Tensor daffine = sum_of(p.partial, tasks, p.sums * p.d, {p.affine, p.d}, like);
  if (!qkv_bias) return {dqkv, daffine, empty({0}, dtype_code(like.get()))};
  expect_shape(*qkv_bias, "qkv_bias", {3 * p.H * p.d});
  return {dqkv, daffine, sum_of(p.partial + p.affine * p.d, tasks, p.sums * p.d, {3 * p.H * p.d}, *qkv_bias)};
}

}  // namespace

ST_LIBRARY(CPU, m) {
  ST_IMPL(m, qk_norm);
  ST_IMPL(m, qk_norm_backward);
}

}  // namespace st_fast
