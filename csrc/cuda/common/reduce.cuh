// Reductions and prefix sums over a warp and a block. Each combines its inputs in a fixed order, so results do not
// depend on scheduling.
#pragma once

#include <cuda_runtime.h>

namespace cpr {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

struct Min {
  __device__ float operator()(float a, float b) const { return fminf(a, b); }
};

// Combines `value` over groups of kLanes neighbouring lanes; every lane gets the result.
template <int kLanes = kWarp, typename T, typename Combine>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kFullWarp, value, distance));
  }
  return value;
}

// Combines `value` over the block; every thread gets the result. scratch: [kThreads / 32] shared, reusable on return.
template <int kThreads, typename T, typename Combine>
__device__ __forceinline__ T block_reduce(T value, Combine combine, T* scratch) {
  value = warp_reduce(value, combine);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarp; ++warp) value = combine(value, scratch[warp]);
  __syncthreads();
  return value;
}

// Returns the sum of `value` over the threads before this one, and over the block. scratch as in block_reduce.
template <int kThreads>
__device__ __forceinline__ unsigned block_exclusive_sum(unsigned value, unsigned* total, unsigned* scratch) {
  const int lane = threadIdx.x % kWarp, own_warp = threadIdx.x / kWarp;
  unsigned inclusive = value;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const unsigned below = __shfl_up_sync(kFullWarp, inclusive, distance);
    if (lane >= distance) inclusive += below;
  }
  if (lane == kWarp - 1) scratch[own_warp] = inclusive;
  __syncthreads();
  unsigned before = 0, sum = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarp; ++warp) {
    if (warp == own_warp) before = sum;
    sum += scratch[warp];
  }
  __syncthreads();
  *total = sum;
  return before + inclusive - value;
}

// Returns how many threads before this one have `flag` set, and how many in the block. scratch as in block_reduce.
template <int kThreads>
__device__ __forceinline__ unsigned block_rank(bool flag, unsigned* total, unsigned* scratch) {
  const int lane = threadIdx.x % kWarp, own_warp = threadIdx.x / kWarp;
  const unsigned votes = __ballot_sync(kFullWarp, flag);
  if (lane == 0) scratch[own_warp] = __popc(votes);
  __syncthreads();
  unsigned before = 0, sum = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / kWarp; ++warp) {
    if (warp == own_warp) before = sum;
    sum += scratch[warp];
  }
  __syncthreads();
  *total = sum;
  return before + __popc(votes & ((1u << lane) - 1));
}

}  // namespace cpr
