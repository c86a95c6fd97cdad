// Exact selection by one block: the k-th best survivor of a query in the order (score descending, slot ascending).
#pragma once

#include <math.h>
#include <stdint.h>

#include "cuda/cascade_select/survivors.cuh"
#include "cuda/common/reduce.cuh"

namespace cpr {

// The buckets from kBucketsPerThread * t on, of thread t.
__device__ __forceinline__ uint4& buckets_of_thread(SelectShared& shared) {
  return reinterpret_cast<uint4*>(shared.histogram)[threadIdx.x];
}

// Writes the ranks of all survivors to `ranks` [count].
template <typename Survivors>
__device__ __forceinline__ void write_ranks(const Survivors& survivors, uint64_t* ranks, SelectShared& shared) {
  unsigned place = block_exclusive_sum<kSelectThreads>(survivors.own(), nullptr, shared.counts);
  survivors.for_each([&](uint32_t slot, float score) { ranks[place++] = rank_of(score, slot); });
  __syncthreads();
}

// Gives each thread up to kHeld survivors, of at most kHeld * kSelectThreads. A barrier must follow before the next use
// of the candidates.
template <int kHeld, typename Survivors>
__device__ __forceinline__ HeldSurvivors<kHeld> spread(const Survivors& survivors, SelectShared& shared) {
  static_assert(kHeld * kSelectThreads <= kMaxSpread);
  unsigned place = block_exclusive_sum<kSelectThreads>(survivors.own(), nullptr, shared.counts);
  survivors.for_each_slot([&](uint32_t slot) { shared.slots[place++] = static_cast<uint16_t>(slot); });
  __syncthreads();
  HeldSurvivors<kHeld> held = {survivors.scores, {}, 0, 0, survivors.count};
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const unsigned at = i * kSelectThreads + threadIdx.x;
    if (at < survivors.count) held.slots[i] = shared.slots[at], held.left |= 1u << i;
  }
  held.open = held.left;
  return held;
}

// Counts the survivors of this thread by buckets.
template <typename Survivors, typename Map>
__device__ __forceinline__ void fill_histogram(const Survivors& survivors, Map bucket_of, SelectShared& shared) {
  survivors.for_each([&](uint32_t, float score) { atomicAdd(&shared.histogram[bucket_of(score)], 1u); });
}

