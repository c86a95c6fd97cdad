// The pass over the whole memory on the streamed route: tensor cores compute the scores of a tile in every view in use,
// and the sieve decides about each entry before the next tile. Scores are not written, except for the entries that the
// sieve does not settle. Letters as in cascade_select.cu.
#pragma once

#include "cuda/cascade_select/plan.cuh"
#include "cuda/cascade_select/score.cuh"
#include "cuda/cascade_select/tensor_score.cuh"
#include "cuda/common/launch.cuh"

namespace cpr {
namespace {

constexpr int kKeysPerThread = kTensorKeyPieces * 2;
template <typename Tile>
constexpr int kQueriesPerThread = Tile::kQueryPieces * 2;
constexpr int kCountBits = 8;  // of a stage, in the settled entries of a query
constexpr uint32_t kEachCount = 0x01010101;
static_assert(4 * kKeysPerThread < 1 << kCountBits, "the counts of four lanes have 8 bits");
static_assert(kMaxSiftedStages == 8 && kMaxSiftedViews == 2);

template <typename Tile, typename E, int kTerms>
struct StreamShared {
  TensorScoreShared<Tile, E, kTerms> tile;
  float first[kQueriesPerThread<Tile> * kKeysPerThread][Tile::kThreads];  // scores of the first view, of each thread
  float2 limits[kMaxSiftedStages][Tile::kQueries];                        // lower and upper limit of the thresholds
  unsigned settled[kMaxSiftedStages][Tile::kQueries];                     // entries that drop out at each stage
  int64_t lists[kMaxSiftedStages + 1];                                    // of the plan
  float query_reach[kMaxSiftedViews][Tile::kQueries];  // error of a score for a key of norm 1; infinite without a bound
  unsigned key_reach[kMaxSiftedViews];                 // bits of the greatest norm of a key in the tile
};

// The entries of a thread in a tile: query i of it, l/4 + 8i of its warp, and key 2n + j of it, 8n + 2(l%4) + j of its
// warp, is bit 8i + 2n + j.
__device__ __forceinline__ uint32_t entry_bit(int i, int n, int j) { return 1u << (i * kKeysPerThread + n * 2 + j); }

// Returns a bit for each entry of this thread that is compared at all.
template <typename Tile, typename T>
__device__ __forceinline__ uint32_t entries_in_play(const Plan& plan, const Inputs<T>& in, int64_t first_query,
                                                    int64_t queries, int64_t b0, int64_t k0) {
  const int lane = threadIdx.x % kWarp;
  const int64_t b = b0 + Tile::first_query() + lane / 4, k = k0 + Tile::first_key() + lane % 4 * 2;
  int64_t own_id[kQueriesPerThread<Tile>];
#pragma unroll
  for (int i = 0; i < kQueriesPerThread<Tile>; ++i) {
    own_id[i] = in.query_ids != nullptr && b + i * 8 < queries ? in.query_ids[first_query + b + i * 8] : -1;
  }
  uint32_t found = 0;
#pragma unroll
  for (int n = 0; n < kTensorKeyPieces; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t slot = k + n * 8 + j;
      if (slot >= plan.K) continue;
      const int64_t id = in.memory_ids != nullptr ? in.memory_ids[slot] : 0;
#pragma unroll
      for (int i = 0; i < kQueriesPerThread<Tile>; ++i) {
        if (b + i * 8 < queries && !excluded(in.memory_ids, id, own_id[i])) found |= entry_bit(i, n, j);
      }
    }
  }
  return found;
}

// Computes the scores of a tile in view u, and with kExact what bounds their errors.
template <bool kExact, typename Tile, typename E, int kTerms, typename T>
__device__ __forceinline__ void score_view(const Plan& plan, const Inputs<T>& in, const Chunk& chunk, int u,
                                           int64_t first_query, int64_t queries, int64_t b0, int64_t k0,
                                           StreamShared<Tile, E, kTerms>& shared, typename Tile::Scores& score) {
  const int64_t view = plan.view_used[u];
  const Matrix<T> query(in.queries + (view * plan.B + first_query) * plan.D, queries, plan.D);
  const Matrix<T> keys(in.memory + view * plan.K * plan.D, plan.K, plan.D, in.memory_ids);
  if (kExact && threadIdx.x == 0) shared.key_reach[u] = 0;
  score_tile<kExact>(query, b0, keys, k0, shared.tile, score);
  if (!kExact) return;
  if (threadIdx.x < Tile::kKeys) {
    const float square = shared.tile.key_square[threadIdx.x];
    const float reach = unbounded(square) ? INFINITY : norm_bound(square);
    atomicMax(&shared.key_reach[u], __float_as_uint(reach));  // floats >= 0 order as their bits
    if (b0 == 0 && !unbounded(square)) atomicMax(&chunk.key_squares[u], __float_as_uint(square));
  }
  if (threadIdx.x < Tile::kQueries) {
    const float square = shared.tile.query_square[threadIdx.x];
    const float reach = relative_error(plan.D, kTerms > 1) * norm_bound(square);
    shared.query_reach[u][threadIdx.x] = unbounded(square) ? INFINITY : reach;
  }
  __syncthreads();
}

// Leaves scores of this thread to itself in shared memory: registers hold those of one view.
template <typename Tile, typename E, int kTerms>
__device__ __forceinline__ void park(const typename Tile::Scores& score, StreamShared<Tile, E, kTerms>& shared) {
#pragma unroll
  for (int i = 0; i < kQueriesPerThread<Tile>; ++i) {
#pragma unroll
    for (int key = 0; key < kKeysPerThread; ++key) {
      shared.first[i * kKeysPerThread + key][threadIdx.x] = score[i / 2][key / 2][i % 2 * 2 + key % 2];
    }
  }
}

// Adds to fate[key] a bit for each stage of view u that the entry may fail to pass, and in the second byte for each
// where it drops out for certain. Scores are off by at most `reach`.
template <typename Tile, typename E, int kTerms>
__device__ __forceinline__ void follow(const Plan& plan, const StreamShared<Tile, E, kTerms>& shared, int u, int row,
                                       const float (&score)[kKeysPerThread], float reach,
                                       uint32_t (&fate)[kKeysPerThread]) {
  for (int s = 0; s < plan.stages; ++s) {
    if (plan.view[s] != u) continue;
    const float2 limits = shared.limits[s][row];
    const float drop_below = limits.x - reach, pass_above = limits.y + reach;
    const uint32_t unsure = 1u << s, dropped = 0x100u << s;
#pragma unroll
    for (int key = 0; key < kKeysPerThread; ++key) {
      if (!(score[key] > pass_above)) fate[key] |= unsure;
      if (score[key] < drop_below) fate[key] |= dropped;
    }
  }
}

// The numbers of entries at each of eight stages, eight bits each: those of stages 0..3 in the first word.
using StageCounts = unsigned[2];

// Adds an entry at the stage whose bit is set in `stage`, or none. Moves bit s of four to the lowest bit of byte s.
__device__ __forceinline__ void count_stage(uint32_t stage, StageCounts& counts) {
  counts[0] += (stage & 0xf) * 0x00204081u & kEachCount;
  counts[1] += (stage >> 4) * 0x00204081u & kEachCount;
}

// Takes places in the lists of a query for the `own` entries of each of the four neighbouring lanes that share it.
// start[i]: of stage 4 i + l % 4, where the entries of the four lanes start; next[i]: of the stages of word i, the
// place of the first entry of this lane after that.
__device__ __forceinline__ void take_places(const StageCounts& own, unsigned* gathered, unsigned (&start)[2],
                                            StageCounts& next) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    unsigned upto = own[half], below = __shfl_up_sync(kFullWarp, upto, 1);
    if (lane % 4 >= 1) upto += below;
    below = __shfl_up_sync(kFullWarp, upto, 2);
    if (lane % 4 >= 2) upto += below;
    const unsigned count = __shfl_sync(kFullWarp, upto, lane | 3) >> lane % 4 * kCountBits & 0xff;
    start[half] = count > 0 ? atomicAdd(&gathered[half * 4 + lane % 4], count) : 0;
    next[half] = upto - own[half];
  }
}

