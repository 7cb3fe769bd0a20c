// st_fast::cfg_extrapolate, gelu_tanh, swiglu and their backward passes on the CPU.
#include "tensors.h"

#include <algorithm>
#include <optional>

namespace st_fast {
namespace {

Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Rows flat(const Tensor& t, const char* name) {
  Rows r;
  r.data = t.data_ptr();
  r.dtype = dtype_of(t, name);
  r.token = 1;
  return r;
}

using Kernel = void (*)(const Elementwise&, int64_t, int64_t);

// out = kernel(first, second), in first's dtype and shape.
Tensor elementwise(Kernel kernel, const Tensor& first, const Tensor* second, const char* first_name,
                   const char* second_name, float scalar, int64_t D = 0, float* bias_partial = nullptr) {
  const Tensor one = packed(first), two = second ? packed(*second) : one;
  Tensor out = torch::stable::empty_like(one);
  Elementwise p = {one.numel(), scalar, {flat(one, first_name), {}}, flat(out, "out"), D, bias_partial};
  p.out.past_cache = past_cache(out, D ? D : kLine);
  if (second) {
    const auto a = one.sizes(), b = two.sizes();
    check(a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()), second_name, ": shape ",
                    shape_text(b.data(), b.size()), ", expected ", shape_text(a.data(), a.size()));
    p.in[1] = flat(two, second_name);
  }
  const int64_t per_task = D ? D * kTokensPerTask : kElementsPerTask;
  run(kernel, p, divide_up(p.count, per_task), per_task);
  return out;
}

Tensor cfg_extrapolate(const Tensor& f_cond, const Tensor& f_null, double cfg_scale) {
  return elementwise(kernels().cfg_extrapolate, f_cond, &f_null, "f_cond", "f_null", static_cast<float>(cfg_scale));
}

Tensor gelu_tanh(const Tensor& x, std::optional<Tensor>) {
  return elementwise(kernels().gelu_tanh, x, nullptr, "x", "", 0.0f);
}

std::tuple<Tensor, Tensor> gelu_tanh_backward(const Tensor& dy, const Tensor& x, std::optional<Tensor> x_bias) {
  if (!x_bias)
    return {elementwise(kernels().gelu_tanh_backward, dy, &x, "dy", "x", 0.0f), empty({0}, aoti_torch_dtype_float32())};
  const int64_t D = x_bias->numel(), count = D ? divide_up(divide_up(x.numel(), D), kTokensPerTask) : 0;
  check(x.dim() > 0 && D == x.size(x.dim() - 1), "x_bias: ", D, " channels; those of x's last axis are needed");
  const std::unique_ptr<float[]> partial(new float[count * D]);
  Tensor dx = elementwise(kernels().gelu_tanh_bias_backward, dy, &x, "dy", "x", 0.0f, D, partial.get());
  return {dx, add_bias_partials(partial.get(), count, D, *x_bias)};
}

// swiglu of h (..., 2F), or its backward pass: h, the result, and what a task is.
struct Halves {
  Tensor h, out;
  Elementwise p = {};
  int64_t tasks;

  Halves(const Tensor& wide, bool forward) : h(packed(wide)) {
    const auto shape = h.sizes();
    const int64_t width = shape.size() ? shape[shape.size() - 1] : 0;
    check(width > 0 && width % 2 == 0, "h: shape ", shape_text(shape.data(), shape.size()),
          ", expected (..., 2F) with F >= 1");
    std::vector<int64_t> half(shape.begin(), shape.end());
    half.back() /= 2;
    p.D = half.back();
    p.count = h.numel() / 2;
    p.in[0] = flat(h, "h");
    out = forward ? torch::stable::new_empty(h, half) : torch::stable::empty_like(h);
    p.out = flat(out, "out");
    p.out.past_cache = past_cache(out, p.D);
    tasks = divide_up(p.count / p.D, kTokensPerTask);
  }
};

Tensor swiglu(const Tensor& h, std::optional<Tensor>) {
  const Halves halves(h, true);
  run(kernels().swiglu, halves.p, halves.tasks, 3 * halves.p.D * kTokensPerTask);
  return halves.out;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& dy, const Tensor& h, std::optional<Tensor> h_bias) {
  Halves halves(h, false);
  const int64_t D = halves.p.D, per_task = 3 * D * kTokensPerTask;
  const Tensor grad = packed(dy);
  const auto given = grad.sizes(), wide = halves.h.sizes();
  check(given.size() == wide.size() && given[given.size() - 1] == D &&
            std::equal(given.begin(), given.end() - 1, wide.begin()),
        "dy: shape ", shape_text(given.data(), given.size()), ", expected h's (..., ", D, ")");
  halves.p.in[1] = flat(grad, "dy");
  if (!h_bias) {
    run(kernels().swiglu_backward, halves.p, halves.tasks, per_task);
    return {halves.out, empty({0}, aoti_torch_dtype_float32())};
  }
  expect_shape(*h_bias, "h_bias", {2 * D});
  const std::unique_ptr<float[]> partial(new float[halves.tasks * 2 * D]);
  halves.p.bias_partial = partial.get();
  run(kernels().swiglu_bias_backward, halves.p, halves.tasks, per_task);
  return {halves.out, add_bias_partials(partial.get(), halves.tasks, 2 * D, *h_bias)};
}

}  // namespace

ST_LIBRARY(CPU, m) {
  ST_IMPL(m, cfg_extrapolate);
  ST_IMPL(m, gelu_tanh);
  ST_IMPL(m, gelu_tanh_backward);
  ST_IMPL(m, swiglu);
  ST_IMPL(m, swiglu_backward);
}

}  // namespace st_fast
