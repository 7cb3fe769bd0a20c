/* cuBLASLt: descriptions, layouts and preferences keep what is set, and every product is a launch. While a recording
 * is on, each choice of an algorithm and each product adds a line of JSON with all that it was asked for.
 *
 * cuBLAS's headers are not included, since the CUDA compiler's package lacks them. */
#include "stand_in.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ATTRIBUTES 64
struct record { /* of attributes, by their numbers */
  long long value[ATTRIBUTES];
};
enum { COMPUTE, SCALE, TRANS_A = 3, TRANS_B, EPILOGUE = 7, BIAS, AUX = 11, AUX_LD };
enum { TYPE, ROWS = 2, COLUMNS, LD };
enum { WORKSPACE = 1, SCHEME = 3, ALIGNMENT_A = 5, ALIGNMENT_B, ALIGNMENT_C, ALIGNMENT_D };

static int handle; /* its address is every handle */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *lines;
static size_t length;
static FILE *recording;
static long long refused = -1, workspace_bytes; /* an epilogue without an algorithm; what an algorithm wants */

EXPORT void stand_in_record(void) {
  pthread_mutex_lock(&lock);
  if (recording) fclose(recording);
  free(lines);
  lines = NULL;
  recording = open_memstream(&lines, &length);
  pthread_mutex_unlock(&lock);
}
EXPORT const char *stand_in_recorded(void) {
  if (recording) fflush(recording);
  return lines;
}
EXPORT void stand_in_refuse(long long epilogue) { refused = epilogue; }
EXPORT void stand_in_want_workspace(long long bytes) { workspace_bytes = bytes; }

static int make(void **made) { return (*made = calloc(1, sizeof(struct record))) ? status() : OUT_OF_MEMORY; }
static int set(void *of, int attribute, const void *value, size_t bytes) {
  if (attribute < 0 || attribute >= ATTRIBUTES || bytes > sizeof(long long)) return INVALID_VALUE;
  struct record *record = of;
  record->value[attribute] = 0;
  memcpy(&record->value[attribute], value, bytes);
  return status();
}
static int drop(void *of) {
  free(of);
  return OK;
}

EXPORT size_t cublasLtGetVersion(void) { return 130100; }
EXPORT int cublasLtCreate(void **made) {
  if (forbidden_in_capture()) return CAPTURE_UNSUPPORTED;
  *made = &handle;
  return status();
}
EXPORT int cublasLtMatmulDescCreate(void **made, int compute, int scale) {
  int code = make(made);
  if (code == OK) {
    ((struct record *)*made)->value[COMPUTE] = compute;
    ((struct record *)*made)->value[SCALE] = scale;
    ((struct record *)*made)->value[EPILOGUE] = 1;
  }
  return code;
}
EXPORT int cublasLtMatmulDescSetAttribute(void *of, int attribute, const void *value, size_t bytes) {
  return set(of, attribute, value, bytes);
}
EXPORT int cublasLtMatmulDescDestroy(void *of) { return drop(of); }
EXPORT int cublasLtMatrixLayoutCreate(
    void **made, int type, unsigned long long rows, unsigned long long columns, long long ld) {
  int code = make(made);
  if (code == OK) {
    struct record *layout = *made;
    layout->value[TYPE] = type;
    layout->value[ROWS] = (long long)rows;
    layout->value[COLUMNS] = (long long)columns;
    layout->value[LD] = ld;
  }
  return code;
}
EXPORT int cublasLtMatrixLayoutSetAttribute(void *of, int attribute, const void *value, size_t bytes) {
  return set(of, attribute, value, bytes);
}
EXPORT int cublasLtMatrixLayoutDestroy(void *of) { return drop(of); }
EXPORT int cublasLtMatmulPreferenceCreate(void **made) { return make(made); }
EXPORT int cublasLtMatmulPreferenceSetAttribute(void *of, int attribute, const void *value, size_t bytes) {
  return set(of, attribute, value, bytes);
}
EXPORT int cublasLtMatmulPreferenceDestroy(void *of) { return drop(of); }

static void tell_layout(const char *name, const struct record *of) {
  fprintf(
      recording, ", \"%s\": {\"type\": %lld, \"rows\": %lld, \"columns\": %lld, \"ld\": %lld}", name, of->value[TYPE],
      of->value[ROWS], of->value[COLUMNS], of->value[LD]);
}
static void tell(
    const char *what, const struct record *of, const struct record *a, const struct record *b, const struct record *c,
    const struct record *d) {
  const long long *value = of->value;
  fprintf(
      recording,
      "{\"what\": \"%s\", \"compute\": %lld, \"scale\": %lld, \"trans_a\": %lld, \"trans_b\": %lld, \"epilogue\": %lld, "
      "\"bias\": %lld, \"aux\": %lld, \"aux_ld\": %lld",
      what, value[COMPUTE], value[SCALE], value[TRANS_A], value[TRANS_B], value[EPILOGUE], value[BIAS], value[AUX],
      value[AUX_LD]);
  tell_layout("a", a);
  tell_layout("b", b);
  tell_layout("c", c);
  tell_layout("d", d);
}

/* cublasLtMatmulHeuristicResult_t has 96 bytes: the algorithm, its workspace's bytes at 64, and zeros for success. */
EXPORT int cublasLtMatmulAlgoGetHeuristic(
    void *blas, void *what, void *a, void *b, void *c, void *d, void *preference, int wanted, void *results,
    int *found) {
  const struct record *of = what;
  memset(results, 0, 96);
  memcpy((char *)results + 64, &workspace_bytes, sizeof(size_t));
  *found = wanted > 0 && of->value[EPILOGUE] != refused;
  pthread_mutex_lock(&lock);
  if (recording) {
    const long long *value = ((struct record *)preference)->value;
    tell("choice", of, a, b, c, d);
    fprintf(
        recording, ", \"workspace\": %lld, \"scheme\": %lld, \"alignments\": [%lld, %lld, %lld, %lld]}\n",
        value[WORKSPACE], value[SCHEME], value[ALIGNMENT_A], value[ALIGNMENT_B], value[ALIGNMENT_C],
        value[ALIGNMENT_D]);
  }
  pthread_mutex_unlock(&lock);
  return status();
}
EXPORT int cublasLtMatmul(
    void *blas, void *what, const void *alpha, const void *a, void *a_layout, const void *b, void *b_layout,
    const void *beta, const void *c, void *c_layout, void *d, void *d_layout, const void *algorithm, void *workspace,
    size_t bytes, void *chosen) {
  const struct record *of = what;
  pthread_mutex_lock(&lock);
  if (recording) {
    tell("product", of, a_layout, b_layout, c_layout, d_layout);
    const void *pointers[] = {a, b, c, d, workspace, chosen};
    fprintf(recording, ", \"pointers\": [");
    for (int i = 0; i < 6; i++) fprintf(recording, "%s%zu", i ? ", " : "", (size_t)pointers[i]);
    const bool single = of->value[SCALE] == 0; /* CUDA_R_32F */
    fprintf(
        recording, "], \"workspace\": %zu, \"alpha\": %g, \"beta\": %g}\n", bytes,
        single ? *(const float *)alpha : *(const double *)alpha, single ? *(const float *)beta : *(const double *)beta);
  }
  pthread_mutex_unlock(&lock);
  return launch(chosen);
}
