// The part of cuBLASLt that csrc calls, found in the process at the first use: torch has the library loaded already.
//
// Not linked, because then nothing of csrc would load where it is missing; and declared here, because the compiler's
// own packages of CUDA lack its header. The names and numbers are those of cublasLt.h and cublas_api.h, the same in
// CUDA 12 and 13; tests/stand_in/test_products.py compares them with the header where there is one.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>

namespace st_fast {
namespace lt {

constexpr int kSuccess = 0;        // CUBLAS_STATUS_SUCCESS
constexpr int kCompute32F = 68;    // CUBLAS_COMPUTE_32F
constexpr int32_t kTranspose = 1;  // CUBLAS_OP_T

enum Epilogue : uint32_t {
  kGeluAuxBias = 164,  // CUBLASLT_EPILOGUE_GELU_AUX_BIAS: aux ← AB + bias, D ← gelu(aux)
  kDGeluBGrad = 208,   // CUBLASLT_EPILOGUE_DGELU_BGRAD: D ← AB·gelu'(aux), bias ← the sum of D over its columns
};

enum Description {  // CUBLASLT_MATMUL_DESC_*
  kTransA = 3,
  kTransB = 4,
  kEpilogue = 7,
  kBiasPointer = 8,
  kAuxPointer = 11,
  kAuxLd = 12,
};

enum Preference {  // CUBLASLT_MATMUL_PREF_*
  kMaxWorkspaceBytes = 1,
  kReductionSchemeMask = 3,
  kMinAlignmentABytes = 5,
  kMinAlignmentBBytes = 6,
  kMinAlignmentCBytes = 7,
  kMinAlignmentDBytes = 8,
};
constexpr uint32_t kReduceInComputeType = 2;  // CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE: split sums stay in float32

struct Algorithm {  // cublasLtMatmulAlgo_t
  uint64_t data[8];
};

struct Heuristic {  // cublasLtMatmulHeuristicResult_t
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

struct Library {
  const char* missing = nullptr;  // the first name that the process does not have; nullptr: all are there
  int (*create)(void** handle);
  int (*describe)(void** description, int compute, int scale);
  int (*set)(void* description, int attribute, const void* value, size_t bytes);
  int (*lay_out)(void** layout, int type, uint64_t rows, uint64_t columns, int64_t ld);
  int (*prefer)(void** preference);
  int (*set_preference)(void* preference, int attribute, const void* value, size_t bytes);
  int (*drop_preference)(void* preference);
  int (*choose)(void* handle, void* description, void* a, void* b, void* c, void* d, void* preference, int wanted,
                Heuristic* results, int* found);
  int (*multiply)(void* handle, void* description, const void* alpha, const void* a, void* a_layout, const void* b,
                  void* b_layout, const void* beta, const void* c, void* c_layout, void* d, void* d_layout,
                  const Algorithm* algorithm, void* workspace, size_t workspace_bytes, void* stream);
};

inline void* symbol(const char* name) {
  if (void* found = dlsym(RTLD_DEFAULT, name)) return found;
  for (const char* file : {"libcublasLt.so.13", "libcublasLt.so.12"}) {
    if (void* loaded = dlopen(file, RTLD_NOLOAD | RTLD_LAZY)) {
      if (void* found = dlsym(loaded, name)) return found;
    }
  }
  return nullptr;
}

template <class F>
void find(Library& library, F*& function, const char* name) {
  function = reinterpret_cast<F*>(symbol(name));
  if (!function && !library.missing) library.missing = name;
}

inline const Library& library() {
  static const Library found = [] {
    Library l;
    find(l, l.create, "cublasLtCreate");
    find(l, l.describe, "cublasLtMatmulDescCreate");
    find(l, l.set, "cublasLtMatmulDescSetAttribute");
    find(l, l.lay_out, "cublasLtMatrixLayoutCreate");
    find(l, l.prefer, "cublasLtMatmulPreferenceCreate");
    find(l, l.set_preference, "cublasLtMatmulPreferenceSetAttribute");
    find(l, l.drop_preference, "cublasLtMatmulPreferenceDestroy");
    find(l, l.choose, "cublasLtMatmulAlgoGetHeuristic");
    find(l, l.multiply, "cublasLtMatmul");
    return l;
  }();
  return found;
}

}  // namespace lt
}  // namespace st_fast
