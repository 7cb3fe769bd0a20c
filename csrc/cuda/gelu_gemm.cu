// st_fast::lt_linear_gelu and lt_gelu_backward: an MLP's two products that GELU belongs to, with it in their epilogue
// (cuBLASLt). kernels/mlp/cublaslt.py calls them and does without where they answer that they can't.
//
// cuBLASLt thinks in columns: it computes D (m×n) = op(A)·op(B), and element (i, j) of a matrix lies at i + j·ld. A
// contiguous row-major tensor T (r, c) is therefore, without moving a byte, the matrix Tᵀ (c×r) with ld = c. So
//
//   forward     H = X·Wᵀ + b            X (R, K), W (M, K), b (M,), H (R, M)
//               Hᵀ = W·Xᵀ + b·1ᵀ        m = M, n = R, k = K
//               A: W's memory is Wᵀ (K×M, ld K), so op(A) = its transpose; B: X's is Xᵀ (K×R, ld K), as it is
//               D ← gelu(Hᵀ) (M×R, ld M): G (R, M); aux ← Hᵀ (ld M): H (R, M); b: one number a row of D, m = M of them
//
//   backward    dH = (dY·V)∘gelu'(H)    dY (R, P), V (P, M), H (R, M), dH (R, M)
//               dHᵀ = (Vᵀ·dYᵀ)∘gelu'(Hᵀ)  m = M, n = R, k = P
//               A: V's memory is Vᵀ (M×P, ld M), as it is; B: dY's is dYᵀ (P×R, ld P), as it is
//               D ← dHᵀ (M×R, ld M): dH (R, M); aux = Hᵀ (ld M); bias ← D summed over its columns, the R tokens: (M,)
//
// Sums are kept in float32. cuBLASLt's GELU is the tanh form.
#include "cublaslt.h"
#include "multi_tensor.cuh"

#include <array>
#include <map>
#include <mutex>
#include <optional>

namespace st_fast {
namespace {

enum Answer : int64_t { kDone = 0, kUnfit = 1, kNoAlgorithm = 2, kNewInCapture = 3 };  // as in cublaslt.py

constexpr int64_t kMebibyte = 1 << 20, kMultiple = 8, kBytes = 16;

struct Product {  // D (m×n) = op(A)·B with an epilogue, all in one 16-bit type
  lt::Epilogue epilogue;
  bool transpose_a;
  int64_t m, n, k;
  const void *a, *b;
  void *bias, *aux, *d;
  DType dtype;
};

struct Plan {  // what is found out once for products that look alike
  void *description = nullptr, *a = nullptr, *b = nullptr, *d = nullptr;
  lt::Heuristic chosen = {};
  bool fits = false;
};

using Key = std::array<int64_t, 8>;

std::mutex lock;  // over all that is below, and while a plan's pointers are being set and used
std::map<int32_t, void*> handles;
std::map<Key, Plan> plans;

void expect(int status, const char* what) { check(status == lt::kSuccess, what, " failed with cuBLAS status ", status); }

// The largest power of two that divides an address, at most 256: what cuBLASLt asks about alignment.
uint32_t alignment(const void* address) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(address) | 256;
  return static_cast<uint32_t>(bits & (~bits + 1));
}

std::array<const void*, 5> addresses(const Product& p) { return {p.a, p.b, p.bias, p.aux, p.d}; }

int64_t alignments(const Product& p) {
  int64_t all = 0;
  for (const void* address : addresses(p)) all = all * 512 + alignment(address);
  return all;
}

bool fits(const Product& p) {
  bool all = p.m > 0 && p.n > 0 && p.k > 0 && p.m % kMultiple == 0 && p.k % kMultiple == 0;
  for (const void* address : addresses(p)) all = all && alignment(address) >= kBytes;
  return all;
}

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus state;
  check(cudaStreamIsCapturing(stream, &state) == cudaSuccess, "the stream's state is not known");
  return state != cudaStreamCaptureStatusNone;
}

uint64_t most_workspace(int32_t device) {
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return static_cast<uint64_t>((major >= 9 ? 32 : 8) * kMebibyte);
}

void point(void* description, const Product& p) {
  expect(lt::library().set(description, lt::kBiasPointer, &p.bias, sizeof p.bias), "the bias's address");
  expect(lt::library().set(description, lt::kAuxPointer, &p.aux, sizeof p.aux), "the address of GELU's input");
}

