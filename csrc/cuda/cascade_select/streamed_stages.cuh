// The kernels that run all stages of one query in one block, on the entries that its sieve has gathered, or on all if
// the sieve was wrong. Letters as in cascade_select.cu.
#pragma once

#include "cuda/cascade_select/gathered.cuh"
#include "cuda/cascade_select/plan.cuh"
#include "cuda/cascade_select/score.cuh"
#include "cuda/cascade_select/select.cuh"
#include "cuda/cascade_select/stages.cuh"
#include "cuda/cascade_select/tensor_score.cuh"
#include "cuda/common/launch.cuh"

namespace cpr {
namespace {

// Final scores, which are compared as they are. With lists in global memory, a pass more takes fewer registers.
struct Final {
  template <bool kHeld>
  __device__ __forceinline__ LastKept keep_best(GatheredSurvivors<kHeld>& survivors, unsigned keep, int u, float low,
                                                float high, SelectShared& shared) const {
    if constexpr (kHeld) {
      return survivors.keep_best(keep, u, low, high, shared);
    } else {
      const LastKept last = kth_best(survivors, keep, low, high, shared);
      survivors.keep_from(last, shared);
      return last;
    }
  }
  template <bool kHeld>
  __device__ __forceinline__ void complete(GatheredSurvivors<kHeld>&, SelectShared&) const {}
  template <bool kHeld>
  __device__ __forceinline__ void settle(const GatheredSurvivors<kHeld>&, int) const {}
};

// Scores within a bound of the canonical ones. Where they could change a decision, canonical scores replace them.
template <typename T, bool kHeld>
struct Refined {
  using Survivors = GatheredSurvivors<kHeld>;
  const Plan& plan;
  const T *queries, *memory;
  int64_t b;           // of the inputs
  uint32_t* near;      // [room] scratch
  const float* bound;  // [U]
  const float* query;  // [U, held_width(plan)] with kHeld: the query, in shared memory

  __device__ __forceinline__ float score(int u, uint32_t slot) const {
    const int64_t view = plan.view_used[u];
    const Matrix<T> keys(memory + view * plan.K * plan.D, plan.K, plan.D);
    if constexpr (kHeld) {
      const Matrix<float> held(query + u * held_width(plan), 1, held_width(plan));
      return canonical_score(held, 0, keys, slot);
    } else {
      const Matrix<T> all(queries + view * plan.B * plan.D, plan.B, plan.D);
      return canonical_score(all, b, keys, slot);
    }
  }

  // Scores without a bound are NaN: replaces them, and drops the entries that cannot be compared.
  __device__ __forceinline__ void complete(Survivors& survivors, SelectShared& shared) const {
    bool replaced = false;
    for (unsigned i = threadIdx.x; i < survivors.count; i += kSelectThreads) {
      if (!isnan(survivors.values[i])) continue;
      replaced = true;
      for (int u = 0; u < plan.views_used; ++u) survivors.values_in(u)[i] = score(u, survivors.slots[i]);
    }
    if (!__syncthreads_or(replaced)) return;
    survivors.compare(0);
    auto comparable = [&](unsigned i, float) {
      bool number = true;
      for (int u = 0; u < plan.views_used; ++u) number &= !isnan(survivors.values_in(u)[i]);
      return number;
    };
    survivors.filter(comparable, shared);
  }

  // If every score is off by at most e, so is the keep-th best score t. Entries above t + 2e are then among the best
  // and entries below t - 2e are not. The entries between are rescored; the last of the best is one of them. For an
  // infinite t the test "not >" selects all entries with score t.
  __device__ __forceinline__ LastKept keep_best(Survivors& survivors, unsigned keep, int u, float low, float high,
                                                SelectShared& shared) const {
    const float threshold = kth_best(survivors, keep, low, high, shared).score, reach = 2 * bound[u];
    unsigned above = 0;
    if (threadIdx.x == 0) shared.gathered = 0;
    __syncthreads();
    survivors.for_each_score([&](unsigned i, float score) {
      if (!(fabsf(score - threshold) > reach)) {
        near[atomicAdd(&shared.gathered, 1u)] = i;
      } else if (score > threshold) {
        ++above;
      }
    });
    above = block_reduce<kSelectThreads>(above, Sum(), shared.counts);
    const unsigned count = shared.gathered;
    float* values = survivors.values_in(u);
    for (unsigned i = threadIdx.x; i < count; i += kSelectThreads) values[near[i]] = score(u, survivors.slots[near[i]]);
    __syncthreads();
    const NearSurvivors<kHeld> close = {survivors, near, count};
    const LastKept last = kth_best(close, keep - above, threshold - 2 * reach, threshold + 2 * reach, shared);
    survivors.keep_from(last, shared);
    return last;
  }

  __device__ __forceinline__ void settle(const Survivors& survivors, int u) const {
    float* values = survivors.values_in(u);
    for (unsigned i = threadIdx.x; i < survivors.count; i += kSelectThreads) values[i] = score(u, survivors.slots[i]);
    __syncthreads();
  }
};

// What the pass over the memory has found for a query: of stage s in lane s of each warp.
struct Sifted {
  unsigned dropped, gathered;

