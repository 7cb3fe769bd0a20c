/* cuBLAS and cuBLASLt: every product is a launch; what is asked of the libraries here gets an answer.
 *
 * cuBLAS's headers are not included, since the CUDA compiler's package lacks them. The other entry points, which
 * need no answer, are in rest.c. */
#include "stand_in.h"

#include <string.h>

static int handle; /* its address is every handle */
static _Thread_local struct stream *stream;

int blas_launch(void) { return launch(stream); }

EXPORT int cublasCreate_v2(void **made) { *made = &handle; return status(); }
EXPORT int cublasLtCreate(void **made) { *made = &handle; return status(); }
EXPORT int cublasSetStream_v2(void *blas, void *chosen) { stream = chosen; return status(); }
EXPORT int cublasGetStream_v2(void *blas, void **chosen) { *chosen = stream; return OK; }
EXPORT int cublasGetPointerMode_v2(void *blas, int *mode) { *mode = 0; return OK; }
EXPORT int cublasGetMathMode(void *blas, int *mode) { *mode = 0; return OK; }
EXPORT int cublasGetVersion_v2(void *blas, int *version) { *version = 130100; return OK; }
EXPORT size_t cublasLtGetVersion(void) { return 130100; }
EXPORT const char *cublasGetStatusName(int code) { return error_name(code); }
EXPORT const char *cublasGetStatusString(int code) { return error_text(code); }

/* One algorithm serves all; cublasLtMatmulHeuristicResult_t has 96 bytes, and zeros mean success without workspace. */
EXPORT int cublasLtMatmulAlgoGetHeuristic(
    void *blas, void *what, void *a, void *b, void *c, void *d, void *preference, int wanted, void *results,
    int *found) {
  memset(results, 0, 96);
  *found = wanted > 0;
  return status();
}
EXPORT int cublasLtMatmul(
    void *blas, void *what, const void *alpha, const void *a, void *a_layout, const void *b, void *b_layout,
    const void *beta, const void *c, void *c_layout, void *d, void *d_layout, const void *algorithm, void *workspace,
    size_t bytes, void *chosen) {
  return launch(chosen);
}