Plan make_plan(const Product& p, int32_t device) {
  const lt::Library& l = lt::library();
  void*& handle = handles[device];
  if (!handle) expect(l.create(&handle), "cublasLtCreate");
  Plan plan;
  const int type = p.dtype == DType::kBFloat16 ? CUDA_R_16BF : CUDA_R_16F;
  const int32_t transpose = lt::kTranspose;
  const uint32_t epilogue = p.epilogue;
  expect(l.describe(&plan.description, lt::kCompute32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
  if (p.transpose_a) expect(l.set(plan.description, lt::kTransA, &transpose, sizeof transpose), "transposing");
  expect(l.set(plan.description, lt::kEpilogue, &epilogue, sizeof epilogue), "the epilogue");
  expect(l.set(plan.description, lt::kAuxLd, &p.m, sizeof p.m), "the stride of GELU's input");
  point(plan.description, p);  // the choice looks at the addresses' alignment
  const int64_t rows = p.transpose_a ? p.k : p.m, columns = p.transpose_a ? p.m : p.k;
  expect(l.lay_out(&plan.a, type, rows, columns, rows), "the layout of A");
  expect(l.lay_out(&plan.b, type, p.k, p.n, p.k), "the layout of B");
  expect(l.lay_out(&plan.d, type, p.m, p.n, p.m), "the layout of D");
  void* preference;
  const uint64_t workspace = most_workspace(device);
  const uint32_t scheme = lt::kReduceInComputeType, a = alignment(p.a), b = alignment(p.b), d = alignment(p.d);
  expect(l.prefer(&preference), "cublasLtMatmulPreferenceCreate");
  expect(l.set_preference(preference, lt::kMaxWorkspaceBytes, &workspace, sizeof workspace), "the workspace's size");
  expect(l.set_preference(preference, lt::kReductionSchemeMask, &scheme, sizeof scheme), "the kind of reduction");
  expect(l.set_preference(preference, lt::kMinAlignmentABytes, &a, sizeof a), "the alignment of A");
  expect(l.set_preference(preference, lt::kMinAlignmentBBytes, &b, sizeof b), "the alignment of B");
  expect(l.set_preference(preference, lt::kMinAlignmentCBytes, &d, sizeof d), "the alignment of C");
  expect(l.set_preference(preference, lt::kMinAlignmentDBytes, &d, sizeof d), "the alignment of D");
  int found = 0;
  const int status = l.choose(handle, plan.description, plan.a, plan.b, plan.d, plan.d, preference, 1, &plan.chosen,
                              &found);
  l.drop_preference(preference);
  plan.fits = status == lt::kSuccess && found > 0 && plan.chosen.state == lt::kSuccess;
  return plan;
}

// The workspace is torch's: it belongs to the stream, or to the graph that is being captured, and costs no wait.
Answer multiply(const Product& p, const Tensor& on) {
  if (!fits(p)) return kUnfit;
  const OnDevice device(on);
  const int32_t index = on.get_device_index();
  const Key key = {index, static_cast<int64_t>(p.dtype), p.epilogue, p.transpose_a, p.m, p.n, p.k, alignments(p)};
  const std::lock_guard<std::mutex> hold(lock);
  auto known = plans.find(key);
  if (known == plans.end()) {
    if (capturing(device.stream())) return kNewInCapture;
    known = plans.emplace(key, make_plan(p, index)).first;
  }
  const Plan& plan = known->second;
  if (!plan.fits) return kNoAlgorithm;
  const size_t bytes = plan.chosen.workspace;
  std::optional<Tensor> workspace;
  if (bytes > 0) workspace = device.empty(divide_up(static_cast<int64_t>(bytes), 4), aoti_torch_dtype_float32());
  point(plan.description, p);
  const float one = 1, zero = 0;
  expect(lt::library().multiply(handles.at(index), plan.description, &one, p.a, plan.a, p.b, plan.b, &zero, p.d,
                                plan.d, p.d, plan.d, &plan.chosen.algorithm, workspace ? workspace->data_ptr() : nullptr, bytes,
                                device.stream()),
         "cublasLtMatmul");
  return kDone;
}

// A contiguous matrix or vector of the shape and type wanted.
void* data_of(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, DType dtype) {
  expect_shape(t, name, shape);
  check(t.is_contiguous() && t.is_cuda(), name, ": must be contiguous, on the GPU");
  check(dtype_of(t, name) == dtype && dtype != DType::kFloat32, name, ": all must be bfloat16, or all float16");
  return t.data_ptr();
}

int64_t lt_linear_gelu(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& g, const Tensor& h) {
  check(x.dim() == 2 && weight.dim() == 2, "x, weight: must be matrices");
  const int64_t rows = x.size(0), wide = weight.size(0), deep = weight.size(1);
  const DType dtype = dtype_of(x, "x");
  const Product p = {lt::kGeluAuxBias, true, wide, rows, deep, data_of(weight, "weight", {wide, deep}, dtype),
                     data_of(x, "x", {rows, deep}, dtype), data_of(bias, "bias", {wide}, dtype),
                     data_of(h, "h", {rows, wide}, dtype), data_of(g, "g", {rows, wide}, dtype), dtype};
  return multiply(p, x);
}

int64_t lt_gelu_backward(const Tensor& dy, const Tensor& weight, const Tensor& h, const Tensor& dh,
                         const Tensor& dbias) {
  check(dy.dim() == 2 && weight.dim() == 2, "dy, weight: must be matrices");
  const int64_t rows = dy.size(0), deep = weight.size(0), wide = weight.size(1);
  const DType dtype = dtype_of(dy, "dy");
  const Product p = {lt::kDGeluBGrad, false, wide, rows, deep, data_of(weight, "weight", {deep, wide}, dtype),
                     data_of(dy, "dy", {rows, deep}, dtype), data_of(dbias, "dbias", {wide}, dtype),
                     data_of(h, "h", {rows, wide}, dtype), data_of(dh, "dh", {rows, wide}, dtype), dtype};
  return multiply(p, dy);
}

}  // namespace

ST_FRAGMENT(m) {
  m.def("lt_linear_gelu(Tensor x, Tensor weight, Tensor bias, Tensor(a!) g, Tensor(b!) h) -> int");
  m.def("lt_gelu_backward(Tensor dy, Tensor weight, Tensor h, Tensor(a!) dh, Tensor(b!) dbias) -> int");
}

ST_LIBRARY(CUDA, m) {
  m.impl("lt_linear_gelu", TORCH_BOX(&lt_linear_gelu));
  m.impl("lt_gelu_backward", TORCH_BOX(&lt_gelu_backward));
}

}  // namespace st_fast

// The first name of cuBLASLt that this process does not have; null: all are there.
extern "C" __attribute__((visibility("default"))) const char* st_fast_cublaslt_lacks() {
  return st_fast::lt::library().missing;
}
