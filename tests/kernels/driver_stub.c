/* A CUDA driver that runs nothing and keeps what the last launch got, for launch_twice.py. */

#include <cuda.h>
#include <stdint.h>
#include <string.h>

int expected_sizes[512], expected_count, launches, next_error;
unsigned char parameters[1 << 16];
int parameter_bytes;
uint64_t setting[10]; /* grid, block, shared memory, stream, function, attributes */

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **given, void **extra) {
  const uint64_t now[10] = {config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
                            config->blockDimY, config->blockDimZ, config->sharedMemBytes,
                            (uint64_t)config->hStream, (uint64_t)function, config->numAttrs};
  CUresult error = next_error;
  next_error = 0;
  if (error)
    return error;
  launches++;
  memcpy(setting, now, sizeof now);
  parameter_bytes = 0;
  for (int i = 0; i < expected_count; i++) {
    memcpy(parameters + parameter_bytes, given[i], expected_sizes[i]);
    parameter_bytes += expected_sizes[i];
  }
  return 0;
}

CUresult cuFuncGetParamInfo(CUfunction function, size_t index, size_t *offset, size_t *size) {
  if (index >= expected_count)
    return CUDA_ERROR_INVALID_VALUE;
  *offset = 0;
  *size = expected_sizes[index];
  return 0;
}

/* The address first, as in hardware, and whatever else it was encoded from. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  uint64_t *words = (uint64_t *)map;
  memset(map, 0, sizeof *map);
  words[0] = (uint64_t)address;
  words[1] = type + 256 * rank + 65536 * swizzle;
  for (int i = 0; i < rank; i++) {
    words[2 + i] = shape[i];
    words[7 + i] = box[i];
    if (i + 1 < rank)
      words[12 + i] = strides[i];
  }
  return 0;
}

CUresult cuTensorMapReplaceAddress(CUtensorMap *map, void *address) {
  if ((uint64_t)address % 16)
    return CUDA_ERROR_INVALID_VALUE;
  *(uint64_t *)map = (uint64_t)address;
  return 0;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute what, CUdevice device) {
  *value = what == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR   ? 9
           : what == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR ? 0
                                                                  : 232448;
  return 0;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute what, CUfunction function) {
  *value = what == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return 0;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute what, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return 0;
}

static CUmodule one = (CUmodule)1;
CUresult cuInit(unsigned flags) { return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "out of order", 0; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, 0; }
CUresult cuDeviceGet(CUdevice *device, int number) { return *device = number, 0; }
CUresult cuDeviceGetCount(int *count) { return *count = 1, 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return *context = (CUcontext)one, 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)one, 0; }
CUresult cuCtxSetCurrent(CUcontext context) { return 0; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, 0; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, 0; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return 0; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = one, 0; }
CUresult cuModuleUnload(CUmodule module) { return 0; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  return *function = (CUfunction)one, 0;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute what, int value) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return 0; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  return *count = 1, 0;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { return *status = 0, 0; }
