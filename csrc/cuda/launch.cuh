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

// Launches `kernel` with a Layout of dynamic shared memory; null, or CUDA's text for what failed.
template <typename Layout, typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
                   const Arguments&... arguments) {
  static_assert(sizeof(Layout) <= 48 * 1024, "more shared memory than a block gets without opting in");
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = sizeof(Layout);
  config.stream = stream;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  const cudaError_t pending = cudaGetLastError();  // also clears it, so that no later call reports ours
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return pending != cudaSuccess ? cudaGetErrorString(pending) : nullptr;
}

__host__ __device__ constexpr int64_t ceil_div(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

__host__ __device__ constexpr int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

}  // namespace cpr
