// The entries that the sieve of one query has gathered, as survivors of the stages. Letters as in cascade_select.cu.
#pragma once

#include <type_traits>

#include "cuda/cascade_select/plan.cuh"
#include "cuda/cascade_select/select.cuh"

namespace cpr {
namespace {

// Entries and their scores [U, view_stride] in each view in use.
template <typename Index>
struct EntryLists {
  uint32_t* slots;
  float* values;
  Index view_stride;
};

// The gathered entries of one query that are left, in any order. In global memory: those of earlier stages in front,
// and the list of this stage behind a gap; the lists of later stages come behind them. With kHeld, in shared memory
// without a gap; the lists of later stages are in global memory.
template <bool kHeld>
struct GatheredSurvivors {
  using Index = typename std::conditional<kHeld, uint32_t, int64_t>::type;
  EntryLists<Index> left;
  const EntryLists<int64_t>& gathered;
  int views_used;
  const float* scores;  // those in the compared view
  unsigned count, front;
  int64_t gap;

  // Returns where survivor i is.
  __device__ __forceinline__ Index at(unsigned i) const { return kHeld || i < front ? i : static_cast<Index>(i + gap); }

  __device__ __forceinline__ void compare(int u) { scores = left.values + u * left.view_stride; }

  // Adds the list of a stage, `added` entries from `start` on.
  __device__ __forceinline__ void add_list(int64_t start, unsigned added, SelectShared& shared) {
    if constexpr (kHeld) {
#pragma unroll 4
      for (unsigned i = threadIdx.x; i < added; i += kSelectThreads) {
        left.slots[count + i] = gathered.slots[start + i];
#pragma unroll
        for (int u = 0; u < kMaxSiftedViews; ++u) {
          if (u >= views_used) continue;
          left.values[u * left.view_stride + count + i] = gathered.values[u * gathered.view_stride + start + i];
        }
      }
      __syncthreads();
    } else if (in_all_lanes(count > front)) {
      filter([](unsigned) { return true; }, shared);
    }
    front = count, gap = start - count, count += added;
    if (gap == 0) front = count;
  }

  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    for (unsigned i = threadIdx.x; i < count; i += kSelectThreads) visit(left.slots[at(i)], scores[at(i)]);
  }

  // Returns how many survivors are in the share of this thread.
  __device__ __forceinline__ unsigned own() const {
    return threadIdx.x < count ? (count - threadIdx.x + kSelectThreads - 1) / kSelectThreads : 0;
  }

  // Keeps the entries for which keeps(i) holds. Each tile is read before a barrier and written after it, never ahead of
  // the reads.
  template <typename Keeps>
  __device__ __forceinline__ void filter(Keeps keeps, SelectShared& shared) {
    constexpr int kBatch = 4;  // entries of a thread in a tile
    unsigned kept = 0;
    for (unsigned tile = 0; tile < count; tile += kBatch * kSelectThreads) {
      uint32_t slot[kBatch] = {};
      float value[kBatch][kMaxSiftedViews] = {};
      unsigned flags = 0;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const unsigned i = tile + j * kSelectThreads + threadIdx.x;
        if (i >= count || !keeps(i)) continue;
        flags |= 1u << j;
        slot[j] = left.slots[at(i)];
#pragma unroll
        for (int u = 0; u < kMaxSiftedViews; ++u) {
          if (u < views_used) value[j][u] = left.values[u * left.view_stride + at(i)];
        }
      }
      unsigned total;
      unsigned place = kept + block_exclusive_sum<kSelectThreads>(__popc(flags), &total, shared.counts);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if ((flags >> j & 1) == 0) continue;
        left.slots[place] = slot[j];
#pragma unroll
        for (int u = 0; u < kMaxSiftedViews; ++u) {
          if (u < views_used) left.values[u * left.view_stride + place] = value[j][u];
        }
        ++place;
      }
      kept += total;
    }
    __syncthreads();
    count = front = kept;
  }

  __device__ __forceinline__ void keep_from(const LastKept& last, SelectShared& shared) {
    filter([&](unsigned i) { return last.keeps(scores[at(i)], [&] { return left.slots[at(i)]; }); }, shared);
  }
};

// Some of the gathered survivors, by their places.
template <bool kHeld>
struct NearSurvivors {
  const GatheredSurvivors<kHeld>& all;
  const uint32_t* places;
  unsigned count;

  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    for (unsigned i = threadIdx.x; i < count; i += kSelectThreads)
      visit(all.left.slots[all.at(places[i])], all.scores[all.at(places[i])]);
  }
};

}  // namespace
}  // namespace cpr
