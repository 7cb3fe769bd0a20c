/* libcudart: what torch calls of it, over the device of state.c. Everything else is in rest.c, and says so. */
#include "stand_in.h"

#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

#if CUDART_VERSION < 13000
#error "headers of CUDA 13 or newer are needed"
#endif

typedef struct stream *Stream;

static size_t total(void) {
  size_t free_bytes, all;
  memory_info(&free_bytes, &all);
  return all;
}

/* The device. */
EXPORT cudaError_t cudaGetDeviceCount(int *count) { *count = device_count(); return *count ? OK : NO_DEVICE; }
EXPORT cudaError_t cudaGetDevice(int *device) { *device = 0; return OK; }
EXPORT cudaError_t cudaSetDevice(int device) { return device ? INVALID_VALUE : OK; }
EXPORT cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return OK; }
EXPORT cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return OK; }
EXPORT cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  *value = device_attribute((int)attribute);
  return OK;
}
EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
  *properties = (struct cudaDeviceProp){
      .major = device_attribute(cudaDevAttrComputeCapabilityMajor),
      .minor = device_attribute(cudaDevAttrComputeCapabilityMinor),
      .totalGlobalMem = total(),
      .multiProcessorCount = device_attribute(cudaDevAttrMultiProcessorCount),
      .sharedMemPerBlock = (size_t)device_attribute(cudaDevAttrMaxSharedMemoryPerBlock),
      .sharedMemPerBlockOptin = (size_t)device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
      .sharedMemPerMultiprocessor = (size_t)device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor),
      .regsPerBlock = device_attribute(cudaDevAttrMaxRegistersPerBlock),
      .regsPerMultiprocessor = device_attribute(cudaDevAttrMaxRegistersPerMultiprocessor),
      .maxThreadsPerBlock = device_attribute(cudaDevAttrMaxThreadsPerBlock),
      .maxThreadsPerMultiProcessor = device_attribute(cudaDevAttrMaxThreadsPerMultiProcessor),
      .warpSize = device_attribute(cudaDevAttrWarpSize),
      .l2CacheSize = device_attribute(cudaDevAttrL2CacheSize),
      .maxThreadsDim = {1024, 1024, 64},
      .maxGridSize = {2147483647, 65535, 65535},
  };
  strcpy(properties->name, DEVICE_NAME);
  return OK;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
  strncpy(id, "0000:00:00.0", (size_t)length);
  return OK;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int one, int other) {
  *can = 0;
  return OK;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return OK;
}
EXPORT cudaError_t cudaDeviceSynchronize(void) { return synchronize_device(); }
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result) {
  *function = driver_entry_point(name);
  if (result) *result = cudaDriverEntryPointSuccess;
  return OK;
}
EXPORT cudaError_t cudaProfilerStart(void) { return status(); }
EXPORT cudaError_t cudaProfilerStop(void) { return status(); }

/* Errors. One that goes is never left over: only what lasts is asked for. */
EXPORT cudaError_t cudaGetLastError(void) { return status(); }
EXPORT cudaError_t cudaPeekAtLastError(void) { return status(); }
EXPORT const char *cudaGetErrorName(cudaError_t error) { return error_name((int)error); }
EXPORT const char *cudaGetErrorString(cudaError_t error) { return error_text((int)error); }

/* Memory. */
EXPORT cudaError_t cudaMalloc(void **address, size_t bytes) { return allocate(address, bytes, DEVICE); }
EXPORT cudaError_t cudaFree(void *address) { return release(address); }
EXPORT cudaError_t cudaHostAlloc(void **address, size_t bytes, unsigned flags) {
  return allocate(address, bytes, PINNED);
}
EXPORT cudaError_t cudaFreeHost(void *address) { return release(address); }
EXPORT cudaError_t cudaHostRegister(void *address, size_t bytes, unsigned flags) {
  return pin(address, bytes);
}
EXPORT cudaError_t cudaHostUnregister(void *address) { return release(address); }
EXPORT cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *all) {
  memory_info(free_bytes, all);
  return status();
}
EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
  static const enum cudaMemoryType types[] = {
      [UNKNOWN] = cudaMemoryTypeUnregistered, [DEVICE] = cudaMemoryTypeDevice, [PINNED] = cudaMemoryTypeHost};
  enum kind kind = kind_of(address, NULL, NULL);
  memset(attributes, 0, sizeof *attributes);
  attributes->type = types[kind];
  if (kind != UNKNOWN) attributes->devicePointer = (void *)address;
  if (kind != DEVICE) attributes->hostPointer = (void *)address;
  return status();
}
EXPORT cudaError_t cudaMemcpyAsync(
    void *target, const void *source, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(target, source, bytes, (Stream)stream);
}
EXPORT cudaError_t cudaMemcpyPeerAsync(
    void *target, int to, const void *source, int from, size_t bytes, cudaStream_t stream) {
  return copy(target, source, bytes, (Stream)stream);
}
EXPORT cudaError_t cudaMemcpy(void *target, const void *source, size_t bytes, enum cudaMemcpyKind kind) {
  int error = forbidden_in_capture();
  if (error) return error;
  count(SYNCS);
  return copy(target, source, bytes, NULL);
}
EXPORT cudaError_t cudaMemcpy2DAsync(
    void *target, size_t target_pitch, const void *source, size_t source_pitch, size_t width, size_t height,
    enum cudaMemcpyKind kind, cudaStream_t stream) {
  for (size_t row = 0; row < height; row++) {
    int error = copy(
        (char *)target + row * target_pitch, (const char *)source + row * source_pitch, width, (Stream)stream);
    if (error) return error;
  }
  return status();
}
EXPORT cudaError_t cudaMemsetAsync(void *target, int value, size_t bytes, cudaStream_t stream) {
  return fill(target, value, bytes, (Stream)stream);
}
EXPORT cudaError_t cudaMemset(void *target, int value, size_t bytes) { return fill(target, value, bytes, NULL); }

