// The kernels that run all stages of one query in one block, on the entries that its sieve has gathered, or on all if
// the sieve was wrong. Letters as in cascade_select.cu.
#pragma once

#include "cuda/cascade_select/plan.cuh"
#include "cuda/cascade_select/score.cuh"
#include "cuda/cascade_select/select.cuh"
#include "cuda/cascade_select/stages.cuh"
#include "cuda/cascade_select/tensor_score.cuh"
#include "cuda/common/launch.cuh"

namespace cpr {
namespace {

// The gathered entries of one query that are left, in any order, in global memory: those of earlier stages in front,
// and the list of this stage behind a gap. The lists of later stages come behind them.
struct GatheredSurvivors {
  uint32_t* slots;
  float* values;  // [U, view_stride], from the query on: the scores in each view in use
  int64_t view_stride;
  int views_used;
  const float* scores;  // those in the compared view
  unsigned count, front;
  int64_t gap;

  // Returns where survivor i is.
  __device__ __forceinline__ int64_t at(unsigned i) const { return i < front ? i : i + gap; }

  __device__ __forceinline__ void compare(int u) { scores = values + u * view_stride; }

  // Adds the list of a stage, `added` entries from `start` on.
  __device__ __forceinline__ void add_list(int64_t start, unsigned added, SelectShared& shared) {
    if (in_all_lanes(count > front)) {
      filter([](unsigned) { return true; }, shared);
    }
    front = count, gap = start - count, count += added;
  }

  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    for (unsigned i = threadIdx.x; i < count; i += kSelectThreads) visit(slots[at(i)], scores[at(i)]);
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
        slot[j] = slots[at(i)];
#pragma unroll
        for (int u = 0; u < kMaxSiftedViews; ++u) {
          if (u < views_used) value[j][u] = values[u * view_stride + at(i)];
        }
      }
      unsigned total;
      unsigned place = kept + block_exclusive_sum<kSelectThreads>(__popc(flags), &total, shared.counts);
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if ((flags >> j & 1) == 0) continue;
        slots[place] = slot[j];
#pragma unroll
        for (int u = 0; u < kMaxSiftedViews; ++u) {
          if (u < views_used) values[u * view_stride + place] = value[j][u];
        }
        ++place;
      }
      kept += total;
    }
    __syncthreads();
    count = front = kept;
  }

  __device__ __forceinline__ void keep_from(const LastKept& last, SelectShared& shared) {
    filter([&](unsigned i) { return last.keeps(scores[at(i)], [&] { return slots[at(i)]; }); }, shared);
  }
};

// Some of the gathered survivors, by their places.
struct NearSurvivors {
  const GatheredSurvivors& all;
  const uint32_t* places;
  unsigned count;

  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    for (unsigned i = threadIdx.x; i < count; i += kSelectThreads)
      visit(all.slots[all.at(places[i])], all.scores[all.at(places[i])]);
  }
};

// Final scores, which are compared as they are.
struct Final {
  __device__ __forceinline__ LastKept last_kept(const GatheredSurvivors& survivors, unsigned keep, int, float low,
                                                float high, SelectShared& shared) const {
    return kth_best(survivors, keep, low, high, shared);
  }
  __device__ __forceinline__ void complete(GatheredSurvivors&, SelectShared&) const {}
  __device__ __forceinline__ void settle(const GatheredSurvivors&, int) const {}
};

// Scores within a bound of the canonical ones. Where they could change a decision, canonical scores replace them.
template <typename T>
struct Refined {
  const Plan& plan;
  const T *queries, *memory;
  int64_t b;           // of the inputs
  uint32_t* near;      // [capacity] scratch
  const float* bound;  // [U]

  __device__ __forceinline__ float score(int u, uint32_t slot) const {
    const int64_t view = plan.view_used[u];
    const Matrix<T> query(queries + view * plan.B * plan.D, plan.B, plan.D);
    const Matrix<T> keys(memory + view * plan.K * plan.D, plan.K, plan.D);
    return canonical_score(query, b, keys, slot);
  }

  // Scores without a bound are NaN: replaces them, and drops the entries that cannot be compared.
  __device__ __forceinline__ void complete(GatheredSurvivors& survivors, SelectShared& shared) const {
    bool replaced = false;
    for (unsigned i = threadIdx.x; i < survivors.count; i += kSelectThreads) {
      const int64_t at = survivors.at(i);
      if (!isnan(survivors.values[at])) continue;
      replaced = true;
      for (int u = 0; u < plan.views_used; ++u) {
        survivors.values[u * survivors.view_stride + at] = score(u, survivors.slots[at]);
      }
    }
    if (!__syncthreads_or(replaced)) return;
    auto comparable = [&](unsigned i) {
      bool number = true;
      const float* values = survivors.values + survivors.at(i);
      for (int u = 0; u < plan.views_used; ++u) number &= !isnan(values[u * survivors.view_stride]);
      return number;
    };
    survivors.filter(comparable, shared);
  }

