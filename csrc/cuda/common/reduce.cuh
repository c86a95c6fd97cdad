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

// Returns a condition that holds in all lanes of the warp or in none. The vote shows the compiler that the lanes do not
// part there: otherwise it follows every exchange in a branch with code for warps that have parted.
__device__ __forceinline__ bool in_all_lanes(bool condition) { return __any_sync(kFullWarp, condition); }

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
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps <= kWarp && (kWarps & (kWarps - 1)) == 0, "a warp reduces the values of all warps");
  value = warp_reduce(value, combine);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = warp_reduce<kWarps>(scratch[threadIdx.x % kWarps], combine);
  __syncthreads();
  return value;
}

// Returns the sum of `value` over the warp, in one instruction.
__device__ __forceinline__ unsigned warp_sum(unsigned value) { return __reduce_add_sync(kFullWarp, value); }

// Returns the sum of `value` over the lanes of the warp up to this one.
__device__ __forceinline__ unsigned warp_inclusive_sum(unsigned value) {
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const unsigned below = __shfl_up_sync(kFullWarp, value, distance);
    if (static_cast<int>(threadIdx.x % kWarp) >= distance) value += below;
  }
  return value;
}

// Returns the sum of `value` over the block. scratch as in block_reduce.
template <int kThreads>
__device__ __forceinline__ unsigned block_sum(unsigned value, unsigned* scratch) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps <= kWarp, "a warp adds up the values of all warps");
  const unsigned lane = threadIdx.x % kWarp, of_warp = warp_sum(value);
  if (lane == 0) scratch[threadIdx.x / kWarp] = of_warp;
  __syncthreads();
  const unsigned total = warp_sum(lane < kWarps ? scratch[lane] : 0);
  __syncthreads();
  return total;
}

// Returns the sum of `own`, which the last lane of each warp gives, over the warps before this one; and if total is not
// null, over the block. scratch as in block_reduce, but reusable only after the next barrier.
template <int kThreads>
__device__ __forceinline__ unsigned sum_of_warps_before(unsigned own, unsigned* total, unsigned* scratch) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps <= kWarp, "a warp adds up the values of all warps");
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  if (lane == kWarp - 1) scratch[warp] = own;
  __syncthreads();
  const unsigned of_warp = lane < kWarps ? scratch[lane] : 0;
  if (total != nullptr) *total = warp_sum(of_warp);
  return warp_sum(lane < warp ? of_warp : 0);
}

// Returns the sum of `value` over the threads before this one; and if total is not null, over the block. scratch as in
// block_reduce.
template <int kThreads>
__device__ __forceinline__ unsigned block_exclusive_sum(unsigned value, unsigned* total, unsigned* scratch) {
  const unsigned inclusive = warp_inclusive_sum(value);
  const unsigned before = sum_of_warps_before<kThreads>(inclusive, total, scratch);
  __syncthreads();
  return before + inclusive - value;
}

// Returns how many threads before this one have `flag` set, and how many in the block. scratch as in block_reduce.
template <int kThreads>
__device__ __forceinline__ unsigned block_rank(bool flag, unsigned* total, unsigned* scratch) {
  const unsigned votes = __ballot_sync(kFullWarp, flag);
  const unsigned before = sum_of_warps_before<kThreads>(__popc(votes), total, scratch);
  __syncthreads();
  return before + __popc(votes & ((1u << threadIdx.x % kWarp) - 1));
}

}  // namespace cpr