template <typename Map>
__device__ __forceinline__ void fill_histogram(const MarkedSurvivors& survivors, Map bucket_of, SelectShared& shared) {
  survivors.count_in(shared.histogram, bucket_of);
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

template <int kHeld, typename Map, typename Visit>
__device__ __forceinline__ void for_each_in_bucket(HeldSurvivors<kHeld>& survivors, Map bucket_of, unsigned bucket,
                                                   Visit visit) {
  survivors.narrow(bucket_of, bucket, visit);
}

// Maps scores to buckets, linearly over [low, high]; bucket 0 holds the best. The map is monotone for all scores,
// because rounding is monotone and positions are clamped to [0, 1]. If there is no scale (no finite score, zero width
// or overflow), all scores fall into one bucket, the last.
struct LinearBuckets {
  static constexpr uint32_t kFirst = 0x4b000000;  // bits of 2^23, from where on floats are the integers
  float slope, start, width, best;
  float span, high;  // of the scores with a scale

  __device__ LinearBuckets(float low, float high) : span(high - low), high(high) {
    const float scale = reciprocal(span), last = kBuckets - 1, first = __uint_as_float(kFirst);
    const bool valid = scale > 0 && scale < INFINITY;
    slope = valid ? -scale : 0, start = -high * slope;
    width = valid ? last : 0, best = valid ? first : first + last;
  }

  // Returns kFirst more than the bucket. In two multiply-adds, and without a conversion, whose unit is slow.
  __device__ uint32_t number(float score) const {
    const float position = __saturatef(__fmaf_rn(score, slope, start));  // 0 instead of NaN
    return __float_as_uint(__fmaf_rn(position, width, best));
  }

  __device__ unsigned operator()(float score) const { return number(score) - kFirst; }

  // About the least score of a bucket other than the last. Needs a scale.
  __device__ float least(unsigned bucket) const {
    constexpr float kBucketWidth = 1.0f / (kBuckets - 1);
    return high - (static_cast<float>(bucket) + 0.5f) * kBucketWidth * span;
  }
};

// Returns the least `least` and the greatest `greatest` of the block; neither is NaN.
__device__ __forceinline__ float2 block_range(float least, float greatest, SelectShared& shared) {
  constexpr int kWarps = kSelectThreads / kWarp;
  uint2 of_warp = {__reduce_min_sync(kFullWarp, ordered(least)), __reduce_max_sync(kFullWarp, ordered(greatest))};
  if (threadIdx.x % kWarp == 0) shared.ranges[threadIdx.x / kWarp] = of_warp;
  __syncthreads();
  of_warp = shared.ranges[threadIdx.x % kWarps];
  __syncthreads();
  return {unordered(__reduce_min_sync(kFullWarp, of_warp.x)), unordered(__reduce_max_sync(kFullWarp, of_warp.y))};
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
  const unsigned of_warp = warp_sum(own);
  unsigned before = sum_of_warps_before<kSelectThreads>(of_warp, nullptr, shared.counts);
  if (in_all_lanes(before < k && k <= before + of_warp)) {  // one warp
    before += warp_inclusive_sum(own) - own;
    if (before < k && k <= before + own) {
#pragma unroll
      for (int i = 0; i < kBucketsPerThread; ++i) {
        if (before < k && k <= before + populations[i]) {
          shared.boundary = {threadIdx.x * kBucketsPerThread + i, k - before, populations[i]};
        }
        before += populations[i];
      }
    }
  }
  __syncthreads();
  return shared.boundary;
}

// Returns how many of the `count` candidates in shared memory have a better rank than `rank`.
__device__ __forceinline__ unsigned place_among(const uint64_t* candidates, unsigned count, uint64_t rank) {
  unsigned better = 0;
#pragma unroll 4
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

// Returns the k-th best survivor, 1 <= k <= count; marked and held survivors already lose some that are worse. [low,
// high] determines the widths of the buckets; the result is correct for any values. One thread calls found(its score)
// before the last barrier.
template <typename Survivors, typename Found>
__device__ __forceinline__ LastKept kth_best(Survivors& survivors, unsigned k, float low, float high,
                                             SelectShared& shared, Found found) {
  const LinearBuckets bucket_of(low, high);
  fill_histogram(survivors, bucket_of, shared);
  const Boundary boundary = find_boundary(k, shared);
  if (in_all_lanes(boundary.population > kCandidates)) {
    const LastKept last = last_of(kth_best_by_radix(survivors, k, shared));
    if (threadIdx.x == 0) found(last.score);
    __syncthreads();
    return last;
  }

  unsigned& gathered = shared.histogram[boundary.bucket];
  for_each_in_bucket(survivors, bucket_of, boundary.bucket, [&](uint32_t slot, float score) {
    shared.candidates[atomicAdd(&gathered, 1u)] = rank_of(score, slot);
  });
  __syncthreads();
  if (threadIdx.x == 0) gathered = 0;
  if (threadIdx.x < boundary.population) {
    const uint64_t rank = shared.candidates[threadIdx.x];
    const unsigned place = place_among(shared.candidates, boundary.population, rank) + 1;
    if (place == boundary.place) shared.last = last_of(rank), found(score_of(rank));
  }
  __syncthreads();
  return shared.last;
}

template <typename Survivors>
__device__ __forceinline__ LastKept kth_best(Survivors& survivors, unsigned k, float low, float high,
                                             SelectShared& shared) {
  return kth_best(survivors, k, low, high, shared, [](float) {});
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

__device__ __forceinline__ void ListedSurvivors::keep_from(const LastKept& last, unsigned, SelectShared& shared) {
  auto listed = [&](unsigned i) { return slots[i]; };
  auto kept = [&](uint32_t slot) { return last.keeps(scores[slot], [&] { return slot; }); };
  count = compact(count, listed, kept, slots, shared);
}

}  // namespace cpr