// Sifts the entries of query kQuery of this thread: counts the settled ones in `settled`, and appends the others to the
// list of the first stage that they may fail to pass. in_play: a bit for each key. second: the scores of the second
// view.
template <int kQuery, bool kExact, typename Tile, typename E, int kTerms>
__device__ __forceinline__ void sift(const Plan& plan, const Chunk& chunk, StreamShared<Tile, E, kTerms>& shared,
                                     int64_t b0, int64_t k0, const typename Tile::Scores& second, uint32_t in_play) {
  const int lane = threadIdx.x % kWarp, row = Tile::first_query() + lane / 4 + kQuery * 8;
  float score[kMaxSiftedViews][kKeysPerThread];
#pragma unroll
  for (int key = 0; key < kKeysPerThread; ++key) {
    score[0][key] = shared.first[kQuery * kKeysPerThread + key][threadIdx.x];
    score[1][key] = second[kQuery / 2][key / 2][kQuery % 2 * 2 + key % 2];
  }
  float reach[kMaxSiftedViews] = {};
  uint32_t fate[kKeysPerThread] = {};
#pragma unroll
  for (int u = 0; u < kMaxSiftedViews; ++u) {
    if (u >= plan.views_used) continue;
    if (kExact) reach[u] = shared.query_reach[u][row] * __uint_as_float(shared.key_reach[u]);
    follow(plan, shared, u, row, score[u], reach[u], fate);
  }
  const bool bounded = reach[0] < INFINITY && reach[1] < INFINITY;
  StageCounts settled = {}, wanted = {};
#pragma unroll
  for (int key = 0; key < kKeysPerThread; ++key) {
    bool compared = (in_play >> key & 1) != 0;
#pragma unroll
    for (int u = 0; u < kMaxSiftedViews; ++u) {
      if (!kExact && u < plan.views_used) compared &= !isnan(score[u][key]);
    }
    const uint32_t first = fate[key] & (0u - fate[key]);  // the first stage that is not passed for certain
    uint32_t stage = first & (fate[key] >> 8) & 0xff;     // the same if the entry drops out there
    if (!bounded) stage = 0;
    fate[key] = !compared || stage != 0 ? 0 : bounded ? first : 1;  // from here on, the stage of its list
    count_stage(compared ? stage : 0, settled);
    count_stage(fate[key], wanted);
  }
  // Four neighbouring lanes share the query. Each adds what they have counted at one stage of four.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const unsigned count = warp_reduce<4>(settled[half], Sum()) >> lane % 4 * kCountBits & 0xff;
    if (count > 0) atomicAdd(&shared.settled[half * 4 + lane % 4][row], count);
  }
  if (!in_all_lanes((wanted[0] | wanted[1]) != 0)) return;
  unsigned start[2];
  StageCounts next;
  take_places(wanted, chunk.sieves[b0 + row].gathered, start, next);
  const int64_t list = (b0 + row) * plan.capacity, view_stride = plan.chunk * plan.capacity;
  const uint32_t slot0 = static_cast<uint32_t>(k0) + Tile::first_key() + lane % 4 * 2;
