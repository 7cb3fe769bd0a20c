// Tensors of the LibTorch stable ABI as the kernels want them, checks that keep a wrong call from reading foreign
// memory, and the way from an op's name to its function. Only names that torch 2.11's headers have: its macros.h comes
// with none of the others, and TORCH_ERROR_CODE_CHECK is what newer headers' STABLE_TORCH_ERROR_CODE_CHECK means there.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"

// The ops' namespace. A build for the Hugging Face hub names one of its own, so that versions live side by side.
#ifndef TORCH_EXTENSION_NAME
#define TORCH_EXTENSION_NAME st_fast
#endif
#define ST_LIBRARY_IN(space, device, library) STABLE_TORCH_LIBRARY_IMPL(space, device, library)
#define ST_LIBRARY(device, library) ST_LIBRARY_IN(TORCH_EXTENSION_NAME, device, library)
#define ST_FRAGMENT_IN(space, library) STABLE_TORCH_LIBRARY_FRAGMENT(space, library)
#define ST_FRAGMENT(library) ST_FRAGMENT_IN(TORCH_EXTENSION_NAME, library)
#define ST_TEXT_OF(name) #name
#define ST_TEXT(name) ST_TEXT_OF(name)

namespace st_fast {

using torch::stable::Tensor;

inline int32_t dtype_code(AtenTensorHandle tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &code));
  return code;
}

// Throws one clear line where `holds` is false.
template <class... Parts>
void check(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline DType dtype_of(const Tensor& t, const char* name) {
  const int32_t code = dtype_code(t.get());
  if (code == aoti_torch_dtype_float32()) return DType::kFloat32;
  if (code == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  check(code == aoti_torch_dtype_float16(), name, ": dtype must be float32, bfloat16 or float16");
  return DType::kFloat16;
}

inline bool is_float32(const Tensor& t) { return dtype_code(t.get()) == aoti_torch_dtype_float32(); }

inline std::string shape_text(const int64_t* sizes, size_t n) {
  std::string text = "(";
  for (size_t i = 0; i < n; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + ")";
}

inline void expect_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> wanted) {
  const auto sizes = t.sizes();
  bool same = sizes.size() == wanted.size();
  for (size_t i = 0; same && i < wanted.size(); ++i) same = sizes[i] == wanted.begin()[i];
  check(same, name, ": shape ", shape_text(sizes.data(), sizes.size()), ", expected ",
                  shape_text(wanted.begin(), wanted.size()));
}

inline Tensor empty_strided(std::initializer_list<int64_t> sizes, const int64_t* strides, int32_t dtype) {
  AtenTensorHandle handle;
  const auto made = aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype,
                                             aoti_torch_device_type_cpu(), 0, &handle);
  check(made == TORCH_SUCCESS, "can't allocate memory for a result of shape ",
        shape_text(sizes.begin(), sizes.size()));
  return Tensor(handle);
}

// A contiguous, uninitialised CPU tensor. dtype is the shim's code, as `dtype_code` gives it.
inline Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) {
  int64_t strides[8], step = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = step;
    step *= sizes.begin()[i] > 1 ? sizes.begin()[i] : 1;
  }
  return empty_strided(sizes, strides, dtype);
}

// (B, H, N, d) that lies in memory in the order (B, N, H, d).
inline Tensor empty_token_major(int64_t B, int64_t H, int64_t N, int64_t d, int32_t dtype) {
  const int64_t strides[4] = {N * H * d, d, H * d, 1};
  return empty_strided({B, H, N, d}, strides, dtype);
}

inline Tensor empty_as(std::initializer_list<int64_t> sizes, const Tensor& dtype_from) {
  return empty(sizes, dtype_code(dtype_from.get()));
}

// (B, N, D), (B, D) or (D,) as rows; an axis that is not there has stride 0.
inline Rows rows(const Tensor& t, const char* name) {
  const int64_t dim = t.dim();
  const auto strides = t.strides();
  Rows r;
  r.data = t.data_ptr();
  r.dtype = dtype_of(t, name);
  r.channel = strides[dim - 1];
  r.batch = dim > 1 ? strides[0] : 0;
  r.token = dim > 2 ? strides[1] : 0;
  if (t.size(dim - 1) == 1) r.channel = 1;
  return r;
}

