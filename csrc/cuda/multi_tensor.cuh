// Lists of tensors as kernels take them: a table of pointers in the launch's parameters (under 4 KB), one block per
// kElementsPerBlock elements of one tensor. No copy to the device, no host sync, so a CUDA graph can hold it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "../cpu/tensors.h"

namespace st_fast {

constexpr int kElementsPerBlock = 16384;
constexpr int kThreads = 512;
constexpr int kTensorsPerLaunch = 56;

enum Role { kGrad, kParam, kExpAvg, kExpAvgSq, kEma, kCopy, kRoles };

struct Table {
  int count;
  int first_block[kTensorsPerLaunch + 1];
  int64_t numel[kTensorsPerLaunch];
  void* data[kTensorsPerLaunch][kRoles];
};
static_assert(sizeof(Table) <= 3840, "the kernel parameters must stay below 4 KB");

struct Span {  // what one block works on
  int tensor;
  int64_t first, count;
};

__device__ inline Span span_of(const Table& table, int block) {
  int low = 0, high = table.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.first_block[middle] <= block) low = middle;
    else high = middle;
  }
  const int64_t first = static_cast<int64_t>(block - table.first_block[low]) * kElementsPerBlock;
  const int64_t rest = table.numel[low] - first;
  return {low, first, rest < kElementsPerBlock ? rest : kElementsPerBlock};
}

// Calls launch(table, blocks) for as many tables as the list needs; `fill(table, slot, i)` writes the pointers.
template <class Fill, class Launch>
void each_table(const std::vector<Tensor>& tensors, Fill&& fill, Launch&& launch) {
  Table table = {};
  const auto flush = [&] {
    if (table.count > 0) launch(table, table.first_block[table.count]);
    table.count = 0;
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t numel = tensors[i].numel();
    if (numel == 0) continue;
    const int slot = table.count++;
    fill(table, slot, i);
    table.numel[slot] = numel;
    table.first_block[slot + 1] = table.first_block[slot] + static_cast<int>(divide_up(numel, kElementsPerBlock));
    if (table.count == kTensorsPerLaunch) flush();
  }
  flush();
}

// The device of a list made current, and its stream, while in scope.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : index_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_cuda_guard(index_, &guard_));
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  ~OnDevice() { aoti_torch_delete_cuda_guard(guard_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaStream_t stream() const { return stream_; }
  Tensor empty(int64_t count, int32_t dtype, bool scalar = false) const {
    const int64_t stride = 1;
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(scalar ? 0 : 1, &count, &stride, dtype,
                                                    aoti_torch_device_type_cuda(), index_, &handle));
    return Tensor(handle);
  }

 private:
  int32_t index_;
  CUDAGuardHandle guard_ = nullptr;
  cudaStream_t stream_ = nullptr;
};

__device__ inline float as_float(float x) { return x; }
__device__ inline float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float as_float(__half x) { return __half2float(x); }

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T value[4];
};

template <class T>
__device__ inline bool whole(const T* p, int count) {
  return count == 4 && reinterpret_cast<uintptr_t>(p) % sizeof(Four<T>) == 0;
}

// Four elements, or the first `count` of them at the end of a tensor. One access where the address allows it.
template <class T>
__device__ inline void load_four(const void* data, int64_t at, int count, float* to) {
  const T* from = static_cast<const T*>(data) + at;
  if (whole(from, count)) {
    const Four<T> four = *reinterpret_cast<const Four<T>*>(from);
    for (int i = 0; i < 4; ++i) to[i] = as_float(four.value[i]);
  } else {
    for (int i = 0; i < 4; ++i) to[i] = i < count ? as_float(from[i]) : 0.0f;
  }
}

template <class T>
__device__ inline void store_four(void* data, int64_t at, int count, const float* from) {
  T* to = static_cast<T*>(data) + at;
  if (whole(to, count)) {
    Four<T> four;
    for (int i = 0; i < 4; ++i) four.value[i] = static_cast<T>(from[i]);
    *reinterpret_cast<Four<T>*>(to) = four;
  } else {
    for (int i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
  }
}

inline std::vector<Tensor> contiguous(const std::vector<Tensor>& tensors) {
  std::vector<Tensor> out;
  out.reserve(tensors.size());
  for (const Tensor& t : tensors) out.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
  return out;
}

inline DType common_dtype(const std::vector<Tensor>& tensors, const char* name) {
  const DType dtype = dtype_of(tensors[0], name);
  for (const Tensor& t : tensors) check(dtype_of(t, name) == dtype, name, ": all must have one dtype");
  return dtype;
}

}  // namespace st_fast
