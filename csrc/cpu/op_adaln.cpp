// st_fast::norm_modulate, gate_residual_norm_modulate, gate_residual and their backward ops on the CPU.
#include "tensors.h"

#include <optional>

namespace st_fast {
namespace {

using Lengths = std::optional<std::vector<int64_t>>;

// The arguments of a call, and how its tokens are cut into tasks, which they point to.
struct Call : AdaLN {
  std::vector<Chunk> cut;
  std::vector<int64_t> cut_end;

  // `vector`: any modulation, of which there is one a sample, or a run of `lengths`, or a token.
  Call(const Tensor& x, const char* name, const Tensor& vector, const Lengths& lengths) : AdaLN() {
    check(x.dim() == 3, name, ": ", x.dim(), " dimensions, expected (B, N, D)");
    B = x.size(0);
    N = x.size(1);
    D = x.size(2);
    per_token = !lengths && vector.dim() == 3;
    if (!lengths) add_run(0, N);
    int64_t first = 0;
    for (size_t i = 0; lengths && i < lengths->size(); ++i) {
      const int64_t length = (*lengths)[i];
      check(length >= 1 && length <= N - first, "lengths[", i, "] = ", length, ": allowed are 1 to ", N - first);
      add_run(first, first + length);
      first += length;
    }
    check(!lengths || first == N, "lengths: they sum to ", first, ", expected ", N);
    grouped = lengths.has_value();
    runs = static_cast<int64_t>(cut_end.size());
    chunks = static_cast<int64_t>(cut.size());
    chunk = cut.data();
    chunk_end = cut_end.data();
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  bool grouped = false;
  int64_t tasks() const { return B * chunks; }

 private:
  void add_run(int64_t first, int64_t last) {
    const int64_t run = static_cast<int64_t>(cut_end.size());
    for (; first < last; first += kTokensPerTask)
      cut.push_back({run, first, last - first < kTokensPerTask ? last : first + kTokensPerTask});
    cut_end.push_back(static_cast<int64_t>(cut.size()));
  }
};

Rows tokens(const AdaLN& p, const Tensor& t, const char* name) {
  expect_shape(t, name, {p.B, p.N, p.D});
  return rows(t, name);
}

Rows modulation(const Call& p, const Tensor& t, const char* name) {
  if (p.grouped) expect_shape(t, name, {p.B, p.runs, p.D});
  else if (p.per_token) expect_shape(t, name, {p.B, p.N, p.D});
  else expect_shape(t, name, {p.B, p.D});
  return rows(t, name);
}

float* statistic(const AdaLN& p, const Tensor& t, const char* name) {
  expect_shape(t, name, {p.B, p.N});
  check(is_float32(t) && t.is_contiguous(), name, ": must be contiguous float32");
  return floats(t);
}

// The mean, which RMSNorm does not have, and rstd.
std::tuple<Tensor, Tensor> new_statistics(AdaLN& p, bool rms) {
  const int32_t dtype = aoti_torch_dtype_float32();
  Tensor mean = rms ? empty({0}, dtype) : empty({p.B, p.N}, dtype), rstd = empty({p.B, p.N}, dtype);
  p.mean = rms ? nullptr : floats(mean);
  p.rstd = floats(rstd);
  return {mean, rstd};
}

using Kernel = void (*)(const AdaLN&, int64_t, int64_t);

void run_tokens(Kernel kernel, const Call& p) { run<AdaLN>(kernel, p, p.tasks(), kTokensPerTask * p.D); }

// The kernel, and then the sums over tokens: returns dmod (B, [runs or N,] sums * D) in the modulation's dtype.
Tensor run_backward(const Kernel (&kernel)[2], Call& p, int64_t sums, const Tensor& modulation) {
  const int32_t dtype = dtype_code(modulation.get());
  p.sums = sums;
  if (p.per_token) {
    Tensor dmod = empty({p.B, p.N, sums * p.D}, dtype);
    p.dmod = rows(dmod, "dmod");
    p.dmod.past_cache = past_cache(dmod, p.D);
    run_tokens(kernel[1], p);
    return dmod;
  }
  Tensor dmod = p.grouped ? empty({p.B, p.runs, sums * p.D}, dtype) : empty({p.B, sums * p.D}, dtype);
  const std::unique_ptr<float[]> partial(new float[p.tasks() * sums * p.D]);
  p.partial = partial.get();
  p.dmod = rows(dmod, "dmod");
  run_tokens(kernel[0], p);
  run<AdaLN>(kernels().sum_partials, p, p.B * p.runs * sums, p.chunks * p.D);
  return dmod;
}

std::tuple<Tensor, Tensor, Tensor> norm_modulate(const Tensor& x, const Tensor& shift, const Tensor& scale,
                                                 double eps, Lengths lengths, bool rms) {
  Call p(x, "x", shift, lengths);
  Tensor y = empty_as({p.B, p.N, p.D}, x);
  p.eps = static_cast<float>(eps);
  p.x = rows(x, "x");
  p.shift = modulation(p, shift, "shift");
  p.scale = modulation(p, scale, "scale");
  p.y = result_rows(y, "y");
  auto [mean, rstd] = new_statistics(p, rms);
  run_tokens(kernels().norm_modulate, p);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor> norm_modulate_backward(const Tensor& dy, const Tensor& x, const Tensor& scale,
                                                  const Tensor& mean, const Tensor& rstd, Lengths lengths,
                                                  bool rms) {
  Call p(x, "x", scale, lengths);
  Tensor dx = empty_as({p.B, p.N, p.D}, x);
  p.dy = tokens(p, dy, "dy");
  p.x_out = rows(x, "x");
  p.scale = modulation(p, scale, "scale");
  p.mean = rms ? nullptr : statistic(p, mean, "mean");
  p.rstd = statistic(p, rstd, "rstd");
  p.dx = result_rows(dx, "dx");
  return {dx, run_backward(kernels().norm_modulate_backward, p, 2, scale)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_residual_norm_modulate(const Tensor& x, const Tensor& a,
                                                                       const Tensor& gate, const Tensor& shift,
                                                                       const Tensor& scale, double eps,
                                                                       std::optional<Tensor>, Lengths lengths,
                                                                       bool rms) {
  Call p(x, "x", gate, lengths);
  Tensor x_out = empty_as({p.B, p.N, p.D}, x), y = empty_as({p.B, p.N, p.D}, x);
  p.eps = static_cast<float>(eps);
  p.x = rows(x, "x");
  p.a = tokens(p, a, "a");
  p.gate = modulation(p, gate, "gate");
  p.shift = modulation(p, shift, "shift");
  p.scale = modulation(p, scale, "scale");
  p.x_out = result_rows(x_out, "x_out");
  p.y = result_rows(y, "y");
  auto [mean, rstd] = new_statistics(p, rms);
  run_tokens(kernels().gate_residual_norm_modulate, p);
  return {x_out, y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_residual_norm_modulate_backward(
    const Tensor& dx_out, const Tensor& dy, const Tensor& x_out, const Tensor& a, const Tensor& gate,
    const Tensor& scale, const Tensor& mean, const Tensor& rstd, std::optional<Tensor> a_bias, Lengths lengths,
    bool rms) {
  Call p(x_out, "x_out", gate, lengths);
  Tensor dx = empty_as({p.B, p.N, p.D}, x_out), da = empty_as({p.B, p.N, p.D}, a);
  p.dx_out = tokens(p, dx_out, "dx_out");
  p.dy = tokens(p, dy, "dy");
  p.x_out = rows(x_out, "x_out");
  p.a = tokens(p, a, "a");
  p.gate = modulation(p, gate, "gate");
  p.scale = modulation(p, scale, "scale");
  p.mean = rms ? nullptr : statistic(p, mean, "mean");
  p.rstd = statistic(p, rstd, "rstd");
  p.dx = result_rows(dx, "dx");
  p.da = result_rows(da, "da");
  if (!a_bias)
    return {dx, da, run_backward(kernels().gate_residual_norm_modulate_backward, p, 3, scale),
            empty({0}, aoti_torch_dtype_float32())};
  const std::unique_ptr<float[]> partial(new float[p.tasks() * p.D]);
  p.bias_partial = partial.get();
  Tensor dmod = run_backward(kernels().gate_residual_norm_modulate_bias_backward, p, 3, scale);
  return {dx, da, dmod, add_bias_partials(partial.get(), p.tasks(), p.D, *a_bias)};
}

Tensor gate_residual(const Tensor& x, const Tensor& a, const Tensor& gate, Lengths lengths) {
  Call p(x, "x", gate, lengths);
  Tensor x_out = empty_as({p.B, p.N, p.D}, x);
  p.x = rows(x, "x");
  p.a = tokens(p, a, "a");
  p.gate = modulation(p, gate, "gate");
  p.x_out = result_rows(x_out, "x_out");
  run_tokens(kernels().gate_residual, p);
  return x_out;
}

std::tuple<Tensor, Tensor> gate_residual_backward(const Tensor& dx_out, const Tensor& a, const Tensor& gate,
                                                  Lengths lengths) {
  Call p(a, "a", gate, lengths);
  Tensor da = empty_as({p.B, p.N, p.D}, a);
  p.dx_out = tokens(p, dx_out, "dx_out");
  p.a = rows(a, "a");
  p.gate = modulation(p, gate, "gate");
  p.da = result_rows(da, "da");
  return {da, run_backward(kernels().gate_residual_backward, p, 1, gate)};
}

}  // namespace

ST_LIBRARY(CPU, m) {
  ST_IMPL(m, norm_modulate);
  ST_IMPL(m, norm_modulate_backward);
  ST_IMPL(m, gate_residual_norm_modulate);
  ST_IMPL(m, gate_residual_norm_modulate_backward);
  ST_IMPL(m, gate_residual);
  ST_IMPL(m, gate_residual_backward);
}

}  // namespace st_fast
