/* libcuda: what Triton, Inductor's launcher and torch's allocator call of it, over the device of state.c. */
#define _GNU_SOURCE
#include "stand_in.h"

#include <cuda.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

typedef struct stream *Stream;

static int context; /* its address is the one context's handle */

/* The device; both APIs number attributes alike. */
static const struct { int attribute, value; } ATTRIBUTES[] = {
    {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 9},
    {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 0},
    {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 132},
    {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
    {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y, 1024},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z, 64},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, 2147483647}, /* CUB steps through grids by it: 0 would never end */
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y, 65535},
    {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z, 65535},
    {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, 2048},
    {CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR, 32},
    {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65536},
    {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR, 65536},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 49152},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 232448},
    {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 233472},
    {CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, 50 << 20},
    {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1980000},
    {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 2619000},
    {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 5120},
    {CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, 1},
    {CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1},
    {CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH, 1},
};
int device_attribute(int attribute) {
  for (size_t i = 0; i < sizeof ATTRIBUTES / sizeof *ATTRIBUTES; i++)
    if (ATTRIBUTES[i].attribute == attribute) return ATTRIBUTES[i].value;
  return 0;
}
EXPORT CUresult cuInit(unsigned flags) { return device_count() ? OK : NO_DEVICE; }
EXPORT CUresult cuDriverGetVersion(int *version) { *version = CUDA_VERSION; return OK; }
EXPORT CUresult cuDeviceGetCount(int *count) { *count = device_count(); return OK; }
EXPORT CUresult cuDeviceGet(CUdevice *device, int number) { *device = number; return number ? INVALID_VALUE : OK; }
EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = device_attribute((int)attribute);
  return OK;
}
EXPORT CUresult cuGetErrorName(CUresult error, const char **name) { *name = error_name((int)error); return OK; }
EXPORT CUresult cuGetErrorString(CUresult error, const char **text) { *text = error_text((int)error); return OK; }

/* Contexts. */
EXPORT CUresult cuCtxGetCurrent(CUcontext *current) { *current = (CUcontext)&context; return status(); }
EXPORT CUresult cuCtxSetCurrent(CUcontext current) { return status(); }
EXPORT CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return status(); }
EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return OK; }
EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return OK; }
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *found, CUdevice device) {
  *found = (CUcontext)&context;
  return status();
}
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  *flags = 0;
  *active = 1;
  return OK;
}

/* Modules and kernels: a module has every kernel that is asked for. */
EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)image;
  return image ? status() : INVALID_VALUE;
}
EXPORT CUresult cuModuleLoad(CUmodule *module, const char *file) {
  *module = (CUmodule)file;
  return file ? status() : INVALID_VALUE;
}
EXPORT CUresult cuModuleUnload(CUmodule module) { return OK; }
EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return status();
}
EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = 0; /* nothing spills */
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK) *value = 1024;
  if (attribute == CU_FUNC_ATTRIBUTE_NUM_REGS) *value = 32;
  return OK;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return status();
}
EXPORT CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  return status();
}
EXPORT CUresult cuLaunchKernel(
    CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
    unsigned block_z, unsigned shared, CUstream stream, void **arguments, void **extra) {
  return launch((Stream)stream);
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **arguments, void **extra) {
  return launch((Stream)config->hStream);
}
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(
    int *blocks, CUfunction function, int threads, size_t shared) {
  *blocks = 4;
  return OK;
}
EXPORT CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
  *clusters = 16;
  return OK;
}

/* Pointers: Triton asks for every tensor's, and refuses the host's. */
EXPORT CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  enum kind kind = kind_of((const void *)pointer, NULL, NULL);
  if (kind == UNKNOWN) return INVALID_VALUE;
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)data = pointer;
  else if (attribute == CU_POINTER_ATTRIBUTE_MEMORY_TYPE)
    *(unsigned *)data = kind == DEVICE ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
  else return unsupported("cuPointerGetAttribute of this attribute");
  return status();
}
EXPORT CUresult cuMemGetAddressRange(CUdeviceptr *base, size_t *bytes, CUdeviceptr pointer) {
  void *start = NULL;
  size_t size = 0;
  if (kind_of((const void *)pointer, &start, &size) != DEVICE) return INVALID_VALUE;
  if (base) *base = (CUdeviceptr)start;
  if (bytes) *bytes = size;
  return status();
}

