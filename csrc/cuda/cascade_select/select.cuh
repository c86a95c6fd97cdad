// Exact selection by one block: the k-th best survivor of a query in the order (score descending, slot ascending).
#pragma once

#include <math.h>
#include <stdint.h>

#include "cuda/cascade_select/survivors.cuh"
#include "cuda/common/reduce.cuh"

namespace cpr {

// Writes the ranks of all survivors to `ranks` [count].
template <typename Survivors>
__device__ __forceinline__ void write_ranks(const Survivors& survivors, uint64_t* ranks, SelectShared& shared) {
  unsigned own = 0, total;
  survivors.for_each([&](uint32_t, float) { ++own; });
  unsigned place = block_exclusive_sum<kSelectThreads>(own, &total, shared.counts);
  survivors.for_each([&](uint32_t slot, float score) { ranks[place++] = rank_of(score, slot); });
  __syncthreads();
}

// Gives each thread one survivor, of at most kSelectThreads.
template <typename Survivors>
__device__ __forceinline__ SingleSurvivors spread(const Survivors& survivors, SelectShared& shared) {
  write_ranks(survivors, shared.candidates, shared);
  const bool left = threadIdx.x < survivors.count;
  const uint32_t slot = left ? slot_of(shared.candidates[threadIdx.x]) : 0;
  return {survivors.scores, slot, left, survivors.count};
}

// Calls visit(slot, score, map(score)) for each survivor in the share of this thread.
template <typename Survivors, typename Map, typename Visit>
__device__ __forceinline__ void for_each_mapped(const Survivors& survivors, Map map, Visit visit) {
  survivors.for_each([&](uint32_t slot, float score) { visit(slot, score, map(score)); });
}

template <typename Map, typename Visit>
__device__ __forceinline__ void for_each_mapped(const MarkedSurvivors& survivors, Map map, Visit visit) {
  survivors.for_each(map, visit);
}

// Calls visit(slot, score) for each survivor of this thread that is in the bucket.
template <typename Survivors, typename Map, typename Visit>
__device__ __forceinline__ void for_each_in_bucket(Survivors& survivors, Map bucket_of, unsigned bucket, Visit visit) {
  survivors.for_each([&](uint32_t slot, float score) {
    if (bucket_of(score) == bucket) visit(slot, score);
  });
}

template <typename Map, typename Visit>
__device__ __forceinline__ void for_each_in_bucket(MarkedSurvivors& survivors, Map bucket_of, unsigned bucket,
                                                   Visit visit) {
  survivors.narrow(bucket_of, bucket, visit);
}

// Maps scores to buckets, linearly over [low, high]; bucket 0 holds the best. The map is monotone for all scores,
// because rounding is monotone and scores outside are clamped. If there is no scale (no finite score, zero width or
// overflow), all scores fall into one bucket, the last.
struct LinearBuckets {
  float high, scale;

  __device__ LinearBuckets(float low, float high) : high(high) {
    scale = __fdividef(kBuckets - 1, high - low);  // here: nvcc leaves initialisers to the host compiler, too
    if (!(high > low) || !(scale > 0 && scale < INFINITY)) this->high = -INFINITY, scale = 0;  // positions are NaN
  }

  __device__ unsigned operator()(float score) const {
    const float position = (high - score) * scale;
    return static_cast<unsigned>(fmaxf(fminf(position, kBuckets - 1), 0));  // fminf(NaN, x) is x
  }

