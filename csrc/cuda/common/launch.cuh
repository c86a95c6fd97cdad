// Kernel launches that return errors as text, and access to dynamic shared memory as a struct.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#include "cpr_fast.h"
#include "cuda/common/device_errors.cuh"

namespace cpr {

// Returns the dynamic shared memory of the block. It is uninitialised: no constructor runs. The alignment is the one
// that swizzled rows need (warpgroup.cuh).
template <typename Layout>
__device__ __forceinline__ Layout& shared_memory() {
  alignas(1024) extern __shared__ float4 dynamic_shared[];
  return *reinterpret_cast<Layout*>(dynamic_shared);
}

// Returns null, or an error text. Asynchronous copies and vectors of the workspace take 16 bytes at a time.
inline const char* check_workspace(const void* workspace) {
  const bool aligned = reinterpret_cast<uintptr_t>(workspace) % CPR_WORKSPACE_ALIGNMENT == 0;
  return aligned ? nullptr : "workspace: expected an address that is a multiple of 16 bytes";
}

constexpr int64_t kDefaultShared = 48 * 1024;  // bytes that a block gets if its kernel does not opt in to more

// Returns an attribute of the current device, or `otherwise` if it cannot be read.
inline int64_t device_attribute(cudaDeviceAttr which, int64_t otherwise) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return otherwise;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : otherwise;
}

// Returns whether the current device has this compute capability.
inline bool has_compute_capability(int major, int minor) {
  return device_attribute(cudaDevAttrComputeCapabilityMajor, 0) == major &&
         device_attribute(cudaDevAttrComputeCapabilityMinor, 0) == minor;
}

// Returns how many bytes of shared memory a block can opt in to on the current device.
inline int64_t shared_memory_limit() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, kDefaultShared);
}

// Lets the kernel ask for all the shared memory of the current device. It is the same amount in every call: if it
// depended on the request, one host thread could lower it between the call of another and its launch.
template <typename... Parameters>
cudaError_t opt_in_to_shared_memory(void (*kernel)(Parameters...)) {
  const int bytes = static_cast<int>(shared_memory_limit());
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// Launches `kernel` with shared_bytes of dynamic shared memory. Returns null, or the error text of CUDA.
template <typename... Parameters, typename... Arguments>
const char* launch_sized(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes,
                         cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  cudaError_t status = cudaSuccess;
  if (shared_bytes > kDefaultShared) status = opt_in_to_shared_memory(kernel);
  if (status == cudaSuccess) status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  const cudaError_t pending = cudaGetLastError();  // clears the error as well, so that no later call reports it
  if (status != cudaSuccess) return error_text(status);
  return pending != cudaSuccess ? error_text(pending) : nullptr;
}

// Launches `kernel` with a Layout as dynamic shared memory.
template <typename Layout, typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  return launch_sized(kernel, grid, threads, sizeof(Layout), stream, arguments...);
}

__host__ __device__ constexpr int64_t ceil_div(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

__host__ __device__ constexpr int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

}  // namespace cpr
