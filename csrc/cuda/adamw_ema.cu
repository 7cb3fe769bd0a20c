// st_fast::adamw_ema_ on CUDA: clip, AdamW (arXiv 1711.05101), EMA and low-precision copy in one pass over memory.
// Compiled with -fmad=false: every element sees the operations of csrc/cpu/optimizer.h, each rounded once.
#include "multi_tensor.cuh"

namespace st_fast {
namespace {

struct Given {
  double beta1, beta2, weight_decay, max_norm, ema_weight;
  bool ema_warmup;
};

struct Constants {  // made on the device from step, lr and grad_norm, once a step
  float clip, decay, step_size, bias2_sqrt, ema_weight, take;
};

struct Fixed {
  float one_minus_beta1, beta2, one_minus_beta2, eps;
};

// One thread: the step's constants, and the step counted if it is taken.
template <class Step>
__global__ void prepare(const Given given, const float* lr, const float* norm, Step* step, Constants* to) {
  Constants c = {};
  c.take = isfinite(*norm) ? 1.0f : 0.0f;
  if (c.take != 0.0f) {
    const double steps = static_cast<double>(*step) + 1, rate = *lr;
    *step = static_cast<Step>(steps);
    c.decay = static_cast<float>(1 - rate * given.weight_decay);
    c.step_size = static_cast<float>(rate / (1 - pow(given.beta1, steps)));
    c.bias2_sqrt = static_cast<float>(sqrt(1 - pow(given.beta2, steps)));
    c.ema_weight = static_cast<float>(given.ema_warmup ? fmax(given.ema_weight, 9 / (9 + steps)) : given.ema_weight);
    c.clip = given.max_norm > 0 ? fminf(1.0f, static_cast<float>(given.max_norm) / (*norm + 1e-6f)) : 1.0f;
  }
  *to = c;
}

template <class Grad>
__global__ void __launch_bounds__(kThreads)
    update(const Table table, const Constants* constants, const Fixed f, const DType copy_dtype) {
  const Constants c = *constants;
  if (c.take == 0.0f) return;
  const Span span = span_of(table, blockIdx.x);
  void* const* data = table.data[span.tensor];
  for (int64_t i = threadIdx.x * 4; i < span.count; i += kThreads * 4) {
    const int64_t at = span.first + i;
    const int count = span.count - i < 4 ? static_cast<int>(span.count - i) : 4;
    float g[4], p[4], m[4], v[4], e[4];
    load_four<Grad>(data[kGrad], at, count, g);
    load_four<float>(data[kParam], at, count, p);
    load_four<float>(data[kExpAvg], at, count, m);
    load_four<float>(data[kExpAvgSq], at, count, v);
    if (data[kEma]) load_four<float>(data[kEma], at, count, e);
    for (int k = 0; k < 4; ++k) {
      g[k] *= c.clip;
      m[k] += f.one_minus_beta1 * (g[k] - m[k]);
      v[k] = v[k] * f.beta2 + f.one_minus_beta2 * g[k] * g[k];
      p[k] = p[k] * c.decay - c.step_size * m[k] / (sqrtf(v[k]) / c.bias2_sqrt + f.eps);
      if (data[kEma]) e[k] += c.ema_weight * (p[k] - e[k]);
    }
    store_four<float>(data[kParam], at, count, p);
    store_four<float>(data[kExpAvg], at, count, m);
    store_four<float>(data[kExpAvgSq], at, count, v);
    if (data[kEma]) store_four<float>(data[kEma], at, count, e);
    if (data[kCopy] && copy_dtype == DType::kBFloat16) store_four<__nv_bfloat16>(data[kCopy], at, count, p);
    if (data[kCopy] && copy_dtype == DType::kFloat16) store_four<__half>(data[kCopy], at, count, p);
  }
}

using Tensors = std::vector<Tensor>;

void expect_list(const Tensors& list, const Tensors& params, const char* name, bool may_be_empty, bool float32) {
  check(list.size() == params.size() || (may_be_empty && list.empty()), name, ": ", list.size(),
        " tensors, expected ", params.size(), " as params has", may_be_empty ? " (or none)" : "");
  for (size_t i = 0; i < list.size(); ++i) {
    const auto a = list[i].sizes(), b = params[i].sizes();
    check(a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()), name, "[", i, "]: shape ",
          shape_text(a.data(), a.size()), ", expected ", shape_text(b.data(), b.size()), " as its parameter");
    check(list[i].is_contiguous(), name, "[", i, "]: must be contiguous");
    check(!float32 || is_float32(list[i]), name, "[", i, "]: dtype must be float32");
  }
}

void adamw_ema_(const Tensors& params, const Tensors& given_grads, const Tensors& exp_avgs,
                const Tensors& exp_avg_sqs, const Tensors& emas, const Tensors& copies, const Tensor& step,
                const Tensor& grad_norm, const Tensor& lr, double beta1, double beta2, double eps,
                double weight_decay, double ema_decay, double max_norm, bool ema_warmup) {
  if (params.empty()) return;
  const OnDevice device(params[0]);
  const Tensors grads = contiguous(given_grads);
  expect_list(params, params, "params", false, true);
  expect_list(grads, params, "grads", false, false);
  expect_list(exp_avgs, params, "exp_avgs", false, true);
  expect_list(exp_avg_sqs, params, "exp_avg_sqs", false, true);
  expect_list(emas, params, "emas", true, true);
  expect_list(copies, params, "copies", true, false);
  check(is_float32(lr) && is_float32(grad_norm), "lr, grad_norm: dtype must be float32");
  check(lr.is_cuda() && grad_norm.is_cuda() && step.is_cuda(), "lr, grad_norm, step: must be on the GPU");
  const DType copy_dtype = copies.empty() ? DType::kFloat32 : common_dtype(copies, "copies");
  check(copies.empty() || copy_dtype != DType::kFloat32, "copies: dtype must be bfloat16 or float16");
  const DType grad_dtype = common_dtype(grads, "grads");
  Tensor scratch = device.empty(sizeof(Constants) / 4, aoti_torch_dtype_float32());
  Constants* constants = static_cast<Constants*>(scratch.data_ptr());
  const Given given = {beta1, beta2, weight_decay, max_norm, 1 - ema_decay, ema_warmup};
  if (is_float32(step)) {
    prepare<<<1, 1, 0, device.stream()>>>(given, floats(lr), floats(grad_norm), floats(step), constants);
  } else {
    check(dtype_code(step.get()) == aoti_torch_dtype_int64(), "step: dtype must be float32 or int64");
    prepare<<<1, 1, 0, device.stream()>>>(given, floats(lr), floats(grad_norm),
                                          static_cast<int64_t*>(step.data_ptr()), constants);
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const Fixed fixed = {static_cast<float>(1 - beta1), static_cast<float>(beta2), static_cast<float>(1 - beta2),
                       static_cast<float>(eps)};
  each_table(
      params,
      [&](Table& table, int slot, size_t i) {
        void** data = table.data[slot];
        data[kGrad] = grads[i].data_ptr();
        data[kParam] = params[i].data_ptr();
        data[kExpAvg] = exp_avgs[i].data_ptr();
        data[kExpAvgSq] = exp_avg_sqs[i].data_ptr();
        data[kEma] = emas.empty() ? nullptr : emas[i].data_ptr();
        data[kCopy] = copies.empty() ? nullptr : copies[i].data_ptr();
      },
      [&](const Table& table, int blocks) {
        const auto launch = [&](auto* kernel) {
          kernel<<<blocks, kThreads, 0, device.stream()>>>(table, constants, fixed, copy_dtype);
        };
        if (grad_dtype == DType::kFloat32) launch(update<float>);
        else if (grad_dtype == DType::kBFloat16) launch(update<__nv_bfloat16>);
        else launch(update<__half>);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
}

}  // namespace

ST_LIBRARY(CUDA, m) { ST_IMPL(m, adamw_ema_); }

}  // namespace st_fast
