// The pass over the whole memory on the streamed route: tensor cores compute the scores of a tile in every view in use,
// and the sieve decides about each entry before the next tile. Scores are not written, except for the entries that the
// sieve does not settle. Letters as in cascade_select.cu.
#pragma once

#include "cuda/cascade_select/fates.cuh"
#include "cuda/cascade_select/plan.cuh"
#include "cuda/cascade_select/score.cuh"
#include "cuda/cascade_select/tensor_score.cuh"
#include "cuda/common/launch.cuh"

namespace cpr {
namespace {

template <typename Tile>
using ParkedScores = float[kEntriesPerThread<Tile>][Tile::kThreads];  // of each thread

// The scores of the last view take the place of the features that they were computed from.
template <typename Tile, typename T, int kTerms>
union TileOrScores {
  TensorScoreShared<Tile, T, kTerms> features;
  ParkedScores<Tile> scores;
};

constexpr int kWaiting = 256;  // entries of a warp that are shared among its lanes; more are rare

template <typename T, bool kExact, typename Tile>
struct StreamShared {
  static constexpr int kTerms = kTermsOf<T, kExact>;
  using Limits = typename std::conditional<kExact, ExactLimits<Tile>, PairedLimits<Tile>>::type;
  TileOrScores<Tile, T, kTerms> tile;
  ParkedScores<Tile> first;  // scores of the first of two views
  Limits limits;
  QueryCounts<Tile> settled[kMaxSiftedStages];  // entries that drop out at each stage
  // Of each stage: the entries of a tile that are not settled, and the next place for them in the lists of the query.
  unsigned unsettled[Tile::kQueries][kMaxSiftedStages], next[Tile::kQueries][kMaxSiftedStages];
  uint16_t waiting[Tile::kThreads / kWarp][kWaiting];
  const T *queries[kMaxSiftedViews], *memory[kMaxSiftedViews];  // where each view in use starts
  unsigned lists[kMaxSiftedStages + 1];                         // of the plan
  float query_reach[kMaxSiftedViews][Tile::kQueries];  // error of a score for a key of norm 1; infinite without a bound
  unsigned key_reach[kMaxSiftedViews];                 // bits of the greatest norm of a key in the tile
};

// Returns the entries of this thread that are compared at all.
template <typename Tile, typename T>
__device__ __forceinline__ uint32_t entries_in_play(const Plan& plan, const Inputs<T>& in, int64_t first_query,
                                                    int64_t queries, int64_t b0, int64_t k0) {
  const bool whole = k0 + Tile::kKeys <= plan.K && b0 + Tile::kQueries <= queries;
  if (in.memory_ids == nullptr && whole) return ~0u >> (32 - kEntriesPerThread<Tile>);
  const int lane = threadIdx.x % kWarp;
  const int64_t b = b0 + Tile::first_query() + lane / 4, k = k0 + Tile::first_key() + lane % 4 * 2;
  uint32_t keys = 0, found = 0;
#pragma unroll
  for (int key = 0; key < kKeysPerThread; ++key) {
    if (k + key / 2 * 8 + key % 2 < plan.K) keys |= kOfEachQuery << key;
  }
#pragma unroll
  for (int i = 0; i < kQueriesPerThread<Tile>; ++i) {
    if (b + i * 8 < queries) found |= 0xffu << i * 8;
  }
  found &= keys;
  if (in.memory_ids == nullptr) return found;
  int64_t own_id[kQueriesPerThread<Tile>];
#pragma unroll
  for (int i = 0; i < kQueriesPerThread<Tile>; ++i) {
    const bool has_id = in.query_ids != nullptr && b + i * 8 < queries;
    own_id[i] = has_id ? in.query_ids[first_query + b + i * 8] : -1;
  }
#pragma unroll
  for (int key = 0; key < kKeysPerThread; ++key) {
    const int64_t slot = k + key / 2 * 8 + key % 2, id = slot < plan.K ? in.memory_ids[slot] : -1;
#pragma unroll
    for (int i = 0; i < kQueriesPerThread<Tile>; ++i) {
      if (excluded(in.memory_ids, id, own_id[i])) found &= ~(1u << (i * 8 + key));
    }
  }
  return found;
}

// Computes the scores of a tile in view u, and with kExact what bounds their errors. The features may be overwritten
// when it returns.
template <bool kExact, typename Tile, typename T>
__device__ __forceinline__ void score_view(const Plan& plan, const Inputs<T>& in, const Chunk& chunk, int u,
                                           int64_t queries, int64_t b0, int64_t k0,
                                           StreamShared<T, kExact, Tile>& shared, typename Tile::Scores& score) {
  const Matrix<T> query(shared.queries[u], queries, plan.D), keys(shared.memory[u], plan.K, plan.D, in.memory_ids);
  if (kExact && threadIdx.x == 0) shared.key_reach[u] = 0;
  auto& tile = shared.tile.features;
  score_tile<kExact>(query, b0, keys, k0, tile, score);
  if (kExact) {
    if (threadIdx.x < Tile::kKeys) {
      const float square = tile.key_square[threadIdx.x];
      const float reach = unbounded(square) ? INFINITY : norm_bound(square);
      atomicMax(&shared.key_reach[u], __float_as_uint(reach));  // floats >= 0 order as their bits
      if (b0 == 0 && !unbounded(square)) atomicMax(&chunk.key_squares[u], __float_as_uint(square));
    }
    if (threadIdx.x < Tile::kQueries) {
      const float square = tile.query_square[threadIdx.x];
      const float reach = relative_error(plan.D, shared.kTerms > 1) * norm_bound(square);
      shared.query_reach[u][threadIdx.x] = unbounded(square) ? INFINITY : reach;
    }
  }
  __syncthreads();
}

// Leaves scores of this thread in shared memory, where they can be found by number.
template <typename Tile>
__device__ __forceinline__ void park(typename Tile::Scores& score, ParkedScores<Tile>& parked) {
#pragma unroll
  for (int e = 0; e < kEntriesPerThread<Tile>; ++e) parked[e][threadIdx.x] = score_at<Tile>(score, e);
}

// An entry of a warp that is gathered, in 16 bits: its number and its lane, the stage of its list, and whether its
// scores have a bound on the error.
struct WaitingEntry {
  unsigned code;

