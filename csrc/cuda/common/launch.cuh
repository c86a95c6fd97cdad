// Kernel launches whose errors come back as text, and the block's dynamic shared memory as a struct.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

namespace cpr {

// The block's dynamic shared memory. Uninitialised: no constructor runs.
template <typename Layout>
__device__ __forceinline__ Layout& shared_memory() {
  extern __shared__ float4 dynamic_shared[];
  return *reinterpret_cast<Layout*>(dynamic_shared);
}

constexpr int64_t kDefaultShared = 48 * 1024;  // bytes a block gets without its kernel opting in to more

// The bytes of shared memory that a block of the current device can opt in to.
inline int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return kDefaultShared;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
    return kDefaultShared;
  }
  return bytes;
}

// Launches `kernel` with shared_bytes of dynamic shared memory; null, or CUDA's text for what failed.
template <typename... Parameters, typename... Arguments>
const char* launch_sized(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes,
                         cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  cudaError_t status = cudaSuccess;
  if (shared_bytes > kDefaultShared) {
    const int bytes = static_cast<int>(shared_bytes);
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  if (status == cudaSuccess) status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  const cudaError_t pending = cudaGetLastError();  // also clears it, so that no later call reports ours
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return pending != cudaSuccess ? cudaGetErrorString(pending) : nullptr;
}

// The same with a Layout of dynamic shared memory.
template <typename Layout, typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  return launch_sized(kernel, grid, threads, sizeof(Layout), stream, arguments...);
}

__host__ __device__ constexpr int64_t ceil_div(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

__host__ __device__ constexpr int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

}  // namespace cpr
