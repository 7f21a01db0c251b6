// A CUDA driver whose device is the host: a function is one of C, launched once for each program along x.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { OUT_OF_RESOURCES = 701, NO_CONTEXT = 201 };

typedef void (*Kernel)(unsigned program, void** parameters);

static __thread int has_context;
static int wants_context;
static int launches;

int cuLaunchKernel(Kernel kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned ty, unsigned tz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  if (wants_context && !has_context) return NO_CONTEXT;
  if (threads > 1024) return OUT_OF_RESOURCES;
  for (unsigned program = 0; program < x * y * z; ++program) kernel(program, parameters);
  ++launches;
  return 0;
}

int cuMemsetD8Async(uint64_t at, unsigned char byte, size_t bytes, void* stream) {
  memset((void*)at, byte, bytes);
  return 0;
}

int cuGetErrorName(int status, const char** name) {
  *name = status == OUT_OF_RESOURCES ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : "CUDA_ERROR_INVALID_CONTEXT";
  return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = &has_context;
  return 0;
}

int cuCtxSetCurrent(void* context) {
  has_context = context != NULL;
  return 0;
}

int stub_launches(void) { return launches; }
void stub_wants_context(int wanted) { wants_context = wanted; }

// y[program] = x[program] * by + *more, where there is more
void scale(unsigned program, void** parameters) {
  const float* x = *(const float**)parameters[0];
  float* y = *(float**)parameters[1];
  const float by = *(float*)parameters[2];
  const int64_t* more = *(const int64_t**)parameters[3];
  y[program] = x[program] * by + (more ? (float)*more : 0.0f);
}

// ++*counter
void count(unsigned program, void** parameters) { ++**(int64_t**)parameters[0]; }
