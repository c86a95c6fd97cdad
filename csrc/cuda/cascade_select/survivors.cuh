// The survivors of one query in one block: as a list, as bits in registers, or a few for each thread; and their ranks.
//
// Each entry is compared by a 64-bit rank, larger is better. The upper half is an integer that orders like the score,
// the lower half the complement of the slot. Ranks are distinct, so the k best are one set, whatever the order of
// threads.
#pragma once

#include <math.h>
#include <stdint.h>

#include "cuda/common/reduce.cuh"
#include "cuda/common/tensor_core.cuh"

namespace cpr {

constexpr int kSelectThreads = 512;
constexpr int kBuckets = 2048;
constexpr int kBucketsPerThread = kBuckets / kSelectThreads;
constexpr int kBucketBits = 11;
constexpr int kCandidates = kSelectThreads;  // up to this many are ranked by comparing all pairs
constexpr int kRankedAtOnce = kWarp;         // up to this many take less time to rank than a stage to select
static_assert(1 << kBucketBits == kBuckets);
static_assert(kBucketsPerThread == 4, "a thread clears and reads its buckets as one vector");

// The position of the k-th best: its bucket, and its place (1 = best) among the `population` of that bucket.
struct Boundary {
  unsigned bucket, place, population;
};

// Returns an integer that orders like the float.
__device__ __forceinline__ uint32_t ordered(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}

// Returns the float that ordered() made the integer of.
__device__ __forceinline__ float unordered(uint32_t key) {
  return __uint_as_float(key ^ ((key >> 31) != 0 ? 0x80000000u : 0xffffffffu));
}

__device__ __forceinline__ uint64_t rank_of(float score, uint32_t slot) {
  return (static_cast<uint64_t>(ordered(score)) << 32) | static_cast<uint32_t>(~slot);
}

__device__ __forceinline__ float score_of(uint64_t rank) { return unordered(static_cast<uint32_t>(rank >> 32)); }

__device__ __forceinline__ uint32_t slot_of(uint64_t rank) { return ~static_cast<uint32_t>(rank); }

// The last entry that a stage keeps. Scores of survivors are neither NaN nor -0, so floats order them like ranks.
struct LastKept {
  float score;
  uint32_t slot;

  // slot_at(): the slot of the entry, which only equal scores need.
  template <typename SlotAt>
  __device__ __forceinline__ bool keeps(float other, SlotAt slot_at) const {
    return other > score || (other == score && slot_at() <= slot);
  }
};

__device__ __forceinline__ LastKept last_of(uint64_t rank) { return {score_of(rank), slot_of(rank)}; }

constexpr int kMaxSpread = 8 * kSelectThreads;  // survivors that can be handed from thread to thread

struct alignas(16) SelectShared {
  unsigned histogram[kBuckets];  // zeros whenever it is not in use
  union {
    struct {
      uint64_t candidates[kCandidates];
      float others[kCandidates];  // their scores in the view that is not compared
    };
    uint16_t slots[kMaxSpread];  // of survivors that go to other threads
  };
  uint2 ranges[kSelectThreads / kWarp];
  float scratch[kSelectThreads / kWarp];
  unsigned counts[kSelectThreads / kWarp];
  Boundary boundary;
  unsigned gathered;
  LastKept last;
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

  // Returns how many survivors are in the share of this thread.
  __device__ __forceinline__ unsigned own() const {
    return threadIdx.x < count ? (count - threadIdx.x + kSelectThreads - 1) / kSelectThreads : 0;
  }

  __device__ __forceinline__ void keep_from(const LastKept& last, unsigned keep, SelectShared& shared);
};

constexpr int kMarkWords = 2, kMarkedAtOnce = 4;         // neighbouring slots, whose scores are one vector
constexpr int kWordVectors = 32 / kMarkedAtOnce;         // whose survivors are the bits of one word
constexpr int kMarkVectors = kMarkWords * kWordVectors;  // of a thread
constexpr int64_t kMaxMarked = kMarkVectors * kMarkedAtOnce * kSelectThreads;
static_assert(kMaxMarked <= 1 << 16, "slots are handed on in 16 bits");

// The survivors of one query as bits in registers: bit 4 i + j of thread t marks slot 4 (512 i + t) + j.
struct MarkedSurvivors {
  const float* scores;  // as above, aligned to 16 bytes, in whole vectors
  uint32_t marks[kMarkWords];
  uint32_t open[kMarkWords];  // those that keep_from has to decide about
  unsigned count;

  __device__ __forceinline__ unsigned own() const {
    unsigned sum = 0;
#pragma unroll
    for (int word = 0; word < kMarkWords; ++word) sum += __popc(marks[word]);
    return sum;
  }

  // Calls visit(word, factor, bits, slot, scores) for each vector up to the last with marks: they are bits * factor in
  // the word, and belong to the scores [4] from `slot` on.
  template <typename Visit>
  __device__ __forceinline__ void for_each_vector(Visit visit) const {
#pragma unroll
    for (int word = 0; word < kMarkWords; ++word) {
      uint32_t slot = (word * kWordVectors * kSelectThreads + threadIdx.x) * kMarkedAtOnce, factor = 1;
      const float4* at = reinterpret_cast<const float4*>(scores + slot);
#pragma unroll 1
      for (uint32_t left = marks[word]; left != 0; left >>= kMarkedAtOnce) {
        const float values[kMarkedAtOnce] = {at->x, at->y, at->z, at->w};
        visit(word, factor, left % (1u << kMarkedAtOnce), slot, values);
        at += kSelectThreads, slot += kSelectThreads * kMarkedAtOnce, factor <<= kMarkedAtOnce;
      }
    }
  }

