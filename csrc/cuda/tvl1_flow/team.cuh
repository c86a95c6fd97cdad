// Teams of blocks that work on one problem and wait for each other: the barrier, and the launch that lets it end.
#pragma once

#include "cuda/common/launch.cuh"

namespace cpr {

// In zeroed global memory, one for each team.
struct TeamBarrier {
  unsigned arrived, passed;
};

// Blocks rank 0..size-1 of a team. Every block of the grid must be resident (launch_teams), or a wait may never end.
struct Team {
  int rank, size;
  TeamBarrier* barrier;

  // What any thread of the team wrote before is visible to every one of them after.
  __device__ void wait() const {
    __syncthreads();
    if (size == 1) return;
    if (threadIdx.x == 0) {
      volatile unsigned* passed = &barrier->passed;
      const unsigned seen = *passed;
      __threadfence();
      if (atomicAdd(&barrier->arrived, 1u) + 1 == static_cast<unsigned>(size)) {
        barrier->arrived = 0;
        __threadfence();
        *passed = seen + 1;
      } else {
        while (*passed == seen) __nanosleep(64);
      }
      __threadfence();
    }
    __syncthreads();
  }
};

// How many blocks of the kernel the current device holds at once; 0 where that cannot be told.
template <typename... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, int64_t shared_bytes) {
  const int bytes = static_cast<int>(shared_bytes);
  int device = 0, processors = 0, blocks = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status == cudaSuccess) {
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  }
  if (status == cudaSuccess) {
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(bytes));
  }
  if (status == cudaSuccess) return blocks * processors;
  cudaGetLastError();  // no later call reports ours
  return 0;
}

// Launches teams x size blocks, all resident at once; null, or CUDA's text for what failed. The kernel's shared memory
// must have been allowed (resident_blocks).
template <typename... Parameters, typename... Arguments>
const char* launch_teams(void (*kernel)(Parameters...), int teams, int size, int threads, int64_t shared_bytes,
                         cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(teams * size));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &cooperative;
  config.numAttrs = size > 1;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  const cudaError_t pending = cudaGetLastError();  // also clears it
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return pending != cudaSuccess ? cudaGetErrorString(pending) : nullptr;
}

}  // namespace cpr