  // If every score is off by at most e, so is the keep-th best score t. Entries above t + 2e are then among the best
  // and entries below t - 2e are not. The entries between are rescored; the last of the best is one of them. For an
  // infinite t the test "not >" selects all entries with score t.
  __device__ __forceinline__ LastKept last_kept(const GatheredSurvivors& survivors, unsigned keep, int u, float low,
                                                float high, SelectShared& shared) const {
    const float threshold = kth_best(survivors, keep, low, high, shared).score, reach = 2 * bound[u];
    unsigned above = 0;
    if (threadIdx.x == 0) shared.gathered = 0;
    __syncthreads();
    for (unsigned i = threadIdx.x; i < survivors.count; i += kSelectThreads) {
      const float score = survivors.scores[survivors.at(i)];
      if (!(fabsf(score - threshold) > reach)) {
        near[atomicAdd(&shared.gathered, 1u)] = i;
      } else if (score > threshold) {
        ++above;
      }
    }
    above = block_reduce<kSelectThreads>(above, Sum(), shared.counts);
    const unsigned count = shared.gathered;
    float* values = survivors.values + u * survivors.view_stride;
    for (unsigned i = threadIdx.x; i < count; i += kSelectThreads) {
      const int64_t at = survivors.at(near[i]);
      values[at] = score(u, survivors.slots[at]);
    }
    __syncthreads();
    const NearSurvivors close = {survivors, near, count};
    return kth_best(close, keep - above, threshold - 2 * reach, threshold + 2 * reach, shared);
  }

  __device__ __forceinline__ void settle(const GatheredSurvivors& survivors, int u) const {
    float* values = survivors.values + u * survivors.view_stride;
    for (unsigned i = threadIdx.x; i < survivors.count; i += kSelectThreads) {
      const int64_t at = survivors.at(i);
      values[at] = score(u, survivors.slots[at]);
    }
    __syncthreads();
  }
};

// Runs the stages of one query on the entries that its sieve has gathered; at the start, those of the first list. An
// entry of a later list passes the stages before for certain, so it is only counted there. Returns whether the sieve
// was right; if not, the survivors are wrong.
template <typename Scores>
__device__ __forceinline__ bool run_sifted_stages(const Plan& plan, const Scores& scores, const Sieve& sieve,
                                                  GatheredSurvivors& survivors, SelectShared& shared) {
  unsigned settled = 0, waiting = 0;  // entries that are left besides the survivors: settled, and in later lists
  for (int s = 0; s < plan.stages; ++s) settled += sieve.dropped[s], waiting += s > 0 ? sieve.gathered[s] : 0;
  for (int s = 0; s < plan.stages; ++s) {
    if (s > 0) {
      survivors.add_list(plan.lists[s], sieve.gathered[s], shared);
      waiting -= sieve.gathered[s];
    }
    const unsigned keep = static_cast<unsigned>(plan.keep[s]), passing = settled + waiting - sieve.dropped[s];
    if (in_all_lanes(keep >= settled + waiting + survivors.count)) {
      if (sieve.dropped[s] > 0) return false;
      continue;
    }
    if (keep <= passing || keep - passing > survivors.count) return false;
    const int u = plan.view[s];
    survivors.compare(u);
    float low = sieve.low[s], high = sieve.high[s];
    if (!(low > -INFINITY) || !(high < INFINITY)) {
      float least, greatest;
      score_range(survivors, shared, &least, &greatest);
      if (!(low > -INFINITY)) low = least;
      if (!(high < INFINITY)) high = greatest;
    }
    const LastKept last = scores.last_kept(survivors, keep - passing, u, low, high, shared);
    if (!(sieve.low[s] <= last.score && last.score <= sieve.high[s])) return false;
    survivors.keep_from(last, shared);
    settled -= sieve.dropped[s];
  }
  const int u = plan.view[plan.stages - 1];
  survivors.compare(u);
  scores.settle(survivors, u);
  return settled == 0;
}

// One block per query, on the entries that its sieve has gathered.
template <typename T, bool kExact>
__global__ void __launch_bounds__(kSelectThreads)
    streamed_stages_kernel(const __grid_constant__ Plan plan, Chunk chunk, Inputs<T> in, int64_t first_query) {
  auto& shared = shared_memory<CascadeShared>();
  Sieve& sieve = chunk.sieves[blockIdx.x];
  const int64_t list = blockIdx.x * plan.capacity, b = first_query + blockIdx.x;
  GatheredSurvivors survivors = {chunk.slots + list,
                                 chunk.values + list,
                                 plan.chunk * plan.capacity,
                                 plan.views_used,
                                 nullptr,
                                 sieve.gathered[0],
                                 sieve.gathered[0],
                                 0};
  bool right = true;
  for (int s = 0; s < plan.stages; ++s) right &= sieve.gathered[s] <= plan.lists[s + 1] - plan.lists[s];
  start_selection(shared.select);
  __syncthreads();
  if (right) {
    if constexpr (kExact) {
      for (int u = 0; u < plan.views_used; ++u) {
        const T* query = in.queries + (plan.view_used[u] * plan.B + b) * plan.D;
        const float bound = query_bound<kSelectThreads>(query, plan.D, chunk.key_squares[u], shared.select.scratch);
        if (threadIdx.x == 0) shared.bound[u] = bound;
      }
      __syncthreads();
      const Refined<T> scores = {plan, in.queries, in.memory, b, chunk.near + list, shared.bound};
      scores.complete(survivors, shared.select);
      right = run_sifted_stages(plan, scores, sieve, survivors, shared.select);
    } else {
      right = run_sifted_stages(plan, Final(), sieve, survivors, shared.select);
    }
  }
  if (!right) {
    if (threadIdx.x == 0) sieve.misled = 1;
    return;
  }
  chunk.at_outputs(plan, blockIdx.x, first_query);
  write_best(plan, survivors, chunk.ranking, shared, chunk.indices, chunk.top_scores);
}