  // Calls visit(word, bit of the word, slot) for each mark.
  template <typename Visit>
  __device__ __forceinline__ void for_each_mark(const uint32_t (&words)[kMarkWords], Visit visit) const {
#pragma unroll
    for (int word = 0; word < kMarkWords; ++word) {
      for (uint32_t left = words[word]; left != 0; left &= left - 1) {
        const uint32_t at = __ffs(static_cast<int>(left)) - 1;
        const uint32_t vector = (word * kWordVectors + at / kMarkedAtOnce) * kSelectThreads + threadIdx.x;
        visit(word, left & (0u - left), vector * kMarkedAtOnce + at % kMarkedAtOnce);
      }
    }
  }

  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    for_each_mark(marks, [&](int, uint32_t, uint32_t slot) { visit(slot, scores[slot]); });
  }

  template <typename Visit>
  __device__ __forceinline__ void for_each_slot(Visit visit) const {
    for_each_mark(marks, [&](int, uint32_t, uint32_t slot) { visit(slot); });
  }

  template <typename Map>
  __device__ __forceinline__ void count_in(unsigned* histogram, Map bucket_of) const {
    for_each_vector([&](int, uint32_t, unsigned bits, uint32_t, const float (&values)[kMarkedAtOnce]) {
#pragma unroll
      for (int j = 0; j < kMarkedAtOnce; ++j) {
        if ((bits >> j & 1) != 0) atomicAdd(&histogram[bucket_of(values[j])], 1u);
      }
    });
  }

  // Drops the survivors in worse buckets than `bucket`, and calls visit(slot, score) for those in it. Only they are
  // open from now on.
  template <typename Map, typename Visit>
  __device__ __forceinline__ void narrow(Map bucket_of, unsigned bucket, Visit visit) {
    const uint32_t limit = Map::kFirst + bucket;
    uint32_t worse[kMarkWords] = {}, within[kMarkWords] = {};
    for_each_vector([&](int word, uint32_t factor, unsigned bits, uint32_t slot, const float (&values)[kMarkedAtOnce]) {
      unsigned below = 0;
      bool some_equal = false;
#pragma unroll
      for (int j = kMarkedAtOnce - 1; j >= 0; --j) {
        const uint32_t own = bucket_of.number(values[j]);
        below = __funnelshift_l(limit - own, below, 1);  // appends the sign of the difference
        some_equal |= own == limit;
      }
      worse[word] += below * factor;
      if (!some_equal) return;
#pragma unroll
      for (int j = 0; j < kMarkedAtOnce; ++j) {
        if ((bits >> j & 1) == 0 || bucket_of.number(values[j]) != limit) continue;
        within[word] += factor << j;
        visit(slot + j, values[j]);
      }
    });
#pragma unroll
    for (int word = 0; word < kMarkWords; ++word) marks[word] &= ~worse[word], open[word] = within[word];
  }

  __device__ __forceinline__ void keep_from(const LastKept& last, unsigned keep, SelectShared&) {
    uint32_t dropped[kMarkWords] = {};
    for_each_mark(open, [&](int word, uint32_t bit, uint32_t slot) {
      if (!last.keeps(scores[slot], [&] { return slot; })) dropped[word] |= bit;
    });
#pragma unroll
    for (int word = 0; word < kMarkWords; ++word) open[word] = marks[word] &= ~dropped[word];
    count = keep;
  }
};

// At most kHeld survivors of one query for each thread, in registers.
template <int kHeld>
struct HeldSurvivors {
  const float* scores;  // as above
  uint32_t slots[kHeld];
  uint32_t left, open;  // bits of the survivors, and of those that keep_from has to decide about
  unsigned count;

  __device__ __forceinline__ unsigned own() const { return __popc(left); }

  template <typename Visit>
  __device__ __forceinline__ void for_each_slot(Visit visit) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if ((left >> i & 1) != 0) visit(slots[i]);
    }
  }

  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    for_each_slot([&](uint32_t slot) { visit(slot, scores[slot]); });
  }

  // As that of marked survivors.
  template <typename Map, typename Visit>
  __device__ __forceinline__ void narrow(Map bucket_of, unsigned bucket, Visit visit) {
    const uint32_t limit = Map::kFirst + bucket;
    uint32_t worse = 0;
    open = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const uint32_t own = bucket_of.number(scores[slots[i]]);
      if (own > limit) worse |= 1u << i;
      if (own == limit) open |= 1u << i;
    }
    left &= ~worse, open &= left;
    if (open == 0) return;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if ((open >> i & 1) != 0) visit(slots[i], scores[slots[i]]);
    }
  }

  __device__ __forceinline__ void keep_from(const LastKept& last, unsigned keep, SelectShared&) {
    if (open != 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const bool kept = last.keeps(scores[slots[i]], [&] { return slots[i]; });
        if ((open >> i & 1) != 0 && !kept) left &= ~(1u << i);
      }
    }
    open = left, count = keep;
  }
};

}  // namespace cpr