  __device__ __forceinline__ WaitingEntry(unsigned code) : code(code) {}
  __device__ __forceinline__ WaitingEntry(int e, unsigned stage, bool bounded)
      : code(e | threadIdx.x % kWarp << 5 | stage << 10 | (bounded ? 1u << 13 : 0)) {}

  __device__ __forceinline__ unsigned e() const { return code & 31; }
  __device__ __forceinline__ unsigned lane() const { return code >> 5 & 31; }
  __device__ __forceinline__ unsigned stage() const { return code >> 10 & 7; }
  __device__ __forceinline__ bool bounded() const { return (code >> 13 & 1) != 0; }

  // Returns the query and the key of the tile.
  template <typename Tile>
  __device__ __forceinline__ unsigned row() const {
    return Tile::first_query() + lane() / 4 + e() / 8 * 8;
  }
  template <typename Tile>
  __device__ __forceinline__ unsigned key() const {
    return Tile::first_key() + lane() % 4 * 2 + e() % 8 / 2 * 8 + e() % 2;
  }
};

// Counts `entries`, which are not settled, and lets them wait for places in their lists. Returns those of this thread
// that the warp has no room for; of_warp: how many wait.
template <bool kExact, typename Tile, typename T>
__device__ __forceinline__ uint32_t wait(StreamShared<T, kExact, Tile>& shared, const Fates& fates, uint32_t entries,
                                         uint32_t bounded, unsigned& of_warp) {
  const unsigned own = __popc(entries), inclusive = warp_inclusive_sum(own);
  of_warp = __shfl_sync(kFullWarp, inclusive, kWarp - 1);
  unsigned place = inclusive - own;
  uint32_t rest = 0;
  for (; entries != 0; entries &= entries - 1) {
    const int e = __ffs(static_cast<int>(entries)) - 1;
    const WaitingEntry entry(e, fates.of(e), (bounded >> e & 1) != 0);
    atomicAdd(&shared.unsettled[entry.template row<Tile>()][entry.stage()], 1u);
    if (place < kWaiting) {
      shared.waiting[threadIdx.x / kWarp][place] = static_cast<uint16_t>(entry.code);
    } else {
      rest |= 1u << e;
    }
    ++place;
  }
  return rest;
}

// Takes places in the lists for the entries of a tile that wait. A barrier must stand before and after.
template <bool kExact, typename Tile, typename T>
__device__ __forceinline__ void take_places(const Chunk& chunk, StreamShared<T, kExact, Tile>& shared, int64_t b0) {
  for (int i = threadIdx.x; i < kMaxSiftedStages * Tile::kQueries; i += Tile::kThreads) {
    const int row = i / kMaxSiftedStages, stage = i % kMaxSiftedStages;  // neighbours share sectors of memory
    const unsigned count = shared.unsettled[row][stage];
    if (count == 0) continue;
    shared.unsettled[row][stage] = 0;
    shared.next[row][stage] = shared.lists[stage] + atomicAdd(&chunk.sieves[b0 + row].gathered[stage], count);
  }
}

// Appends an entry to the list of its stage, with its scores if they are bounded; -0 + 0 is +0: equal scores get equal
// bits.
template <bool kExact, typename Tile, typename T>
__device__ __forceinline__ void append(const Plan& plan, const Chunk& chunk, StreamShared<T, kExact, Tile>& shared,
                                       int64_t b0, int64_t k0, WaitingEntry entry) {
  const unsigned stage = entry.stage(), row = entry.template row<Tile>();
  const unsigned place = atomicAdd(&shared.next[row][stage], 1u);
  if (place >= shared.lists[stage + 1]) return;
  const unsigned thread = threadIdx.x / kWarp * kWarp + entry.lane();
  float first = NAN, last = NAN;
  if (entry.bounded()) {
    last = shared.tile.scores[entry.e()][thread] + 0.0f;
    first = plan.views_used > 1 ? shared.first[entry.e()][thread] + 0.0f : last;
  }
  const unsigned slot = static_cast<unsigned>(k0) + entry.template key<Tile>();
  chunk.gathered[(b0 + row) * plan.capacity + place] = {slot, __float_as_uint(first), __float_as_uint(last), 0};
}

// Counts the entries that drop out, and gathers those that are not settled. in_play: those that are compared.
template <bool kExact, typename Tile, typename T>
__device__ __forceinline__ void settle(const Plan& plan, const Chunk& chunk, StreamShared<T, kExact, Tile>& shared,
                                       int64_t b0, int64_t k0, const Fates& fates, uint32_t in_play, uint32_t bounded) {
#pragma unroll
  for (int s = 0; s < kMaxSiftedStages; ++s) {
    if (s < plan.stages) shared.settled[s].add(fates.at(s) & fates.dropped & in_play);
  }
  unsigned of_warp;
  uint32_t rest = wait(shared, fates, in_play & fates.fallen & ~fates.dropped, bounded, of_warp);
  __syncthreads();
  take_places(chunk, shared, b0);
  __syncthreads();
  const unsigned waiting = of_warp < kWaiting ? of_warp : kWaiting;
  for (unsigned i = threadIdx.x % kWarp; i < waiting; i += kWarp) {
    append(plan, chunk, shared, b0, k0, shared.waiting[threadIdx.x / kWarp][i]);
  }
  for (; rest != 0; rest &= rest - 1) {
    const int e = __ffs(static_cast<int>(rest)) - 1;
    append(plan, chunk, shared, b0, k0, WaitingEntry(e, fates.of(e), (bounded >> e & 1) != 0));
  }
}

// Returns the error of the scores of query i of this thread in view u.
template <bool kExact, typename Tile, typename T>
__device__ __forceinline__ float reach_of(const StreamShared<T, kExact, Tile>& shared, int u, int i) {
  const int row = Tile::first_query() + threadIdx.x % kWarp / 4 + i * 8;
  return shared.query_reach[u][row] * __uint_as_float(shared.key_reach[u]);
}

// Returns the entries of this thread whose scores have a bound on the error.
template <bool kExact, typename Tile, typename T>
__device__ __forceinline__ uint32_t bounded_entries(const Plan& plan, const StreamShared<T, kExact, Tile>& shared) {
  uint32_t bounded = 0;
#pragma unroll
  for (int i = 0; i < kQueriesPerThread<Tile>; ++i) {
    bool finite = true;
    for (int u = 0; u < plan.views_used; ++u) finite &= reach_of(shared, u, i) < INFINITY;
    if (finite) bounded |= 0xffu << i * 8;
  }
  return bounded;
}

// Computes the scores of a tile in view u and takes its entries through the stages of the view. Without kExact, takes
// entries whose score is not a number out of `numbers`.
template <bool kExact, typename Tile, typename T>
__device__ __forceinline__ Fates sift(const Plan& plan, const Inputs<T>& in, const Chunk& chunk, int u, int64_t queries,
                                      int64_t b0, int64_t k0, StreamShared<T, kExact, Tile>& shared,
                                      uint32_t& numbers) {
  typename Tile::Scores score;
  score_view<kExact>(plan, in, chunk, u, queries, b0, k0, shared, score);
  park<Tile>(score, u < plan.views_used - 1 ? shared.first : shared.tile.scores);
  float reach[kQueriesPerThread<Tile>] = {};
  Fates fates;
  const auto decide = [&](auto& compared) {
    for (unsigned left = plan.stages_of[u]; left != 0; left &= left - 1) {
      shared.limits.decide(__ffs(static_cast<int>(left)) - 1, compared, reach, fates);
    }
  };
  if constexpr (kExact) {
#pragma unroll
    for (int i = 0; i < kQueriesPerThread<Tile>; ++i) reach[i] = reach_of(shared, u, i);
#pragma unroll
    for (int e = 0; e < kEntriesPerThread<Tile>; ++e) score_at<Tile>(score, e) += 0.0f;  // -0 + 0 is +0
    decide(score);
  } else {
    typename PairedLimits<Tile>::Scores rounded;
    numbers &= shared.limits.round(u, score, rounded);
    decide(rounded);
  }
  return fates;
}

// A block decides about plan.tiles tiles of keys for the queries of one tile. Blocks of the same keys are neighbours,
// so that keys are read from global memory once.
template <typename T, bool kExact, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    stream_kernel(const __grid_constant__ Plan plan, Chunk chunk, Inputs<T> in, int64_t first_query, int64_t queries) {
  auto& shared = shared_memory<StreamShared<T, kExact, Tile>>();
  const unsigned query_tiles = static_cast<unsigned>(ceil_div(queries, Tile::kQueries));
  const int64_t b0 = static_cast<int64_t>(blockIdx.x % query_tiles) * Tile::kQueries;
  if (static_cast<int>(threadIdx.x) < plan.views_used) {
    const int64_t view = plan.view_used[threadIdx.x];
    shared.queries[threadIdx.x] = in.queries + (view * plan.B + first_query) * plan.D;
    shared.memory[threadIdx.x] = in.memory + view * plan.K * plan.D;
  }
  if (threadIdx.x <= kMaxSiftedStages) shared.lists[threadIdx.x] = static_cast<unsigned>(plan.lists[threadIdx.x]);
  for (int i = threadIdx.x; i < kMaxSiftedStages * Tile::kQueries; i += Tile::kThreads) {
    const int row = i / kMaxSiftedStages, stage = i % kMaxSiftedStages;
    shared.unsettled[row][stage] = 0;
    if (row < 2 * QueryCounts<Tile>::kGroups) shared.settled[stage].of_two[row % 2][row / 2] = 0;
    shared.limits.clear(stage, row);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kMaxSiftedStages * Tile::kQueries; i += Tile::kThreads) {
    const int row = i / kMaxSiftedStages, stage = i % kMaxSiftedStages;
    if (stage >= plan.stages || b0 + row >= queries) continue;
    shared.limits.set(stage, row, chunk.sieves[b0 + row], plan.view[stage]);
  }
  const int64_t first = static_cast<int64_t>(blockIdx.x / query_tiles) * plan.tiles * Tile::kKeys;
  for (int64_t k0 = first; k0 < plan.K && k0 < first + plan.tiles * Tile::kKeys; k0 += Tile::kKeys) {
    Fates fates;
    uint32_t numbers = ~0u;
#pragma unroll 1
    for (int u = 0; u < plan.views_used; ++u) {
      fates.merge(sift(plan, in, chunk, u, queries, b0, k0, shared, numbers));
    }
    const uint32_t in_play = numbers & entries_in_play<Tile>(plan, in, first_query, queries, b0, k0);
    const uint32_t bounded = kExact ? bounded_entries(plan, shared) : ~0u;
    fates.start_over(~bounded);  // go through all stages later
    settle(plan, chunk, shared, b0, k0, fates, in_play, bounded);
  }
  for (int i = threadIdx.x; i < kMaxSiftedStages * Tile::kQueries; i += Tile::kThreads) {
    const int row = i / kMaxSiftedStages, stage = i % kMaxSiftedStages;
    const unsigned count = shared.settled[stage].of(row);
    if (count > 0) atomicAdd(&chunk.sieves[b0 + row].dropped[stage], count);
  }
}

template <bool kExact, typename Tile, typename T>
const char* launch_stream(const Plan& plan, const Inputs<T>& in, int64_t first, int64_t queries, const Chunk& chunk,
                          cudaStream_t stream) {
  const int64_t blocks = ceil_div(plan.K, plan.tiles * Tile::kKeys) * ceil_div(queries, Tile::kQueries);
  return launch<StreamShared<T, kExact, Tile>>(stream_kernel<T, kExact, Tile>, dim3(static_cast<unsigned>(blocks)),
                                               Tile::kThreads, stream, plan, chunk, in, first, queries);
}

}  // namespace
}  // namespace cpr