template <typename E>
union SpareShared {
  CascadeShared stages;
  TensorScoreShared<E, 1, kSelectThreads> tile;
};

// Computes the scores of one query and all entries in view u: canonical ones with kExact, otherwise those of tensor
// cores; NaN for excluded entries.
template <typename T, bool kExact, typename E>
__device__ __forceinline__ void score_row(const Plan& plan, const Inputs<T>& in, int u, int64_t b,
                                          SpareShared<E>& shared, float* row) {
  const int64_t view = plan.view_used[u], own_id = in.query_ids != nullptr ? in.query_ids[b] : -1;
  const Matrix<T> query(in.queries + (view * plan.B + b) * plan.D, 1, plan.D);
  const Matrix<T> keys(in.memory + view * plan.K * plan.D, plan.K, plan.D, in.memory_ids);
  auto left_out = [&](int64_t slot) {
    return excluded(in.memory_ids, in.memory_ids != nullptr ? in.memory_ids[slot] : 0, own_id);
  };
  if (kExact) {
    for (int64_t slot = threadIdx.x; slot < plan.K; slot += kSelectThreads) {
      row[slot] = left_out(slot) ? NAN : canonical_score(query, 0, keys, slot);
    }
    return;
  }
  const int lane = threadIdx.x % kWarp;
  for (int64_t k0 = 0; k0 < plan.K; k0 += kSelectThreads / 2) {
    TensorScores score;
    score_tile<false>(query, 0, keys, k0, shared.tile, score);
    if (first_query_of_warp() > 0 || lane >= 4) continue;  // other queries of the tile are zeros
#pragma unroll
    for (int key = 0; key < kTensorKeyPieces * 2; ++key) {
      const int64_t slot = k0 + first_key_of_warp() + key / 2 * 8 + lane * 2 + key % 2;
      if (slot < plan.K) row[slot] = left_out(slot) ? NAN : score[0][key / 2][key % 2] + 0.0f;
    }
  }
}

// Selects for the queries whose sieve was wrong, or has gathered more than there is room for: from all entries. A block
// takes every gridDim.x-th query.
template <typename T, bool kExact>
__global__ void __launch_bounds__(kSelectThreads)
    misled_stages_kernel(const __grid_constant__ Plan plan, Chunk chunk, Inputs<T> in, int64_t first_query,
                         int64_t queries) {
  auto& shared = shared_memory<SpareShared<typename Multiplied<T>::Type>>();
  float* rows = chunk.spare_scores + blockIdx.x * plan.views_used * plan.row;
  uint32_t* list = chunk.spare_slots + blockIdx.x * plan.row;
  for (int64_t b = blockIdx.x; b < queries; b += gridDim.x) {
    if (chunk.sieves[b].misled == 0) continue;
    for (int u = 0; u < plan.views_used; ++u) {
      score_row<T, kExact>(plan, in, u, first_query + b, shared, rows + u * plan.row);
    }
    __syncthreads();
    Chunk own = chunk;
    own.at_outputs(plan, b, first_query);
    select_from_rows(plan, own, rows, plan.row, list, shared.stages);
    __syncthreads();
  }
}

template <bool kExact, typename T>
const char* launch_streamed_stages(const Plan& plan, const Inputs<T>& in, int64_t first, int64_t queries,
                                   const Chunk& chunk, cudaStream_t stream) {
  const char* error = launch<CascadeShared>(streamed_stages_kernel<T, kExact>, dim3(static_cast<unsigned>(queries)),
                                            kSelectThreads, stream, plan, chunk, in, first);
  if (error != nullptr || !plan.sifted) return error;  // without a sieve nothing misleads
  const dim3 spare(static_cast<unsigned>(plan.spare < queries ? plan.spare : queries));
  return launch<SpareShared<typename Multiplied<T>::Type>>(misled_stages_kernel<T, kExact>, spare, kSelectThreads,
                                                           stream, plan, chunk, in, first, queries);
}

}  // namespace
}  // namespace cpr