/* Streams and events. */
static cudaError_t new_stream(cudaStream_t *stream, int priority) {
  struct stream *made = calloc(1, sizeof *made);
  made->priority = priority;
  *stream = (cudaStream_t)made;
  return status();
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t *stream) { return new_stream(stream, 0); }
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
  return new_stream(stream, 0);
}
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  return new_stream(stream, priority);
}
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t stream) { free(stream); return status(); }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
  *priority = (size_t)stream > 2 ? ((Stream)stream)->priority : 0;
  return OK;
}
EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) { return status(); }
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return synchronize((Stream)stream); }
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
  return wait_event((Stream)stream, (struct event *)event);
}
EXPORT cudaError_t cudaStreamAddCallback(
    cudaStream_t stream, cudaStreamCallback_t callback, void *data, unsigned flags) {
  callback(stream, (cudaError_t)status(), data);
  return status();
}
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
  if (!capture_of((Stream)stream)) function(data);
  return status();
}
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
  *event = (cudaEvent_t)calloc(1, sizeof(struct event));
  return status();
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return status(); }
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return record_event((struct event *)event, (Stream)stream);
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return record_event((struct event *)event, (Stream)stream);
}
EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) { return status(); }
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  count(SYNCS);
  return status();
}
EXPORT cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
  *milliseconds = event_milliseconds();
  return status();
}

/* Captures and graphs. A graph that runs is one launch; its nodes are counted while they are captured. */
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  return begin_capture((Stream)stream, (int)mode);
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  return end_capture((Stream)stream, (struct graph **)graph);
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *state) {
  return cudaStreamGetCaptureInfo(stream, state, NULL, NULL, NULL, NULL, NULL);
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, enum cudaStreamCaptureStatus *state, unsigned long long *id, cudaGraph_t *graph,
    const cudaGraphNode_t **dependencies, const cudaGraphEdgeData **edges, size_t *number) {
  const struct capture *capture = capture_of((Stream)stream);
  *state = !capture            ? cudaStreamCaptureStatusNone
           : capture->invalid ? cudaStreamCaptureStatusInvalidated
                              : cudaStreamCaptureStatusActive;
  if (capture && id) *id = capture->id;
  if (graph) *graph = NULL;
  if (dependencies) *dependencies = NULL;
  if (edges) *edges = NULL;
  if (number) *number = 0;
  return status();
}
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
  *mode = (enum cudaStreamCaptureMode)exchange_mode((int)*mode);
  return OK;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
  struct graph *own = malloc(sizeof *own);
  *own = *(struct graph *)graph;
  *made = (cudaGraphExec_t)own;
  return status();
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *number) {
  if (nodes) return unsupported("cudaGraphGetNodes with room for nodes");
  *number = ((struct graph *)graph)->nodes;
  return status();
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  return launch_graph((struct graph *)graph, (Stream)stream);
}
EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) { free(graph); return OK; }
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { free(graph); return OK; }

/* Kernels. */
EXPORT cudaError_t cudaLaunchKernel(
    const void *function, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
  return launch((Stream)stream);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
  return launch((Stream)config->stream);
}
EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  return OK;
}
EXPORT cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) {
  return status();
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *function, int threads, size_t shared, unsigned flags) {
  *blocks = 4;
  return OK;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(
    int *blocks, const void *function, int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}

/* What nvcc's code calls behind <<<…>>>: the configuration goes from one call to the next. */
static _Thread_local struct { dim3 grid, block; size_t shared; void *stream; } configuration;

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  configuration.grid = grid, configuration.block = block;
  configuration.shared = shared, configuration.stream = stream;
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = configuration.grid, *block = configuration.block;
  *shared = configuration.shared, *(void **)stream = configuration.stream;
  return OK;
}
EXPORT cudaError_t __cudaGetKernel(void **kernel, const void *function) { *kernel = (void *)function; return OK; }
EXPORT cudaError_t __cudaLaunchKernel(
    void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
EXPORT void **__cudaRegisterFatBinary(void *code) { return (void **)code; }
EXPORT void __cudaRegisterFatBinaryEnd(void **code) {}
EXPORT void __cudaUnregisterFatBinary(void **code) {}
EXPORT char __cudaInitModule(void **code) { return 1; }
EXPORT void __cudaRegisterFunction(
    void **code, const char *host, char *device, const char *name, int limit, void *tid, void *bid, void *block,
    void *grid, int *warp) {
}
EXPORT void __cudaRegisterVar(
    void **code, char *host, char *address, const char *name, int external, size_t bytes, int constant, int global) {
}