// Whether a result of this call, written whole in contiguous pieces of `row` elements, is written past the caches.
inline bool past_cache(const Tensor& t, int64_t row) {
  return is_float32(t) && t.numel() * 4 >= kPastCacheBytes && row * 4 % kLine == 0 &&
         reinterpret_cast<uintptr_t>(t.data_ptr()) % kLine == 0;
}

inline Rows result_rows(const Tensor& t, const char* name) {
  Rows r = rows(t, name);
  r.past_cache = past_cache(t, t.size(t.dim() - 1));
  return r;
}

// One of the three parts of a packed (B, N, 3, H, d) tensor.
inline Heads part_of(const Tensor& qkv, int part, const char* name) {
  const auto strides = qkv.strides();
  Heads heads;
  heads.rows.dtype = dtype_of(qkv, name);
  heads.rows.data = static_cast<char*>(qkv.data_ptr()) + part * strides[2] * static_cast<int64_t>(qkv.element_size());
  heads.rows.batch = strides[0];
  heads.rows.token = strides[1];
  heads.rows.channel = qkv.size(4) == 1 ? 1 : strides[4];
  heads.head = strides[3];
  return heads;
}

// A (B, H, N, d) tensor, of which these are the sizes.
inline Heads heads_of(const Tensor& t, const char* name, std::initializer_list<int64_t> sizes) {
  expect_shape(t, name, sizes);
  const auto strides = t.strides();
  Heads heads;
  heads.rows.dtype = dtype_of(t, name);
  heads.rows.data = t.data_ptr();
  heads.rows.batch = strides[0];
  heads.rows.token = strides[2];
  heads.rows.channel = t.size(3) == 1 ? 1 : strides[3];
  heads.head = strides[1];
  return heads;
}

inline float* floats(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

// True in a process made by fork: OpenMP's threads did not come along, and waiting for them would never end.
bool in_forked_child();

// Runs tasks 0..count of a kernel on torch's threads, or on this one where the work is small.
template <class Args>
void run(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t count, int64_t elements_per_task) {
  if (count == 0) return;
  if (in_forked_child()) return kernel(args, 0, count);
  const int64_t grain = elements_per_task < 32768 ? 32768 / (elements_per_task + 1) + 1 : 1;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// The gradient of a bias (D,): `count` partial sums (count, D), added in their order.
inline Tensor add_bias_partials(float* partial, int64_t count, int64_t D, const Tensor& bias) {
  expect_shape(bias, "bias", {D});
  Tensor sum = empty_as({D}, bias);
  AdaLN p = {};
  p.runs = 1;
  p.chunks = count;
  p.chunk_end = &count;
  p.D = D;
  p.sums = 1;
  p.partial = partial;
  p.dmod = rows(sum, "bias");
  kernels().sum_partials(p, 0, 1);
  return sum;
}

template <class T>
bool is_float64(StableIValue value) {
  if constexpr (std::is_same_v<std::remove_cv_t<std::remove_reference_t<T>>, Tensor>)
    return dtype_code(torch::stable::detail::to<AtenTensorHandle>(value)) == aoti_torch_dtype_float64();
  else
    return false;
}

// The boxed form of an op. float64, which gradcheck wants, goes to the same op in <namespace>_reference.
template <class Name, class F, F* function, class Result, class... Args, size_t... I>
void call(Result (*)(Args...), std::index_sequence<I...>, StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  if ((is_float64<Args>(stack[I]) || ...)) {
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(Name::text(), "", stack, TORCH_ABI_VERSION));
    return;
  }
  torch::stable::detail::boxer<F, function>::boxed_fn(stack, inputs, outputs);
}

template <class Result, class... Args>
constexpr size_t arity(Result (*)(Args...)) {
  return sizeof...(Args);
}

template <class Name, class F, F* function>
void boxed(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  call<Name, F, function>(function, std::make_index_sequence<arity(function)>{}, stack, inputs, outputs);
}

#define ST_IMPL(library, op)                                                                 \
  do {                                                                                       \
    struct Name {                                                                            \
      static const char* text() { return ST_TEXT(TORCH_EXTENSION_NAME) "_reference::" #op; } \
    };                                                                                       \
    library.impl(#op, st_fast::boxed<Name, decltype(op), &op>);                              \
  } while (0)

}  // namespace st_fast
