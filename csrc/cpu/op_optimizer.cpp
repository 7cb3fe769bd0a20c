// st_fast::grad_norm and adamw_ema_ on the CPU, and what this library does after fork.
#include "tensors.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>

namespace st_fast {

namespace {
std::atomic<bool> forked{false};
const int fork_watch = pthread_atfork(nullptr, nullptr, [] { forked = true; });
}  // namespace

bool in_forked_child() { return forked.load(std::memory_order_relaxed); }

namespace {

using Tensors = std::vector<Tensor>;

struct Piece {  // kElementsPerTask elements of one tensor
  size_t tensor;
  int64_t first, count;
};

std::vector<Piece> pieces_of(const Tensors& tensors) {
  std::vector<Piece> pieces;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const int64_t numel = tensors[t].numel();
    for (int64_t at = 0; at < numel; at += kElementsPerTask)
      pieces.push_back({t, at, std::min(kElementsPerTask, numel - at)});
  }
  return pieces;
}

template <class F>
void each_piece(const std::vector<Piece>& pieces, F&& f) {
  const auto range = [](const std::pair<const std::vector<Piece>&, F&>& job, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) job.second(job.first[i], i);
  };
  const std::pair<const std::vector<Piece>&, F&> job(pieces, f);
  run<std::pair<const std::vector<Piece>&, F&>>(range, job, static_cast<int64_t>(pieces.size()), kElementsPerTask);
}

std::string entry(const char* list, size_t i) { return std::string(list) + "[" + std::to_string(i) + "]"; }

// The global L2 norm: float64 sums over fixed pieces, added from the smallest up, whatever the order of the tensors.
Tensor grad_norm(const Tensors& grads) {
  Tensors flat(grads.size());
  std::vector<DType> dtypes(grads.size());
  for (size_t t = 0; t < grads.size(); ++t) {
    flat[t] = grads[t].is_contiguous() ? grads[t] : torch::stable::contiguous(grads[t]);
    dtypes[t] = dtype_of(flat[t], "grads");
  }
  const std::vector<Piece> pieces = pieces_of(flat);
  std::vector<double> sums(pieces.size());
  each_piece(pieces, [&](const Piece& piece, int64_t i) {
    const int64_t bytes = dtypes[piece.tensor] == DType::kFloat32 ? 4 : 2;
    const char* at = static_cast<const char*>(flat[piece.tensor].data_ptr()) + piece.first * bytes;
    sums[i] = kernels().sum_of_squares(at, dtypes[piece.tensor], piece.count);
  });
  // NaN has no place in an order, and makes the sum NaN in any.
  if (std::none_of(sums.begin(), sums.end(), [](double s) { return std::isnan(s); })) std::sort(sums.begin(), sums.end());
  double sum = 0;
  for (const double s : sums) sum += s;
  Tensor result = empty({}, aoti_torch_dtype_float32());
  *floats(result) = static_cast<float>(std::sqrt(sum));
  return result;
}

void expect_twin(const Tensor& t, const Tensor& param, const std::string& name, bool float32) {
  const auto a = t.sizes(), b = param.sizes();
  check(a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()), name, ": shape ",
                  shape_text(a.data(), a.size()), ", expected ", shape_text(b.data(), b.size()), " as its parameter");
  check(t.is_contiguous(), name, ": must be contiguous");
  check(!float32 || is_float32(t), name, ": dtype must be float32");
}

void expect_count(const Tensors& list, const Tensors& params, const char* name, bool may_be_empty) {
  check(list.size() == params.size() || (may_be_empty && list.empty()), name, ": ", list.size(),
                  " tensors, expected ", params.size(), " as params has", may_be_empty ? " (or none)" : "");
}

double scalar_of(const Tensor& t, const char* name) {
  check(t.numel() == 1, name, ": ", t.numel(), " elements, expected 1");
  if (is_float32(t)) return *floats(t);
  check(dtype_code(t.get()) == aoti_torch_dtype_int64(), name, ": dtype must be float32 or int64");
  return static_cast<double>(*static_cast<const int64_t*>(t.data_ptr()));
}