  __device__ __forceinline__ Sifted(const Plan& plan, const Sieve& sieve) : dropped(0), gathered(0) {
    const int s = threadIdx.x % kWarp;
    if (s < plan.stages) dropped = sieve.dropped[s], gathered = sieve.gathered[s];
  }

  // Returns whether all gathered entries are in their lists, and those of the first have room in a stage.
  __device__ __forceinline__ bool listed(const Plan& plan) const {
    const int s = threadIdx.x % kWarp;
    bool lost = s == 0 && gathered > plan.room;
    if (s < plan.stages) lost |= gathered > plan.lists[s + 1] - plan.lists[s];
    return !in_all_lanes(lost);
  }
};

// Runs the stages of one query on the entries that its sieve has gathered; at the start, those of the first list. An
// entry of a later list passes the stages before for certain, so it is only counted there. Returns whether the sieve
// was right and there was room; if not, the survivors are wrong.
template <typename Scores, bool kHeld>
__device__ __forceinline__ bool run_sifted_stages(const Plan& plan, const Scores& scores, const Sieve& sieve,
                                                  const Sifted& sifted, GatheredSurvivors<kHeld>& survivors,
                                                  SelectShared& shared) {
  // Entries that are left besides the survivors: settled, and in later lists.
  unsigned settled = warp_sum(sifted.dropped),
           waiting = warp_sum(sifted.gathered) - __shfl_sync(kFullWarp, sifted.gathered, 0);
  for (int s = 0; s < plan.stages; ++s) {
    const unsigned dropped = __shfl_sync(kFullWarp, sifted.dropped, s);
    if (s > 0) {
      const unsigned gathered = __shfl_sync(kFullWarp, sifted.gathered, s);
      if (in_all_lanes(survivors.count + gathered > plan.room)) return false;
      survivors.add_list(plan.lists[s], gathered);
      waiting -= gathered;
    }
    const unsigned keep = static_cast<unsigned>(plan.keep[s]), passing = settled + waiting - dropped;
    if (in_all_lanes(keep >= settled + waiting + survivors.count)) {
      if (dropped > 0) return false;
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
    const LastKept last = scores.keep_best(survivors, keep - passing, u, low, high, shared);
    if (!(sieve.low[s] <= last.score && last.score <= sieve.high[s])) return false;
    settled -= dropped;
  }
  const int u = plan.view[plan.stages - 1];
  survivors.compare(u);
  scores.settle(survivors, u);
  return settled == 0;
}

// Computes the scores of one query and all entries in view u: canonical ones with kExact, otherwise those of tensor
// cores; NaN for excluded entries.
template <typename T, bool kExact>
__device__ __forceinline__ void score_row(const Plan& plan, const Inputs<T>& in, int u, int64_t b,
                                          SpareShared<T>& shared, float* row) {
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
  for (int64_t k0 = 0; k0 < plan.K; k0 += SpareTile::kKeys) {
    SpareTile::Scores score;
    score_tile<false>(query, 0, keys, k0, shared.tile, score);
    if (SpareTile::first_query() > 0 || lane >= 4) continue;  // other queries of the tile are zeros
#pragma unroll
    for (int key = 0; key < kTensorKeyPieces * 2; ++key) {
      const int64_t slot = k0 + SpareTile::first_key() + key / 2 * 8 + lane * 2 + key % 2;
      if (slot < plan.K) row[slot] = left_out(slot) ? NAN : score[0][key / 2][key % 2] + 0.0f;
    }
  }
}

// Selects for a query whose sieve was wrong, or has gathered more than there is room for: from all entries. spare:
// which of the rows for such queries it uses. A barrier must stand before and after.
template <typename T, bool kExact>
__device__ __forceinline__ void select_from_all(const Plan& plan, const Chunk& chunk, const Inputs<T>& in,
                                                int64_t first_query, int64_t query, int64_t spare,
                                                SpareShared<T>& shared) {
  float* rows = chunk.spare_scores + spare * plan.views_used * plan.row;
  for (int u = 0; u < plan.views_used; ++u) {
    score_row<T, kExact>(plan, in, u, first_query + query, shared, rows + u * plan.row);
  }
  __syncthreads();
  Chunk own = chunk;
  own.at_outputs(plan, query, first_query);
  select_from_rows(plan, own, rows, plan.row, chunk.spare_slots + spare * plan.row, shared.stages);
}

// Copies a query in every view in use to shared memory, with zeros behind it.
template <typename T>
__device__ __forceinline__ void hold_query(const Plan& plan, const T* queries, int64_t b, float* held) {
  const int width = static_cast<int>(held_width(plan));
  for (int u = 0; u < plan.views_used; ++u) {
    const T* query = queries + (plan.view_used[u] * plan.B + b) * plan.D;
    for (int d = threadIdx.x; d < width; d += kSelectThreads) held[u * width + d] = d < plan.D ? widen(query[d]) : 0.0f;
  }
}

// Blocks of a multiprocessor: as many as the registers allow without spilling what the loops use.
template <bool kExact, bool kHeld, bool kAlone>
constexpr int kStagesAtOnce = kAlone            ? 1
                              : kHeld || kExact ? 2
                                                : 3;

// One block per query, on the entries that its sieve has gathered. With kHeld, shared memory has the query [U,
// held_width], and the values [U, room] and slots [room] of the survivors, behind CascadeShared. With kAlone, a block
// whose sieve was wrong selects from all entries. Otherwise misled_stages_kernel does.
template <typename T, bool kExact, bool kHeld, bool kAlone>
__global__ void __launch_bounds__(kSelectThreads, kStagesAtOnce<kExact, kHeld, kAlone>)
    streamed_stages_kernel(const __grid_constant__ Plan plan, Chunk chunk, Inputs<T> in, int64_t first_query) {
  auto& spare = shared_memory<SpareShared<T>>();
  CascadeShared& shared = spare.stages;
  float* query = reinterpret_cast<float*>(&shared + 1);
  float* held = query + plan.views_used * held_width(plan);
  Sieve& sieve = chunk.sieves[blockIdx.x];
  const int64_t list = blockIdx.x * plan.room, b = first_query + blockIdx.x;
  const uint4* gathered = chunk.gathered + blockIdx.x * plan.capacity;
  GatheredSurvivors<kHeld> survivors = {nullptr, nullptr, 0, gathered, plan.views_used, 0, nullptr, 0};
  if constexpr (kHeld) {
    survivors.view_stride = static_cast<uint32_t>(plan.room);
    survivors.values = held;
    survivors.slots = reinterpret_cast<uint32_t*>(held + plan.views_used * survivors.view_stride);
  } else {
    survivors.view_stride = plan.chunk * plan.room;
    survivors.values = chunk.values + list;
    survivors.slots = chunk.slots + list;
  }
  const Sifted sifted(plan, sieve);
  bool right = sifted.listed(plan);
  start_selection(shared.select);
  if (kHeld && kExact) hold_query(plan, in.queries, b, query);
  __syncthreads();
  if (right) {
    survivors.add_list(0, __shfl_sync(kFullWarp, sifted.gathered, 0));
    if constexpr (kExact) {
      for (int u = 0; u < plan.views_used; ++u) {
        const T* row = in.queries + (plan.view_used[u] * plan.B + b) * plan.D;
        const float bound = query_bound<kSelectThreads>(row, plan.D, chunk.key_squares[u], shared.select.scratch);
        if (threadIdx.x == 0) shared.bound[u] = bound;
      }
      __syncthreads();
      const Refined<T, kHeld> scores = {plan, in.queries, in.memory, b, chunk.near + list, shared.bound, query};
      scores.complete(survivors, shared.select);
      right = run_sifted_stages(plan, scores, sieve, sifted, survivors, shared.select);
    } else {
      right = run_sifted_stages(plan, Final(), sieve, sifted, survivors, shared.select);
    }
  }
  if (!right) {
    if constexpr (kAlone) {
      __syncthreads();
      select_from_all<T, kExact>(plan, chunk, in, first_query, blockIdx.x, blockIdx.x, spare);
    } else if (threadIdx.x == 0) {
      sieve.misled = 1;
    }
    return;
  }
  chunk.at_outputs(plan, blockIdx.x, first_query);
  write_best(plan, survivors, chunk.ranking, shared, chunk.indices, chunk.top_scores);
}

// Selects for the queries whose sieve was wrong. A block takes every gridDim.x-th query.
template <typename T, bool kExact>
__global__ void __launch_bounds__(kSelectThreads)
    misled_stages_kernel(const __grid_constant__ Plan plan, Chunk chunk, Inputs<T> in, int64_t first_query,
                         int64_t queries) {
  auto& shared = shared_memory<SpareShared<T>>();
  for (int64_t b = blockIdx.x; b < queries; b += gridDim.x) {
    if (chunk.sieves[b].misled == 0) continue;
    select_from_all<T, kExact>(plan, chunk, in, first_query, b, blockIdx.x, shared);
    __syncthreads();
  }
}

template <bool kExact, typename T>
const char* launch_streamed_stages(const Plan& plan, const Inputs<T>& in, int64_t first, int64_t queries,
                                   const Chunk& chunk, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(queries));
  const auto kernel = plan.alone  ? streamed_stages_kernel<T, kExact, true, true>
                      : plan.held ? streamed_stages_kernel<T, kExact, true, false>
                                  : streamed_stages_kernel<T, kExact, false, false>;
  const int64_t bytes = plan.held ? held_bytes(plan) : static_cast<int64_t>(sizeof(CascadeShared));
  const char* error = launch_sized(kernel, blocks, kSelectThreads, bytes, stream, plan, chunk, in, first);
  if (error != nullptr || plan.alone || !plan.sifted) return error;  // without a sieve nothing misleads
  const dim3 spare(static_cast<unsigned>(plan.spare < queries ? plan.spare : queries));
  return launch<SpareShared<T>>(misled_stages_kernel<T, kExact>, spare, kSelectThreads, stream, plan, chunk, in, first,
                                queries);
}

}  // namespace
}  // namespace cpr