#pragma unroll
  for (int key = 0; key < kKeysPerThread; ++key) {
    const int stage = fate[key] != 0 ? __ffs(static_cast<int>(fate[key])) - 1 : 0, shift = stage % 4 * kCountBits;
    const int source = (lane & ~3) + stage % 4;
    const unsigned low = __shfl_sync(kFullWarp, start[0], source), high = __shfl_sync(kFullWarp, start[1], source);
    if (fate[key] == 0) continue;
    const unsigned place = (stage < 4 ? low : high) + ((stage < 4 ? next[0] : next[1]) >> shift & 0xff);
    (stage < 4 ? next[0] : next[1]) += 1u << shift;
    if (shared.lists[stage] + place >= shared.lists[stage + 1]) continue;
    const int64_t at = list + shared.lists[stage] + place;
    chunk.slots[at] = slot0 + key / 2 * 8 + key % 2;
#pragma unroll
    for (int u = 0; u < kMaxSiftedViews; ++u) {
      if (u < plan.views_used) chunk.values[u * view_stride + at] = bounded ? score[u][key] + 0.0f : NAN;
    }
  }
}

// A block decides about plan.tiles tiles of keys for the queries of one tile. Blocks of the same keys are neighbours,
// so that keys are read from global memory once.
template <typename T, bool kExact, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    stream_kernel(const __grid_constant__ Plan plan, Chunk chunk, Inputs<T> in, int64_t first_query, int64_t queries) {
  using E = typename Multiplied<T>::Type;
  constexpr int kTerms = kExact && sizeof(T) > sizeof(E) ? 2 : 1;
  auto& shared = shared_memory<StreamShared<Tile, E, kTerms>>();
  const unsigned query_tiles = static_cast<unsigned>(ceil_div(queries, Tile::kQueries));
  const int64_t b0 = static_cast<int64_t>(blockIdx.x % query_tiles) * Tile::kQueries;
  if (threadIdx.x <= kMaxSiftedStages) shared.lists[threadIdx.x] = plan.lists[threadIdx.x];
  for (int i = threadIdx.x; i < kMaxSiftedStages * Tile::kQueries; i += Tile::kThreads) {
    const int stage = i / Tile::kQueries, row = i % Tile::kQueries;
    shared.settled[stage][row] = 0;
    shared.limits[stage][row] = {0, 0};
    if (stage >= plan.stages || b0 + row >= queries) continue;
    const Sieve& sieve = chunk.sieves[b0 + row];
    shared.limits[stage][row] = {sieve.low[stage], sieve.high[stage]};
  }
  const int64_t first = static_cast<int64_t>(blockIdx.x / query_tiles) * plan.tiles * Tile::kKeys;
  for (int64_t k0 = first; k0 < plan.K && k0 < first + plan.tiles * Tile::kKeys; k0 += Tile::kKeys) {
    const uint32_t in_play = entries_in_play<Tile>(plan, in, first_query, queries, b0, k0);
    typename Tile::Scores score;
    score_view<kExact>(plan, in, chunk, 0, first_query, queries, b0, k0, shared, score);
    park(score, shared);
    if (plan.views_used > 1) score_view<kExact>(plan, in, chunk, 1, first_query, queries, b0, k0, shared, score);
    sift<0, kExact>(plan, chunk, shared, b0, k0, score, in_play & 0xff);
    sift<1, kExact>(plan, chunk, shared, b0, k0, score, in_play >> 8 & 0xff);
    if constexpr (kQueriesPerThread<Tile> == 4) {
      sift<2, kExact>(plan, chunk, shared, b0, k0, score, in_play >> 16 & 0xff);
      sift<3, kExact>(plan, chunk, shared, b0, k0, score, in_play >> 24);
    }
    __syncthreads();  // the reaches have been read
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
  using E = typename Multiplied<T>::Type;
  constexpr int kTerms = kExact && sizeof(T) > sizeof(E) ? 2 : 1;
  const int64_t blocks = ceil_div(plan.K, plan.tiles * Tile::kKeys) * ceil_div(queries, Tile::kQueries);
  return launch<StreamShared<Tile, E, kTerms>>(stream_kernel<T, kExact, Tile>, dim3(static_cast<unsigned>(blocks)),
                                               Tile::kThreads, stream, plan, chunk, in, first, queries);
}

}  // namespace
}  // namespace cpr