double advance(const Tensor& step) {
  const double next = scalar_of(step, "step") + 1;
  if (is_float32(step)) *floats(step) = static_cast<float>(next);
  else *static_cast<int64_t*>(step.data_ptr()) = static_cast<int64_t>(next);
  return next;
}

void adamw_ema_(const Tensors& params, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                const Tensors& emas, const Tensors& copies, const Tensor& step, const Tensor& grad_norm,
                const Tensor& lr, double beta1, double beta2, double eps, double weight_decay, double ema_decay,
                double max_norm, bool ema_warmup) {
  expect_count(grads, params, "grads", false);
  expect_count(exp_avgs, params, "exp_avgs", false);
  expect_count(exp_avg_sqs, params, "exp_avg_sqs", false);
  expect_count(emas, params, "emas", true);
  expect_count(copies, params, "copies", true);
  const double norm = scalar_of(grad_norm, "grad_norm"), rate = scalar_of(lr, "lr");
  Tensors contiguous(grads.size());
  std::vector<ParamBlock> whole(params.size());
  for (size_t t = 0; t < params.size(); ++t) {
    expect_twin(params[t], params[t], entry("params", t), true);
    expect_twin(exp_avgs[t], params[t], entry("exp_avgs", t), true);
    expect_twin(exp_avg_sqs[t], params[t], entry("exp_avg_sqs", t), true);
    if (!emas.empty()) expect_twin(emas[t], params[t], entry("emas", t), true);
    if (!copies.empty()) expect_twin(copies[t], params[t], entry("copies", t), false);
    contiguous[t] = grads[t].is_contiguous() ? grads[t] : torch::stable::contiguous(grads[t]);
    expect_twin(contiguous[t], params[t], entry("grads", t), false);
    whole[t] = {0, floats(params[t]), floats(exp_avgs[t]), floats(exp_avg_sqs[t]),
                emas.empty() ? nullptr : floats(emas[t]), contiguous[t].data_ptr(),
                copies.empty() ? nullptr : copies[t].data_ptr(), dtype_of(contiguous[t], "grads"),
                copies.empty() ? DType::kFloat32 : dtype_of(copies[t], "copies")};
    check(copies.empty() || whole[t].copy_dtype != DType::kFloat32, entry("copies", t),
                    ": dtype must be bfloat16 or float16");
  }
  if (!std::isfinite(norm)) return;
  const double steps = advance(step);
  AdamW c = {};
  c.one_minus_beta1 = static_cast<float>(1 - beta1);
  c.beta2 = static_cast<float>(beta2);
  c.one_minus_beta2 = static_cast<float>(1 - beta2);
  c.eps = static_cast<float>(eps);
  c.decay = static_cast<float>(1 - rate * weight_decay);
  c.step_size = static_cast<float>(rate / (1 - std::pow(beta1, steps)));
  c.bias2_sqrt = static_cast<float>(std::sqrt(1 - std::pow(beta2, steps)));
  c.clip = max_norm > 0 ? std::min(1.0f, static_cast<float>(max_norm) / (static_cast<float>(norm) + 1e-6f)) : 1.0f;
  c.ema_weight = static_cast<float>(ema_warmup ? std::max(1 - ema_decay, 9 / (9 + steps)) : 1 - ema_decay);
  each_piece(pieces_of(params), [&](const Piece& piece, int64_t) {
    ParamBlock block = whole[piece.tensor];
    block.count = piece.count;
    block.param += piece.first;
    block.exp_avg += piece.first;
    block.exp_avg_sq += piece.first;
    if (block.ema) block.ema += piece.first;
    block.grad = static_cast<const char*>(block.grad) + piece.first * (block.grad_dtype == DType::kFloat32 ? 4 : 2);
    if (block.copy) block.copy = static_cast<uint16_t*>(block.copy) + piece.first;
    kernels().adamw_ema(c, block);
  });
}

}  // namespace

ST_LIBRARY(CPU, m) {
  ST_IMPL(m, grad_norm);
  ST_IMPL(m, adamw_ema_);
}

}  // namespace st_fast
