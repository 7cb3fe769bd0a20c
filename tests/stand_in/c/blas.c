/* cuBLAS: every product is a launch; what is asked of the library here gets an answer. cuBLASLt is in blaslt.c.
 *
 * cuBLAS's headers are not included, since the CUDA compiler's package lacks them. The other entry points, which
 * need no answer, are in rest.c. */
#include "stand_in.h"

static int handle; /* its address is every handle */
static _Thread_local struct stream *stream;

int blas_launch(void) { return launch(stream); }

EXPORT int cublasCreate_v2(void **made) { *made = &handle; return status(); }
EXPORT int cublasSetStream_v2(void *blas, void *chosen) { stream = chosen; return status(); }
EXPORT int cublasGetStream_v2(void *blas, void **chosen) { *chosen = stream; return OK; }
EXPORT int cublasGetPointerMode_v2(void *blas, int *mode) { *mode = 0; return OK; }
EXPORT int cublasGetMathMode(void *blas, int *mode) { *mode = 0; return OK; }
EXPORT int cublasGetVersion_v2(void *blas, int *version) { *version = 130100; return OK; }
EXPORT const char *cublasGetStatusName(int code) { return error_name(code); }
EXPORT const char *cublasGetStatusString(int code) { return error_text(code); }
