// Teams of blocks that work on one problem: their barrier, and a launch with all blocks resident, which it requires.
#pragma once

#include "cuda/common/launch.cuh"

namespace cpr {

// State of the barrier of a team, in zeroed global memory.
struct TeamBarrier {
  unsigned arrived, passed;
};

// Block `rank` of a team of `size` blocks. Every block of the grid must be resident (launch_teams): otherwise a wait
// may never end.
struct Team {
  int rank, size;
  TeamBarrier* barrier;

  // The barrier of the team. Writes of all its threads before it are visible to all of them after it.
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

// Returns how many blocks of the kernel the current device can hold at once. If that is unknown, returns 0 and sets
// `error`.
template <typename... Parameters>
int resident_blocks(void (*kernel)(Parameters...), int threads, int64_t shared_bytes, const char** error) {
  int device = 0, processors = 0, blocks = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  if (status == cudaSuccess) status = opt_in_to_shared_memory(kernel);
  if (status == cudaSuccess) {
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, static_cast<size_t>(shared_bytes));
  }
  if (status == cudaSuccess) return blocks * processors;
  cudaGetLastError();  // clears the error, so that no later call reports it
  *error = error_text(status);
  return 0;
}

// Launches teams x size blocks, all resident at once. Returns null, or the error text of CUDA. resident_blocks must
// have been called before: it allows the kernel its shared memory.
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
  const cudaError_t pending = cudaGetLastError();  // clears the error as well
  if (status != cudaSuccess) return error_text(status);
  return pending != cudaSuccess ? error_text(pending) : nullptr;
}

}  // namespace cpr
