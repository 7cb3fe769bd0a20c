// st_fast::align and guided_feature_loss on the CPU.
#include "tensors.h"

#include <optional>

namespace st_fast {
namespace {

FeatureLoss parse_loss(const std::string& loss) {
  if (loss == "mse") return FeatureLoss::kMse;
  if (loss == "cosine") return FeatureLoss::kCosine;
  check(loss == "normalized_mse", "loss = '", loss, "': one of mse, cosine, normalized_mse");
  return FeatureLoss::kNormalizedMse;
}

// Which m supervises each row of q. Raises for an index out of range or named twice.
std::vector<int64_t> samples_of(const std::optional<Tensor>& index, int64_t B, int64_t M) {
  std::vector<int64_t> sample_of(B, -1);
  if (!index) {
    check(M == B, "f_cond: ", M, " samples, expected ", B, " as q has (or give index)");
    for (int64_t b = 0; b < B; ++b) sample_of[b] = b;
    return sample_of;
  }
  expect_shape(*index, "index", {M});
  check(dtype_code(index->get()) == aoti_torch_dtype_int64(), "index: dtype must be int64");
  const int64_t stride = M > 0 ? index->stride(0) : 0;
  const int64_t* rows_named = static_cast<const int64_t*>(index->data_ptr());
  for (int64_t m = 0; m < M; ++m) {
    const int64_t b = rows_named[m * stride];
    check(b >= 0 && b < B, "index[", m, "] = ", b, ": allowed are 0 to ", B - 1);
    check(sample_of[b] < 0, "index[", m, "] = ", b, ": named twice");
    sample_of[b] = m;
  }
  return sample_of;
}

std::vector<float> weights_of(const Tensor& weight, int64_t M) {
  expect_shape(weight, "weight", {M});
  std::vector<float> values(M);
  if (M == 0) return values;
  const Tensor converted = is_float32(weight) ? weight : torch::stable::to(weight, torch::headeronly::ScalarType::Float);
  const int64_t stride = converted.stride(0);
  for (int64_t m = 0; m < M; ++m) values[m] = floats(converted)[m * stride];
  return values;
}

std::tuple<Tensor, Tensor> feature_loss(const Tensor& q, const Tensor& f_cond, const Tensor* f_null,
                                        const Tensor& weight, float cfg_scale, FeatureLoss loss,
                                        const std::optional<Tensor>& index) {
  check(q.dim() == 3, "q: ", q.dim(), " dimensions, expected (B, N, D)");
  check(f_cond.dim() == 3, "f_cond: ", f_cond.dim(), " dimensions, expected (M, N, D)");
  Feature p = {};
  p.B = q.size(0);
  p.N = q.size(1);
  p.D = q.size(2);
  const int64_t M = f_cond.size(0), tasks = p.B * divide_up(p.N, kTokensPerTask);
  expect_shape(f_cond, "f_cond", {M, p.N, p.D});
  if (f_null) expect_shape(*f_null, "f_null", {M, p.N, p.D});
  const std::vector<int64_t> sample_of = samples_of(index, p.B, M);
  const std::vector<float> weights = weights_of(weight, M);
  std::vector<double> partial(tasks);
  Tensor dq = empty_as({p.B, p.N, p.D}, q), result = empty({}, aoti_torch_dtype_float32());
  p.loss = loss;
  p.cfg_scale = cfg_scale;
  p.q = rows(q, "q");
  p.cond = rows(f_cond, "f_cond");
  if (f_null) p.null = rows(*f_null, "f_null");
  p.dq = result_rows(dq, "dq");
  p.sample_of = sample_of.data();
  p.weight = weights.data();
  p.partial = partial.data();
  run(kernels().feature_loss, p, tasks, kTokensPerTask * p.D);
  double sum = 0;
  for (const double part : partial) sum += part;
  *floats(result) = static_cast<float>(sum);
  return {result, dq};
}

std::tuple<Tensor, Tensor> align(const Tensor& q, const Tensor& f, const Tensor& weight) {
  return feature_loss(q, f, nullptr, weight, 1.0f, FeatureLoss::kCosine, std::nullopt);
}

std::tuple<Tensor, Tensor> guided_feature_loss(const Tensor& q, const Tensor& f_cond, const Tensor& f_null,
                                               const Tensor& weight, double cfg_scale, std::string loss,
                                               std::optional<Tensor> index) {
  return feature_loss(q, f_cond, &f_null, weight, static_cast<float>(cfg_scale), parse_loss(loss), index);
}

}  // namespace

ST_LIBRARY(CPU, m) {
  ST_IMPL(m, align);
  ST_IMPL(m, guided_feature_loss);
}

}  // namespace st_fast
