// Exact selection by one block: the k-th best survivor of a query in the order (score descending, slot ascending).
//
// Each entry is compared by a 64-bit rank, larger is better. The upper half is an integer that orders like the score,
// the lower half the complement of the slot. Ranks are distinct, so the k best are one set, whatever the order of
// threads.
#pragma once

#include <math.h>
#include <stdint.h>

#include "cuda/common/reduce.cuh"

namespace cpr {

constexpr int kSelectThreads = 512;
constexpr int kBuckets = 2048;
constexpr int kBucketsPerThread = kBuckets / kSelectThreads;
constexpr int kBucketBits = 11;
constexpr int kCandidates = kSelectThreads;  // up to this many are ranked by comparing all pairs
static_assert(1 << kBucketBits == kBuckets);

// The position of the k-th best: its bucket, and its place (1 = best) among the `population` of that bucket.
struct Boundary {
  unsigned bucket, place, population;
};

struct SelectShared {
  unsigned histogram[kBuckets];
  uint64_t candidates[kCandidates];
  float scratch[kSelectThreads / kWarp];
  unsigned counts[kSelectThreads / kWarp];
  Boundary boundary;
  unsigned gathered;
  uint64_t result;
};

__device__ __forceinline__ uint64_t rank_of(float score, uint32_t slot) {
  const uint32_t bits = __float_as_uint(score);
  const uint32_t ordered = bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
  return (static_cast<uint64_t>(ordered) << 32) | static_cast<uint32_t>(~slot);
}

__device__ __forceinline__ float score_of(uint64_t rank) {
  const uint32_t ordered = static_cast<uint32_t>(rank >> 32);
  return __uint_as_float(ordered ^ ((ordered >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

__device__ __forceinline__ uint32_t slot_of(uint64_t rank) { return ~static_cast<uint32_t>(rank); }

// The survivors of one query as an ascending list of slots in global memory.
struct ListedSurvivors {
  const float* scores;  // [K] in the compared view; neither NaN nor -0 for a survivor
  uint32_t* slots;      // [count]
  unsigned count;

  // Calls visit(slot, score) for each survivor in the share of this thread.
  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    for (unsigned i = threadIdx.x; i < count; i += kSelectThreads) visit(slots[i], scores[slots[i]]);
  }

  __device__ __forceinline__ void keep_from(uint64_t last, unsigned keep, SelectShared& shared);
};

constexpr int kMarkWords = 2;
constexpr int64_t kMaxMarked = kMarkWords * 32 * kSelectThreads;

// The survivors of one query as bits in registers: bit i of thread t marks slot 512 i + t.
struct MarkedSurvivors {
  const float* scores;  // as above
  uint32_t marks[kMarkWords];
  unsigned count;

  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
#pragma unroll
    for (int word = 0; word < kMarkWords; ++word) {
      for (uint32_t left = marks[word]; left != 0; left &= left - 1) {
        const uint32_t slot = (word * 32 + __ffs(left) - 1) * kSelectThreads + threadIdx.x;
        visit(slot, scores[slot]);
      }
    }
  }

  __device__ __forceinline__ void keep_from(uint64_t last, unsigned keep, SelectShared&) {
#pragma unroll
    for (int word = 0; word < kMarkWords; ++word) {
      for (uint32_t left = marks[word]; left != 0; left &= left - 1) {
        const uint32_t slot = (word * 32 + __ffs(left) - 1) * kSelectThreads + threadIdx.x;
        if (rank_of(scores[slot], slot) < last) marks[word] ^= left & -left;
      }
    }
    count = keep;
  }
};

// Maps scores to buckets, linearly over [low, high]; bucket 0 holds the best. The map is monotone for all scores,
// because rounding is monotone and scores outside are clamped. If there is no scale (no finite score, zero width or
// overflow), all scores fall into the last bucket.
struct LinearBuckets {
  float low, scale;

  __device__ LinearBuckets(float low, float high) : low(low), scale((kBuckets - 1) / (high - low)) {
    if (!(high > low) || !(scale < INFINITY)) scale = 0;
  }

  __device__ unsigned operator()(float score) const {
    const float position = (score - low) * scale;  // NaN (infinite score times scale 0): the last bucket, like others
    const int from_low = position > 0 ? (position < kBuckets - 1 ? static_cast<int>(position) : kBuckets - 1) : 0;
    return kBuckets - 1 - from_low;
  }

  // About the least score of a bucket other than the last. Needs a scale.
  __device__ float least(unsigned bucket) const { return low + static_cast<float>(kBuckets - 1 - bucket) / scale; }
};

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
  *low = block_reduce<kSelectThreads>(least, Min(), shared.scratch);
  *high = block_reduce<kSelectThreads>(greatest, Max(), shared.scratch);
}

__device__ inline void clear_histogram(SelectShared& shared) {
  for (int bucket = threadIdx.x; bucket < kBuckets; bucket += kSelectThreads) shared.histogram[bucket] = 0;
  __syncthreads();
}

// Finds the bucket of the filled histogram that holds the k-th best; k from 1 to the number of entries counted.
__device__ inline Boundary find_boundary(unsigned k, SelectShared& shared) {
  __syncthreads();
  const int first = threadIdx.x * kBucketsPerThread;
  unsigned own = 0;
#pragma unroll
  for (int i = 0; i < kBucketsPerThread; ++i) own += shared.histogram[first + i];
  unsigned total;
  unsigned before = block_exclusive_sum<kSelectThreads>(own, &total, shared.counts);
  if (before < k && k <= before + own) {
    for (int i = 0; i < kBucketsPerThread; ++i) {
      const unsigned population = shared.histogram[first + i];
      if (k <= before + population) {
        shared.boundary = {static_cast<unsigned>(first + i), k - before, population};
        break;
      }
      before += population;
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
    clear_histogram(shared);
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

// Returns the rank of the k-th best survivor, 1 <= k <= count. [low, high] determines the widths of the buckets; the
// result is correct for any values.
template <typename Survivors>
__device__ __forceinline__ uint64_t kth_best(const Survivors& survivors, unsigned k, float low, float high,
                                             SelectShared& shared) {
  const LinearBuckets bucket_of(low, high);
  if (threadIdx.x == 0) shared.gathered = 0;
  clear_histogram(shared);
  survivors.for_each([&](uint32_t, float score) { atomicAdd(&shared.histogram[bucket_of(score)], 1u); });
  const Boundary boundary = find_boundary(k, shared);
  if (boundary.population > kCandidates) return kth_best_by_radix(survivors, k, shared);

  survivors.for_each([&](uint32_t slot, float score) {
    if (bucket_of(score) == boundary.bucket) {
      shared.candidates[atomicAdd(&shared.gathered, 1u)] = rank_of(score, slot);
    }
  });
  __syncthreads();
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

__device__ __forceinline__ void ListedSurvivors::keep_from(uint64_t last, unsigned, SelectShared& shared) {
  auto listed = [&](unsigned i) { return slots[i]; };
  auto kept = [&](uint32_t slot) { return rank_of(scores[slot], slot) >= last; };
  count = compact(count, listed, kept, slots, shared);
}

// Sorts ranks [count] in place, best first, by a bitonic network. Every comparator puts the better rank at the lower
// index, because each merge starts by comparing mirror images. A length that is not a power of two therefore works by
// skipping the comparators that reach beyond the end.
__device__ inline void sort_ranks(uint64_t* ranks, unsigned count) {
  for (uint64_t size = 2; size / 2 < count; size *= 2) {
    for (uint64_t stride = size / 2; stride > 0; stride /= 2) {
      for (unsigned i = threadIdx.x; i < count; i += kSelectThreads) {
        const uint64_t partner = stride == size / 2 ? (i ^ (size - 1)) : (i ^ stride);
        if (partner > i && partner < count) {
          const uint64_t a = ranks[i], b = ranks[partner];
          if (a < b) {
            ranks[i] = b;
            ranks[partner] = a;
          }
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace cpr