  // About the least score of a bucket other than the last. Needs a scale.
  __device__ float least(unsigned bucket) const { return high - static_cast<float>(bucket + 1) / scale; }
};

// Returns the least `least` and the greatest `greatest` of the block.
__device__ __forceinline__ float2 block_range(float least, float greatest, SelectShared& shared) {
  constexpr int kWarps = kSelectThreads / kWarp;
  least = warp_reduce(least, Min()), greatest = warp_reduce(greatest, Max());
  if (threadIdx.x % kWarp == 0) shared.ranges[threadIdx.x / kWarp] = {least, greatest};
  __syncthreads();
  const float2 of_warp = shared.ranges[threadIdx.x % kWarps];
  __syncthreads();
  return {warp_reduce<kWarps>(of_warp.x, Min()), warp_reduce<kWarps>(of_warp.y, Max())};
}

// Finds the least and the greatest finite score; low > high if there is none.
template <typename Survivors>
__device__ __forceinline__ void score_range(const Survivors& survivors, SelectShared& shared, float* low, float* high) {
  float least = INFINITY, greatest = -INFINITY;
  survivors.for_each([&](uint32_t, float score) {
    if (fabsf(score) < INFINITY) {
      least = fminf(least, score);
      greatest = fmaxf(greatest, score);
    }
  });
  const float2 range = block_range(least, greatest, shared);
  *low = range.x, *high = range.y;
}

// The buckets from kBucketsPerThread * t on, of thread t.
__device__ __forceinline__ uint4& buckets_of_thread(SelectShared& shared) {
  return reinterpret_cast<uint4*>(shared.histogram)[threadIdx.x];
}

// Before the first use of the histogram; a barrier must follow.
__device__ __forceinline__ void start_selection(SelectShared& shared) { buckets_of_thread(shared) = {}; }

// Reads and clears the buckets of this thread in the filled histogram.
__device__ __forceinline__ uint4 take_buckets(SelectShared& shared) {
  __syncthreads();
  const uint4 four = buckets_of_thread(shared);
  buckets_of_thread(shared) = {};
  return four;
}

// Finds the bucket of the filled histogram that holds the k-th best; k from 1 to the number of entries counted. Clears
// the histogram.
__device__ inline Boundary find_boundary(unsigned k, SelectShared& shared) {
  const uint4 four = take_buckets(shared);
  const unsigned populations[kBucketsPerThread] = {four.x, four.y, four.z, four.w};
  const unsigned own = four.x + four.y + four.z + four.w;
  const unsigned upto = warp_inclusive_sum(own);
  unsigned total, before = sum_of_warps_before<kSelectThreads>(upto, &total, shared.counts) + upto - own;
  if (before < k && k <= before + own) {
#pragma unroll
    for (int i = 0; i < kBucketsPerThread; ++i) {
      if (before < k && k <= before + populations[i]) {
        shared.boundary = {threadIdx.x * kBucketsPerThread + i, k - before, populations[i]};
      }
      before += populations[i];
    }
  }
  __syncthreads();
  return shared.boundary;
}

// Returns how many of the `count` candidates in shared memory have a better rank than `rank`.
__device__ __forceinline__ unsigned place_among(const uint64_t* candidates, unsigned count, uint64_t rank) {
  unsigned better = 0;
  for (unsigned i = 0; i < count; ++i) better += candidates[i] > rank;
  return better;
}

// Selects by radix over the whole rank, most significant digit first: the fallback for a crowded bucket (many ties, or
// outliers that leave most scores in one bucket).
template <typename Survivors>
__device__ __forceinline__ uint64_t kth_best_by_radix(const Survivors& survivors, unsigned k, SelectShared& shared) {
  uint64_t prefix = 0, known = 0;
  for (int shift = 64 - kBucketBits;; shift = shift > kBucketBits ? shift - kBucketBits : 0) {
    survivors.for_each([&](uint32_t slot, float score) {
      const uint64_t rank = rank_of(score, slot);
      if ((rank & known) == prefix) {
        atomicAdd(&shared.histogram[kBuckets - 1 - ((rank >> shift) & (kBuckets - 1))], 1u);
      }
    });
    const Boundary boundary = find_boundary(k, shared);
    k = boundary.place;
    prefix |= static_cast<uint64_t>(kBuckets - 1 - boundary.bucket) << shift;
    known |= static_cast<uint64_t>(kBuckets - 1) << shift;
    if (shift == 0) return prefix;
  }
}

// Returns the rank of the k-th best survivor, 1 <= k <= count; marked survivors already lose some that are worse. [low,
// high] determines the widths of the buckets; the result is correct for any values.
template <typename Survivors>
__device__ __forceinline__ uint64_t kth_best(Survivors& survivors, unsigned k, float low, float high,
                                             SelectShared& shared) {
  const LinearBuckets bucket_of(low, high);
  for_each_mapped(survivors, bucket_of,
                  [&](uint32_t, float, unsigned bucket) { atomicAdd(&shared.histogram[bucket], 1u); });
  const Boundary boundary = find_boundary(k, shared);
  if (in_all_lanes(boundary.population > kCandidates)) return kth_best_by_radix(survivors, k, shared);

  unsigned& gathered = shared.histogram[boundary.bucket];
  for_each_in_bucket(survivors, bucket_of, boundary.bucket, [&](uint32_t slot, float score) {
    shared.candidates[atomicAdd(&gathered, 1u)] = rank_of(score, slot);
  });
  __syncthreads();
  if (threadIdx.x == 0) gathered = 0;
  if (threadIdx.x < boundary.population) {
    const uint64_t rank = shared.candidates[threadIdx.x];
    if (place_among(shared.candidates, boundary.population, rank) + 1 == boundary.place) shared.result = rank;
  }
  __syncthreads();
  return shared.result;
}

// Writes the slots slot_at(i), i < count, for which keeps(slot) holds to the front of `out`, in order, and returns
// their number. slot_at may read from `out`: each tile is read before a barrier and written after it, never ahead of
// the reads.
template <typename SlotAt, typename Keeps>
__device__ __forceinline__ unsigned compact(unsigned count, SlotAt slot_at, Keeps keeps, uint32_t* out,
                                            SelectShared& shared) {
  unsigned kept = 0;
  for (unsigned tile = 0; tile < count; tile += kSelectThreads) {
    const unsigned i = tile + threadIdx.x;
    const uint32_t slot = i < count ? slot_at(i) : 0;
    const bool flag = i < count && keeps(slot);
    unsigned total;
    const unsigned place = block_rank<kSelectThreads>(flag, &total, shared.counts);
    if (flag) out[kept + place] = slot;
    kept += total;
  }
  __syncthreads();
  return kept;
}

__device__ __forceinline__ void ListedSurvivors::keep_from(uint64_t rank, unsigned, SelectShared& shared) {
  const LastKept last(rank);
  auto listed = [&](unsigned i) { return slots[i]; };
  auto kept = [&](uint32_t slot) { return last.keeps(scores[slot], [&] { return slot; }); };
  count = compact(count, listed, kept, slots, shared);
}

}  // namespace cpr
