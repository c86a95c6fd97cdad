// The pass over the whole memory on the streamed route: tensor cores compute the scores of a tile in every view in use,
// and the sieve decides about each entry before the next tile. Scores are not written, except for the entries that the
// sieve does not settle. Letters as in cascade_select.cu.
#pragma once

#include <float.h>

#include "cuda/cascade_select/plan.cuh"
#include "cuda/cascade_select/score.cuh"
#include "cuda/cascade_select/tensor_score.cuh"
#include "cuda/common/launch.cuh"

namespace cpr {
namespace {

constexpr int kKeysPerThread = kTensorKeyPieces * 2;
template <typename Tile>
constexpr int kQueriesPerThread = Tile::kQueryPieces * 2;
template <typename Tile>
constexpr int kEntriesPerThread = kQueriesPerThread<Tile> * kKeysPerThread;
static_assert(kKeysPerThread == 8 && kMaxSiftedStages == 8 && kMaxSiftedViews == 2);

template <typename Tile>
using ParkedScores = float[kEntriesPerThread<Tile>][Tile::kThreads];  // of each thread

// The scores of the last view take the place of the features that they were computed from.
template <typename Tile, typename T, int kTerms>
union TileOrScores {
  TensorScoreShared<Tile, T, kTerms> features;
  ParkedScores<Tile> scores;
};

template <typename Tile, typename T, int kTerms>
struct StreamShared {
  TileOrScores<Tile, T, kTerms> tile;
  ParkedScores<Tile> first;                         // scores of the first of two views
  float2 limits[kMaxSiftedStages][Tile::kQueries];  // lower and upper limit of the thresholds
  // Of each stage: the entries that drop out, those of a tile that are not settled, and the next place in their list.
  unsigned settled[kMaxSiftedStages][Tile::kQueries];
  unsigned unsettled[kMaxSiftedStages][Tile::kQueries], next[kMaxSiftedStages][Tile::kQueries];
  int64_t lists[kMaxSiftedStages + 1];                 // of the plan
  float query_reach[kMaxSiftedViews][Tile::kQueries];  // error of a score for a key of norm 1; infinite without a bound
  unsigned key_reach[kMaxSiftedViews];                 // bits of the greatest norm of a key in the tile
};

// The entries of a thread in a tile: query i of it, l/4 + 8i of its warp, and key 2n + j of it, 8n + 2(l%4) + j of its
// warp, is entry 8i + 2n + j. A set of entries has a bit for each. Returns the score of entry e, a constant.
template <typename Tile>
__device__ __forceinline__ float& score_of(typename Tile::Scores& score, int e) {
  return score[e / 16][e % 8 / 2][e / 8 % 2 * 2 + e % 2];
}

// Returns the entries of this thread that are compared at all.
template <typename Tile, typename T>
__device__ __forceinline__ uint32_t entries_in_play(const Plan& plan, const Inputs<T>& in, int64_t first_query,
                                                    int64_t queries, int64_t b0, int64_t k0) {
  constexpr uint32_t kOfEachQuery = 0x01010101;
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
template <bool kExact, typename Tile, int kTerms, typename T>
__device__ __forceinline__ void score_view(const Plan& plan, const Inputs<T>& in, const Chunk& chunk, int u,
                                           int64_t first_query, int64_t queries, int64_t b0, int64_t k0,
                                           StreamShared<Tile, T, kTerms>& shared, typename Tile::Scores& score) {
  const int64_t view = plan.view_used[u];
  const Matrix<T> query(in.queries + (view * plan.B + first_query) * plan.D, queries, plan.D);
  const Matrix<T> keys(in.memory + view * plan.K * plan.D, plan.K, plan.D, in.memory_ids);
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
      const float reach = relative_error(plan.D, kTerms > 1) * norm_bound(square);
      shared.query_reach[u][threadIdx.x] = unbounded(square) ? INFINITY : reach;
    }
  }
  __syncthreads();
}

// Leaves scores of this thread to itself in shared memory, where they can be found by number.
template <typename Tile>
__device__ __forceinline__ void park(typename Tile::Scores& score, ParkedScores<Tile>& parked) {
#pragma unroll
  for (int e = 0; e < kEntriesPerThread<Tile>; ++e) {
    score_of<Tile>(score, e) += 0.0f;  // -0 + 0 is +0: equal scores get equal bits
    parked[e][threadIdx.x] = score_of<Tile>(score, e);
  }
}

// Makes infinite scores finite, the greatest of their sign, which is at most less certain to pass or to drop out.
// Returns the entries whose score is a number.
template <typename Tile>
__device__ __forceinline__ uint32_t make_finite(typename Tile::Scores& score) {
  float zero = 0;  // NaN after an infinity or a NaN
#pragma unroll
  for (int e = 0; e < kEntriesPerThread<Tile>; ++e) zero = __fmaf_rn(score_of<Tile>(score, e), 0.0f, zero);
  uint32_t numbers = ~0u;
  if (zero == 0) return numbers;
#pragma unroll
  for (int e = 0; e < kEntriesPerThread<Tile>; ++e) {
    float& x = score_of<Tile>(score, e);
    if (isnan(x)) numbers &= ~(1u << e);
    x = fminf(fmaxf(x, -FLT_MAX), FLT_MAX);
  }
  return numbers;
}

// What becomes of the entries of a thread: the first stage that an entry may fail to pass, and whether it drops out
// there for certain. Bit b of the stage of entry e is bit e of stage[b].
struct Fates {
  static constexpr int kBits = 3;
  uint32_t stage[kBits] = {};
  uint32_t fallen = 0, dropped = 0;  // entries that have such a stage; those that drop out there

