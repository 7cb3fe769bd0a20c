// st_fast::norm_modulate, gate_residual_norm_modulate, gate_residual and their backward ops on the CPU.
#include "tensors.h"

#include <optional>

namespace st_fast {
namespace {

AdaLN sizes_of(const Tensor& x, const char* name) {
  check(x.dim() == 3, name, ": ", x.dim(), " dimensions, expected (B, N, D)");
  AdaLN p = {};
  p.B = x.size(0);
  p.N = x.size(1);
  p.D = x.size(2);
  return p;
}

Rows tokens(const AdaLN& p, const Tensor& t, const char* name) {
  expect_shape(t, name, {p.B, p.N, p.D});
  return rows(t, name);
}

Rows modulation(const AdaLN& p, const Tensor& t, const char* name) {
  expect_shape(t, name, {p.B, p.D});
  return rows(t, name);
}

float* statistic(const AdaLN& p, const Tensor& t, const char* name) {
  expect_shape(t, name, {p.B, p.N});
  check(is_float32(t) && t.is_contiguous(), name, ": must be contiguous float32");
  return floats(t);
}

using Kernel = void (*)(const AdaLN&, int64_t, int64_t);

void run_tokens(Kernel kernel, const AdaLN& p) {
  run(kernel, p, p.B * divide_up(p.N, kTokensPerTask), kTokensPerTask * p.D);
}

// The kernel, and then the sums over tokens: returns dmod (B, sums * D) in the modulation's dtype.
Tensor run_backward(Kernel kernel, AdaLN p, int64_t sums, const Tensor& modulation) {
  Tensor dmod = empty_as({p.B, sums * p.D}, modulation);
  const std::unique_ptr<float[]> partial(new float[p.B * divide_up(p.N, kTokensPerTask) * sums * p.D]);
  p.sums = sums;
  p.partial = partial.get();
  p.dmod = rows(dmod, "dmod");
  run_tokens(kernel, p);
  run(kernels().sum_partials, p, p.B * sums, divide_up(p.N, kTokensPerTask) * p.D);
  return dmod;
}

std::tuple<Tensor, Tensor, Tensor> norm_modulate(const Tensor& x, const Tensor& shift, const Tensor& scale,
                                                 double eps) {
  AdaLN p = sizes_of(x, "x");
  Tensor y = empty_as({p.B, p.N, p.D}, x);
  Tensor mean = empty({p.B, p.N}, aoti_torch_dtype_float32()), rstd = empty({p.B, p.N}, aoti_torch_dtype_float32());
  p.eps = static_cast<float>(eps);
  p.x = rows(x, "x");
  p.shift = modulation(p, shift, "shift");
  p.scale = modulation(p, scale, "scale");
  p.y = result_rows(y, "y");
  p.mean = floats(mean);
  p.rstd = floats(rstd);
  run_tokens(kernels().norm_modulate, p);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor> norm_modulate_backward(const Tensor& dy, const Tensor& x, const Tensor& scale,
                                                  const Tensor& mean, const Tensor& rstd) {
  AdaLN p = sizes_of(x, "x");
  Tensor dx = empty_as({p.B, p.N, p.D}, x);
  p.dy = tokens(p, dy, "dy");
  p.x_out = rows(x, "x");
  p.scale = modulation(p, scale, "scale");
  p.mean = statistic(p, mean, "mean");
  p.rstd = statistic(p, rstd, "rstd");
  p.dx = result_rows(dx, "dx");
  return {dx, run_backward(kernels().norm_modulate_backward, p, 2, scale)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_residual_norm_modulate(const Tensor& x, const Tensor& a,
                                                                       const Tensor& gate, const Tensor& shift,
                                                                       const Tensor& scale, double eps,
                                                                       std::optional<Tensor>) {
  AdaLN p = sizes_of(x, "x");
  Tensor x_out = empty_as({p.B, p.N, p.D}, x), y = empty_as({p.B, p.N, p.D}, x);
  Tensor mean = empty({p.B, p.N}, aoti_torch_dtype_float32()), rstd = empty({p.B, p.N}, aoti_torch_dtype_float32());
  p.eps = static_cast<float>(eps);
  p.x = rows(x, "x");
  p.a = tokens(p, a, "a");
  p.gate = modulation(p, gate, "gate");
  p.shift = modulation(p, shift, "shift");
  p.scale = modulation(p, scale, "scale");
  p.x_out = result_rows(x_out, "x_out");
  p.y = result_rows(y, "y");
  p.mean = floats(mean);
  p.rstd = floats(rstd);
  run_tokens(kernels().gate_residual_norm_modulate, p);
  return {x_out, y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gate_residual_norm_modulate_backward(
    const Tensor& dx_out, const Tensor& dy, const Tensor& x_out, const Tensor& a, const Tensor& gate,
    const Tensor& scale, const Tensor& mean, const Tensor& rstd, std::optional<Tensor> a_bias) {
  AdaLN p = sizes_of(x_out, "x_out");
  Tensor dx = empty_as({p.B, p.N, p.D}, x_out), da = empty_as({p.B, p.N, p.D}, a);
  p.dx_out = tokens(p, dx_out, "dx_out");
  p.dy = tokens(p, dy, "dy");
  p.x_out = rows(x_out, "x_out");
  p.a = tokens(p, a, "a");
  p.gate = modulation(p, gate, "gate");
  p.scale = modulation(p, scale, "scale");
  p.mean = statistic(p, mean, "mean");
  p.rstd = statistic(p, rstd, "rstd");
  p.dx = result_rows(dx, "dx");
  p.da = result_rows(da, "da");
  if (!a_bias)
    return {dx, da, run_backward(kernels().gate_residual_norm_modulate_backward, p, 3, scale),
            empty({0}, aoti_torch_dtype_float32())};
  const int64_t tasks = p.B * divide_up(p.N, kTokensPerTask);
  const std::unique_ptr<float[]> partial(new float[tasks * p.D]);
  p.bias_partial = partial.get();
  Tensor dmod = run_backward(kernels().gate_residual_norm_modulate_bias_backward, p, 3, scale);
  return {dx, da, dmod, add_bias_partials(partial.get(), tasks, p.D, *a_bias)};
}

Tensor gate_residual(const Tensor& x, const Tensor& a, const Tensor& gate) {
  AdaLN p = sizes_of(x, "x");
  Tensor x_out = empty_as({p.B, p.N, p.D}, x);
  p.x = rows(x, "x");
  p.a = tokens(p, a, "a");
  p.gate = modulation(p, gate, "gate");
  p.x_out = result_rows(x_out, "x_out");
  run_tokens(kernels().gate_residual, p);
  return x_out;
}

std::tuple<Tensor, Tensor> gate_residual_backward(const Tensor& dx_out, const Tensor& a, const Tensor& gate) {
  AdaLN p = sizes_of(a, "a");
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
