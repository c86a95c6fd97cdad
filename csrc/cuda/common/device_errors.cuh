// Errors of CUDA as text that says what to install: an old driver, and a GPU that this build has no code for.
#pragma once

#include <cuda_runtime.h>
#include <stdio.h>

#include "cpr_fast.h"

namespace cpr {

// Writes what a GPU needs that this build has no machine code or PTX for.
inline void describe_device(char* text, size_t bytes) {
  int device = 0, major = 0, minor = 0;
  cudaDeviceProp properties = {};
  if (cudaGetDevice(&device) == cudaSuccess && cudaGetDeviceProperties(&properties, device) == cudaSuccess) {
    major = properties.major, minor = properties.minor;
  }
  const int length = snprintf(
      text, bytes, "the GPU '%s' has compute capability %d.%d, and this build of cpr_fast has CUDA kernels for %s",
      properties.name, major, minor, cpr_cuda_architectures());
  if (length < 0 || static_cast<size_t>(length) >= bytes) return;
  if (major < 8) {
    snprintf(text + length, bytes - length, "; they need 8.0 or newer (A100, RTX 30xx): use the CPU");
  } else {
    snprintf(text + length, bytes - length, "; build it again with TORCH_CUDA_ARCH_LIST=\"%d.%d\"", major, minor);
  }
}

// Returns what went wrong: CUDA's own text, except where that does not say what to install. The text is valid until the
// next error of this thread.
inline const char* error_text(cudaError_t status) {
  static thread_local char text[400];
  switch (status) {
    case cudaErrorInsufficientDriver:
      return cpr_cuda_driver_error();
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorUnsupportedPtxVersion:
      describe_device(text, sizeof text);
      return text;
    default:
      return cudaGetErrorString(status);
  }
}

}  // namespace cpr