/* Memory in two steps, as expandable segments take it. A handle is the number of its bytes. */
EXPORT CUresult cuMemGetAllocationGranularity(
    size_t *bytes, const CUmemAllocationProp *wanted, CUmemAllocationGranularity_flags option) {
  *bytes = (size_t)2 << 20;
  return OK;
}
EXPORT CUresult cuMemAddressReserve(
    CUdeviceptr *address, size_t bytes, size_t alignment, CUdeviceptr wanted, unsigned long long flags) {
  return reserve((void **)address, bytes);
}
EXPORT CUresult cuMemAddressFree(CUdeviceptr address, size_t bytes) { return release((void *)address); }
EXPORT CUresult cuMemCreate(
    CUmemGenericAllocationHandle *handle, size_t bytes, const CUmemAllocationProp *wanted, unsigned long long flags) {
  int error = status() ? status() : take(bytes);
  if (!error) count(ALLOCATIONS);
  *handle = bytes;
  return error;
}
EXPORT CUresult cuMemRelease(CUmemGenericAllocationHandle handle) { return give_back((size_t)handle), status(); }
EXPORT CUresult cuMemMap(
    CUdeviceptr address, size_t bytes, size_t offset, CUmemGenericAllocationHandle handle, unsigned long long flags) {
  return status();
}
EXPORT CUresult cuMemUnmap(CUdeviceptr address, size_t bytes) {
  clear((void *)address, bytes);
  return status();
}
EXPORT CUresult cuMemSetAccess(CUdeviceptr address, size_t bytes, const CUmemAccessDesc *access, size_t number) {
  return status();
}

/* Finding functions. One that is not there is found, too, since many are looked up that are never called: it is one of
 * 512 functions that differ in the name they say. */
#define ROW(X, n) X(n##0) X(n##1) X(n##2) X(n##3) X(n##4) X(n##5) X(n##6) X(n##7) \
  X(n##8) X(n##9) X(n##a) X(n##b) X(n##c) X(n##d) X(n##e) X(n##f)
#define ALL(X) ROW(X, 0x00) ROW(X, 0x01) ROW(X, 0x02) ROW(X, 0x03) ROW(X, 0x04) ROW(X, 0x05) ROW(X, 0x06) ROW(X, 0x07) \
  ROW(X, 0x08) ROW(X, 0x09) ROW(X, 0x0a) ROW(X, 0x0b) ROW(X, 0x0c) ROW(X, 0x0d) ROW(X, 0x0e) ROW(X, 0x0f) \
  ROW(X, 0x10) ROW(X, 0x11) ROW(X, 0x12) ROW(X, 0x13) ROW(X, 0x14) ROW(X, 0x15) ROW(X, 0x16) ROW(X, 0x17) \
  ROW(X, 0x18) ROW(X, 0x19) ROW(X, 0x1a) ROW(X, 0x1b) ROW(X, 0x1c) ROW(X, 0x1d) ROW(X, 0x1e) ROW(X, 0x1f)
#define DEFINE(n) static int missing_##n(void) { return unsupported(missing_names[n]); }
#define ADDRESS(n) missing_##n,

static const char *missing_names[512];
ALL(DEFINE)
static int (*const missing[512])(void) = {ALL(ADDRESS)};

static void *missing_function(const char *name) {
  size_t n = 0;
  while (n < 511 && missing_names[n] && strcmp(missing_names[n], name)) n++;
  if (!missing_names[n]) missing_names[n] = strdup(name);
  return (void *)missing[n];
}

void *driver_entry_point(const char *name) {
  char newer[128] = "";
  if (strlen(name) + 4 < sizeof newer) strcat(strcpy(newer, name), "_v2");
  void *found = dlsym(RTLD_DEFAULT, newer);
  if (!found) found = dlsym(RTLD_DEFAULT, name);
  return found ? found : missing_function(name);
}
EXPORT CUresult cuGetProcAddress(
    const char *name, void **function, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *result) {
  *function = driver_entry_point(name);
  if (result) *result = CU_GET_PROC_ADDRESS_SUCCESS;
  return OK;
}
