// st_fast::grad_norm on CUDA: float64 sums over fixed spans, added in a fixed order by one block.
#include "multi_tensor.cuh"

namespace st_fast {
namespace {

__device__ double block_sum(double mine) {
  __shared__ double lanes[kThreads];
  lanes[threadIdx.x] = mine;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
    __syncthreads();
  }
  return lanes[0];
}

template <class T>
__global__ void __launch_bounds__(kThreads) sum_of_squares(const Table table, double* partial) {
  const Span span = span_of(table, blockIdx.x);
  double sum = 0;
  for (int64_t i = threadIdx.x * 4; i < span.count; i += kThreads * 4) {
    const int count = span.count - i < 4 ? static_cast<int>(span.count - i) : 4;
    float g[4];
    load_four<T>(table.data[span.tensor][kGrad], span.first + i, count, g);
    for (int k = 0; k < 4; ++k) sum += static_cast<double>(g[k]) * g[k];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) root_of_sum(const double* partial, int64_t count, float* norm) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *norm = static_cast<float>(sqrt(sum));
}

Tensor grad_norm(const std::vector<Tensor>& given) {
  check(!given.empty(), "grads: none given");
  const OnDevice device(given[0]);
  const std::vector<Tensor> grads = contiguous(given);
  int64_t blocks = 0, done = 0;
  for (const Tensor& g : grads) blocks += divide_up(g.numel(), kElementsPerBlock);
  Tensor partial = device.empty(blocks > 0 ? blocks : 1, aoti_torch_dtype_float64());
  Tensor norm = device.empty(1, aoti_torch_dtype_float32(), true);
  double* sums = static_cast<double*>(partial.data_ptr());
  const DType dtype = common_dtype(grads, "grads");
  each_table(
      grads, [&](Table& table, int slot, size_t i) { table.data[slot][kGrad] = grads[i].data_ptr(); },
      [&](const Table& table, int count) {
        if (dtype == DType::kFloat32) sum_of_squares<float><<<count, kThreads, 0, device.stream()>>>(table, sums + done);
        else if (dtype == DType::kBFloat16)
          sum_of_squares<__nv_bfloat16><<<count, kThreads, 0, device.stream()>>>(table, sums + done);
        else sum_of_squares<__half><<<count, kThreads, 0, device.stream()>>>(table, sums + done);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
        done += count;
      });
  root_of_sum<<<1, kThreads, 0, device.stream()>>>(sums, blocks, static_cast<float*>(norm.data_ptr()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return norm;
}

}  // namespace

ST_LIBRARY(CUDA, m) { ST_IMPL(m, grad_norm); }

}  // namespace st_fast
