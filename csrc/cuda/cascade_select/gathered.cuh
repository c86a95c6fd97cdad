// The entries that the sieve of one query has gathered, as survivors of the stages. Letters as in cascade_select.cu.
#pragma once

#include <type_traits>

#include "cuda/cascade_select/plan.cuh"
#include "cuda/cascade_select/select.cuh"

namespace cpr {
namespace {

// The gathered entries of one query that the stages up to now have left, in any order; with kHeld in shared memory.
template <bool kHeld>
struct GatheredSurvivors {
  using Index = typename std::conditional<kHeld, uint32_t, int64_t>::type;
  uint32_t* slots;        // [room]
  float* values;          // [U, view_stride] their scores in each view in use
  Index view_stride;      // at least `room`
  const uint4* gathered;  // [capacity] the lists of all stages
  int views_used;
  int compared;         // view
  const float* scores;  // those in it
  unsigned count;

  __device__ __forceinline__ float* values_in(int u) const { return values + u * view_stride; }

  __device__ __forceinline__ void compare(int u) { compared = u, scores = values_in(u); }

  // Adds the list of a stage, `added` entries from `start` on, for which there must be room.
  __device__ __forceinline__ void add_list(int64_t start, unsigned added) {
#pragma unroll 4
    for (unsigned i = threadIdx.x; i < added; i += kSelectThreads) {
      const uint4 entry = gathered[start + i];
      slots[count + i] = entry.x;
      values[count + i] = __uint_as_float(entry.y);
      if (views_used > 1) values_in(1)[count + i] = __uint_as_float(entry.z);
    }
    __syncthreads();
    count += added;
  }

  // Calls visit(i, score) for each survivor in the share of this thread. In global memory, requests are of four scores.
  template <typename Visit>
  __device__ __forceinline__ void for_each_score(Visit visit) const {
    unsigned rest = threadIdx.x;
    if constexpr (!kHeld) {
      for (unsigned i = threadIdx.x * 4; i < count / 4 * 4; i += kSelectThreads * 4) {
        const float4 four = *reinterpret_cast<const float4*>(scores + i);
        visit(i, four.x);
        visit(i + 1, four.y);
        visit(i + 2, four.z);
        visit(i + 3, four.w);
      }
      rest += count / 4 * 4;
    }
    for (unsigned i = rest; i < count; i += kSelectThreads) visit(i, scores[i]);
  }

  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    for_each_score([&](unsigned i, float score) { visit(slots[i], score); });
  }

  // Returns how many survivors are in the share of this thread.
  __device__ __forceinline__ unsigned own() const {
    const auto share = [](unsigned n) {
      return threadIdx.x < n ? (n - threadIdx.x + kSelectThreads - 1) / kSelectThreads : 0;
    };
    return kHeld ? share(count) : share(count / 4) * 4 + share(count % 4);
  }

  // Keeps the entries for which keeps(i, score) holds, with the score in the compared view. Each tile is read before a
  // barrier and written after it, never ahead of the reads.
  template <typename Keeps>
  __device__ __forceinline__ void filter(Keeps keeps, SelectShared& shared) {
    constexpr int kBatch = 4;  // entries of a thread in a tile
    unsigned kept = 0;
    for (unsigned tile = 0; tile < count; tile += kBatch * kSelectThreads) {
      uint32_t slot[kBatch] = {};
      float score[kBatch] = {}, other[kBatch] = {};  // in the compared view, and in the other if there is one
      unsigned votes[kBatch], of_warp = 0;           // lanes that keep their entry
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const unsigned i = tile + j * kSelectThreads + threadIdx.x;
        if (i < count) score[j] = scores[i];
        const bool stays = i < count && keeps(i, score[j]);
        votes[j] = __ballot_sync(kFullWarp, stays);
        of_warp += __popc(votes[j]);
        if (!stays) continue;
        slot[j] = slots[i];
        if (views_used > 1) other[j] = values_in(1 - compared)[i];
      }
      unsigned total, place = kept + sum_of_warps_before<kSelectThreads>(of_warp, &total, shared.counts);
      __syncthreads();
      const unsigned lane = threadIdx.x % kWarp, below = (1u << lane) - 1;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {  // lanes that follow each other write to places that do
        if ((votes[j] >> lane & 1) != 0) {
          const unsigned at = place + __popc(votes[j] & below);
          slots[at] = slot[j];
          values_in(compared)[at] = score[j];
          if (views_used > 1) values_in(1 - compared)[at] = other[j];
        }
        place += __popc(votes[j]);
      }
      kept += total;
    }
    __syncthreads();
    count = kept;
  }

  __device__ __forceinline__ void keep_from(const LastKept& last, SelectShared& shared) {
    filter([&](unsigned i, float score) { return last.keeps(score, [&] { return slots[i]; }); }, shared);
  }

  // Keeps the best `keep` in the compared view u, at least one and at most all, and returns the last of them. [low,
  // high] as in kth_best. One pass keeps what is in better buckets than the last, and takes out those in its bucket,
  // which come back in order.
  __device__ __forceinline__ LastKept keep_best(unsigned keep, int u, float low, float high, SelectShared& shared) {
    const LinearBuckets bucket_of(low, high);
    if (threadIdx.x == 0) shared.gathered = 0;
    fill_histogram(*this, bucket_of, shared);
    const Boundary boundary = find_boundary(keep, shared);
    if (in_all_lanes(boundary.population > kCandidates)) {
      const LastKept last = last_of(kth_best_by_radix(*this, keep, shared));
      keep_from(last, shared);
      return last;
    }
    const bool others = views_used > 1;
    const auto in_better_bucket = [&](unsigned i, float score) {
      const unsigned bucket = bucket_of(score);
      if (bucket == boundary.bucket) {
        const unsigned place = atomicAdd(&shared.gathered, 1u);
        shared.candidates[place] = rank_of(score, slots[i]);
        if (others) shared.others[place] = values_in(1 - u)[i];
      }
      return bucket < boundary.bucket;
    };
    filter(in_better_bucket, shared);
    if (threadIdx.x < boundary.population) {
      const uint64_t rank = shared.candidates[threadIdx.x];
      const unsigned better = place_among(shared.candidates, boundary.population, rank), at = count + better;
      if (better < boundary.place) {
        slots[at] = slot_of(rank);
        values_in(u)[at] = score_of(rank);
        if (others) values_in(1 - u)[at] = shared.others[threadIdx.x];
        if (better + 1 == boundary.place) shared.last = last_of(rank);
      }
    }
    __syncthreads();
    count += boundary.place;
    return shared.last;
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
    for (unsigned i = threadIdx.x; i < count; i += kSelectThreads) visit(all.slots[places[i]], all.scores[places[i]]);
  }
};

}  // namespace
}  // namespace cpr
