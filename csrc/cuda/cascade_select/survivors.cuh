// The survivors of one query in one block: as a list, as bits in registers, or one for each thread; and their ranks.
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
static_assert(kBucketsPerThread == 4, "a thread clears and reads its buckets as one vector");

// The position of the k-th best: its bucket, and its place (1 = best) among the `population` of that bucket.
struct Boundary {
  unsigned bucket, place, population;
};

struct alignas(16) SelectShared {
  unsigned histogram[kBuckets];  // zeros whenever it is not in use
  uint64_t candidates[kCandidates];
  float2 ranges[kSelectThreads / kWarp];
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

// The last entry that a stage keeps. Scores of survivors are neither NaN nor -0, so floats order them like ranks.
struct LastKept {
  float score;
  uint32_t slot;

  __device__ __forceinline__ explicit LastKept(uint64_t rank) : score(score_of(rank)), slot(slot_of(rank)) {}

  // slot_at(): the slot of the entry, which only equal scores need.
  template <typename SlotAt>
  __device__ __forceinline__ bool keeps(float other, SlotAt slot_at) const {
    return other > score || (other == score && slot_at() <= slot);
  }
};

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

constexpr int kMarkWords = 2, kMarkedAtOnce = 4;         // neighbouring slots, whose scores are one vector
constexpr int kWordVectors = 32 / kMarkedAtOnce;         // whose survivors are the bits of one word
constexpr int kMarkVectors = kMarkWords * kWordVectors;  // of a thread
constexpr int64_t kMaxMarked = kMarkVectors * kMarkedAtOnce * kSelectThreads;

// The survivors of one query as bits in registers: bit 4 i + j of thread t marks slot 4 (512 i + t) + j.
struct MarkedSurvivors {
  const float* scores;  // as above, aligned to 16 bytes, in whole vectors
  uint32_t marks[kMarkWords];
  uint32_t open[kMarkWords];  // those that keep_from has to decide about
  unsigned count, few;        // up to `few` survivors are visited one by one, more in whole vectors

  // Calls visit(word, factor, bits, slot, scores) for each vector with marks: they are bits * factor in the word, and
  // belong to the scores [4] from `slot` on.
  template <typename Visit>
  __device__ __forceinline__ void for_each_vector(const uint32_t (&words)[kMarkWords], Visit visit) const {
#pragma unroll
    for (int word = 0; word < kMarkWords; ++word) {
      uint32_t vector = word * kWordVectors * kSelectThreads + threadIdx.x, factor = 1;
      for (uint32_t left = words[word]; left != 0; left >>= kMarkedAtOnce) {
        const unsigned bits = left % (1u << kMarkedAtOnce);
        if (bits != 0) {
          const float4 four = reinterpret_cast<const float4*>(scores)[vector];
          const float values[kMarkedAtOnce] = {four.x, four.y, four.z, four.w};
          visit(word, factor, bits, vector * kMarkedAtOnce, values);
        }
        vector += kSelectThreads, factor <<= kMarkedAtOnce;
      }
    }
  }

  // Calls visit(word, bit of the word, slot, score) for each mark.
  template <typename Visit>
  __device__ __forceinline__ void for_each_mark(const uint32_t (&words)[kMarkWords], Visit visit) const {
#pragma unroll
    for (int word = 0; word < kMarkWords; ++word) {
      for (uint32_t left = words[word]; left != 0; left &= left - 1) {
        const uint32_t at = __ffs(static_cast<int>(left)) - 1;
        const uint32_t vector = (word * kWordVectors + at / kMarkedAtOnce) * kSelectThreads + threadIdx.x;
        const uint32_t slot = vector * kMarkedAtOnce + at % kMarkedAtOnce;
        visit(word, left & (0u - left), slot, scores[slot]);
      }
    }
  }

  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    for_each([](float) { return 0; }, [&](uint32_t slot, float score, int) { visit(slot, score); });
  }

  // Calls visit(slot, score, map(score)), and map for scores of other entries as well: no branch waits for it.
  template <typename Map, typename Visit>
  __device__ __forceinline__ void for_each(Map map, Visit visit) const {
    if (in_all_lanes(count <= few)) {
      for_each_mark(marks, [&](int, uint32_t, uint32_t slot, float score) { visit(slot, score, map(score)); });
      return;
    }
    for_each_vector(marks, [&](int, uint32_t, unsigned bits, uint32_t slot, const float (&values)[kMarkedAtOnce]) {
#pragma unroll
      for (int j = 0; j < kMarkedAtOnce; ++j) {
        const auto mapped = map(values[j]);
        if ((bits >> j & 1) != 0) visit(slot + j, values[j], mapped);
      }
    });
  }

  // Drops the survivors in worse buckets than `bucket`, and calls visit(slot, score) for those in it. Only they are
  // open from now on.
  template <typename Map, typename Visit>
  __device__ __forceinline__ void narrow(Map bucket_of, unsigned bucket, Visit visit) {
    uint32_t worse[kMarkWords] = {}, within[kMarkWords] = {};
    const auto narrow_mark = [&](int word, uint32_t bit, uint32_t slot, float score) {
      const unsigned own = bucket_of(score);
      if (own > bucket) worse[word] |= bit;
      if (own == bucket) within[word] |= bit, visit(slot, score);
    };
    const auto narrow_vector = [&](int word, uint32_t factor, unsigned bits, uint32_t slot,
                                   const float (&values)[kMarkedAtOnce]) {
      unsigned below = 0, equal = 0;
#pragma unroll
      for (int j = 0; j < kMarkedAtOnce; ++j) {
        const unsigned own = bucket_of(values[j]);
        if (own > bucket) below |= 1u << j;
        if (own == bucket) equal |= 1u << j;
      }
      worse[word] += below * factor;
      within[word] += (equal & bits) * factor;
      for (unsigned left = equal & bits; left != 0; left &= left - 1) {
        const int j = __ffs(static_cast<int>(left)) - 1;
        visit(slot + j, scores[slot + j]);
      }
    };
    if (in_all_lanes(count <= few)) {
      for_each_mark(marks, narrow_mark);
    } else {
      for_each_vector(marks, narrow_vector);
    }
#pragma unroll
    for (int word = 0; word < kMarkWords; ++word) marks[word] &= ~worse[word], open[word] = within[word];
  }

  __device__ __forceinline__ void keep_from(uint64_t rank, unsigned keep, SelectShared&) {
    const LastKept last(rank);
    uint32_t dropped[kMarkWords] = {};
    for_each_mark(open, [&](int word, uint32_t bit, uint32_t slot, float score) {
      if (!last.keeps(score, [&] { return slot; })) dropped[word] |= bit;
    });
#pragma unroll
    for (int word = 0; word < kMarkWords; ++word) open[word] = marks[word] &= ~dropped[word];
    count = keep;
  }
};

// At most as many survivors of one query as there are threads: one for each thread, or none.
struct SingleSurvivors {
  const float* scores;  // as above
  uint32_t slot;
  bool left;
  unsigned count;

  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    if (left) visit(slot, scores[slot]);
  }

  __device__ __forceinline__ void keep_from(uint64_t rank, unsigned keep, SelectShared&) {
    left = left && LastKept(rank).keeps(scores[slot], [&] { return slot; });
    count = keep;
  }
};

}  // namespace cpr