  // Returns all entries or none, as bit b of s is.
  static __device__ __forceinline__ uint32_t spread(int s, int b) { return 0u - (static_cast<uint32_t>(s) >> b & 1); }

  // Return the entries whose stage is s, and those whose stage is before s.
  __device__ __forceinline__ uint32_t at(int s) const {
    uint32_t equal = fallen;
#pragma unroll
    for (int b = 0; b < kBits; ++b) equal &= ~(stage[b] ^ spread(s, b));
    return equal;
  }
  __device__ __forceinline__ uint32_t before(int s) const {
    uint32_t less = 0, equal = fallen;
#pragma unroll
    for (int b = kBits - 1; b >= 0; --b) {
      less |= equal & spread(s, b) & ~stage[b];
      equal &= ~(stage[b] ^ spread(s, b));
    }
    return less;
  }

  // Returns the stage of one entry.
  __device__ __forceinline__ int of(int entry) const {
    return static_cast<int>((stage[0] >> entry & 1) | (stage[1] >> entry & 1) << 1 | (stage[2] >> entry & 1) << 2);
  }

  // Gives stage s to `entries`, of which those of `drops` drop out.
  __device__ __forceinline__ void set(uint32_t entries, int s, uint32_t drops) {
#pragma unroll
    for (int b = 0; b < kBits; ++b) stage[b] = (stage[b] & ~entries) | (spread(s, b) & entries);
    dropped = (dropped & ~entries) | (drops & entries);
    fallen |= entries;
  }
};
static_assert(kMaxSiftedStages == 1 << Fates::kBits);

// Returns `bits` moved up by one, below them the sign of x, which is a number and not -0.
__device__ __forceinline__ uint32_t append_sign(uint32_t bits, float x) {
  return __funnelshift_l(__float_as_uint(x), bits, 1);
}

// Takes the entries through the stages of view u, until one that they may fail to pass. The scores of query i are off
// by at most reach[i]; they are finite and not -0, so that no difference is -0.
template <typename Tile, typename T, int kTerms>
__device__ __forceinline__ void follow(const Plan& plan, const StreamShared<Tile, T, kTerms>& shared, int u,
                                       typename Tile::Scores& score, const float (&reach)[kQueriesPerThread<Tile>],
                                       Fates& fates) {
  const int row = Tile::first_query() + threadIdx.x % kWarp / 4;
  for (int s = 0; s < plan.stages; ++s) {
    if (plan.view[s] != u) continue;
    uint32_t drops = 0, passes = 0;
#pragma unroll
    for (int i = kQueriesPerThread<Tile> - 1; i >= 0; --i) {
      const float2 limits = shared.limits[s][row + i * 8];
      const float drop_below = limits.x - reach[i], pass_above = limits.y + reach[i];  // the latter not -0
#pragma unroll
      for (int key = kKeysPerThread - 1; key >= 0; --key) {
        const float x = score_of<Tile>(score, i * 8 + key);
        drops = append_sign(drops, x - drop_below);
        passes = append_sign(passes, pass_above - x);
      }
    }
    fates.set(~passes & ~fates.before(s), s, drops);
  }
}

// Returns the number of `entries` of each query of this thread: of query i in byte i.
__device__ __forceinline__ uint32_t count_by_query(uint32_t entries) {
  entries -= entries >> 1 & 0x55555555;
  entries = (entries & 0x33333333) + (entries >> 2 & 0x33333333);
  return (entries + (entries >> 4)) & 0x0f0f0f0f;
}

// Adds the entries of this warp to the counts of their queries, [Tile::kQueries]. Four neighbouring lanes share their
// queries, and each adds those of one.
template <typename Tile>
__device__ __forceinline__ void add_counts(uint32_t entries, unsigned* counts) {
  const int lane = threadIdx.x % kWarp;
  const uint32_t of_four = warp_reduce<4>(count_by_query(entries), Sum());
  const unsigned count = of_four >> lane % 4 * 8 & 0xff;
  if (count > 0) atomicAdd(&counts[Tile::first_query() + lane / 4 + lane % 4 * 8], count);
}

// Counts the settled entries, and takes places in the lists for the others. in_play: the entries that are compared.
template <typename Tile, typename T, int kTerms>
__device__ __forceinline__ void settle(const Plan& plan, const Chunk& chunk, StreamShared<Tile, T, kTerms>& shared,
                                       int64_t b0, const Fates& fates, uint32_t in_play) {
  for (int s = 0; s < plan.stages; ++s) {
    const uint32_t entries = fates.at(s) & in_play;
    add_counts<Tile>(entries & fates.dropped, shared.settled[s]);
    add_counts<Tile>(entries & ~fates.dropped, shared.unsettled[s]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < plan.stages * Tile::kQueries; i += Tile::kThreads) {
    const int stage = i / Tile::kQueries, row = i % Tile::kQueries;
    const unsigned count = shared.unsettled[stage][row];
    if (count == 0) continue;
    shared.unsettled[stage][row] = 0;
    shared.next[stage][row] = atomicAdd(&chunk.sieves[b0 + row].gathered[stage], count);
  }
  __syncthreads();
}

// Appends `entries` to the list of their stage, those of `bounded` with their scores.
template <typename Tile, typename T, int kTerms>
__device__ __forceinline__ void gather(const Plan& plan, const Chunk& chunk, StreamShared<Tile, T, kTerms>& shared,
                                       int64_t b0, int64_t k0, const Fates& fates, uint32_t entries, uint32_t bounded) {
  const int lane = threadIdx.x % kWarp, row0 = Tile::first_query() + lane / 4;
  const uint32_t slot0 = static_cast<uint32_t>(k0) + Tile::first_key() + lane % 4 * 2;
  for (; entries != 0; entries &= entries - 1) {
    const int e = __ffs(static_cast<int>(entries)) - 1, stage = fates.of(e), row = row0 + e / 8 * 8;
    const int64_t place = shared.lists[stage] + atomicAdd(&shared.next[stage][row], 1u);
    if (place >= shared.lists[stage + 1]) continue;
    const bool known = (bounded >> e & 1) != 0, two = plan.views_used > 1;
    const float last = known ? shared.tile.scores[e][threadIdx.x] : NAN;
    const float first = !two ? last : known ? shared.first[e][threadIdx.x] : NAN;
    chunk.gathered[(b0 + row) * plan.capacity + place] = {slot0 + e % 8 / 2 * 8 + e % 2, __float_as_uint(first),
                                                          __float_as_uint(last), 0};
  }
}

// Returns the error of the scores of query i of this thread in view u.
template <typename Tile, typename T, int kTerms>
__device__ __forceinline__ float reach_of(const StreamShared<Tile, T, kTerms>& shared, int u, int i) {
  const int row = Tile::first_query() + threadIdx.x % kWarp / 4 + i * 8;
  return shared.query_reach[u][row] * __uint_as_float(shared.key_reach[u]);
}

// Returns the entries of this thread whose scores have a bound on the error.
template <typename Tile, typename T, int kTerms>
__device__ __forceinline__ uint32_t bounded_entries(const Plan& plan, const StreamShared<Tile, T, kTerms>& shared) {
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
template <bool kExact, typename Tile, int kTerms, typename T>
__device__ __forceinline__ void sift(const Plan& plan, const Inputs<T>& in, const Chunk& chunk, int u,
                                     int64_t first_query, int64_t queries, int64_t b0, int64_t k0,
                                     StreamShared<Tile, T, kTerms>& shared, Fates& fates, uint32_t& numbers) {
  typename Tile::Scores score;
  score_view<kExact>(plan, in, chunk, u, first_query, queries, b0, k0, shared, score);
  park<Tile>(score, u < plan.views_used - 1 ? shared.first : shared.tile.scores);
  float reach[kQueriesPerThread<Tile>] = {};
  if (kExact) {
#pragma unroll
    for (int i = 0; i < kQueriesPerThread<Tile>; ++i) reach[i] = reach_of(shared, u, i);
  } else {
    numbers &= make_finite<Tile>(score);
  }
  follow(plan, shared, u, score, reach, fates);
}

// A block decides about plan.tiles tiles of keys for the queries of one tile. Blocks of the same keys are neighbours,
// so that keys are read from global memory once.
template <typename T, bool kExact, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    stream_kernel(const __grid_constant__ Plan plan, Chunk chunk, Inputs<T> in, int64_t first_query, int64_t queries) {
  constexpr int kTerms = kTermsOf<T, kExact>;
  auto& shared = shared_memory<StreamShared<Tile, T, kTerms>>();
  const unsigned query_tiles = static_cast<unsigned>(ceil_div(queries, Tile::kQueries));
  const int64_t b0 = static_cast<int64_t>(blockIdx.x % query_tiles) * Tile::kQueries;
  if (threadIdx.x <= kMaxSiftedStages) shared.lists[threadIdx.x] = plan.lists[threadIdx.x];
  for (int i = threadIdx.x; i < kMaxSiftedStages * Tile::kQueries; i += Tile::kThreads) {
    const int stage = i / Tile::kQueries, row = i % Tile::kQueries;
    shared.settled[stage][row] = shared.unsettled[stage][row] = 0;
    shared.limits[stage][row] = {0, 0};
    if (stage >= plan.stages || b0 + row >= queries) continue;
    const Sieve& sieve = chunk.sieves[b0 + row];
    shared.limits[stage][row] = {sieve.low[stage], sieve.high[stage]};
  }
  const int64_t first = static_cast<int64_t>(blockIdx.x / query_tiles) * plan.tiles * Tile::kKeys;
  for (int64_t k0 = first; k0 < plan.K && k0 < first + plan.tiles * Tile::kKeys; k0 += Tile::kKeys) {
    Fates fates;
    uint32_t numbers = ~0u;
#pragma unroll 1
    for (int u = 0; u < plan.views_used; ++u) {
      sift<kExact>(plan, in, chunk, u, first_query, queries, b0, k0, shared, fates, numbers);
    }
    const uint32_t in_play = numbers & entries_in_play<Tile>(plan, in, first_query, queries, b0, k0);
    const uint32_t bounded = kExact ? bounded_entries(plan, shared) : ~0u;
    fates.set(~bounded, 0, 0);  // go through all stages later
    settle(plan, chunk, shared, b0, fates, in_play);
    gather(plan, chunk, shared, b0, k0, fates, in_play & ~fates.dropped, bounded);
  }
  for (int i = threadIdx.x; i < kMaxSiftedStages * Tile::kQueries; i += Tile::kThreads) {
    const int stage = i / Tile::kQueries, row = i % Tile::kQueries;
    const unsigned count = shared.settled[stage][row];
    if (count > 0) atomicAdd(&chunk.sieves[b0 + row].dropped[stage], count);
  }
}

template <bool kExact, typename Tile, typename T>
const char* launch_stream(const Plan& plan, const Inputs<T>& in, int64_t first, int64_t queries, const Chunk& chunk,
                          cudaStream_t stream) {
  constexpr int kTerms = kTermsOf<T, kExact>;
  const int64_t blocks = ceil_div(plan.K, plan.tiles * Tile::kKeys) * ceil_div(queries, Tile::kQueries);
  return launch<StreamShared<Tile, T, kTerms>>(stream_kernel<T, kExact, Tile>, dim3(static_cast<unsigned>(blocks)),
                                               Tile::kThreads, stream, plan, chunk, in, first, queries);
}

}  // namespace
}  // namespace cpr
