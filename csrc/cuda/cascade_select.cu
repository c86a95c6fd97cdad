// cascade_select on CUDA. A score never changes between stages, so: one kernel scores a chunk of queries against
// the memory in every view that a stage compares, and one block per query then runs all stages over its rows.
// Three routes, by size:
//   on chip     the rows of a query fit the shared memory of one block, survivors are bits in registers;
//   in cache    the rows stay in the L2 cache, survivors are a list;
//   refined     rows too long for either: scores come from tensor cores with a bound on their error. Each stage
//               then rescores canonically what lies within the bound of its threshold, and decides on that.
//
// All three are exact: the canonical score (fp32 fused multiply-adds over d in order) and the total order (score
// descending, slot ascending) make indices and scores those of the CPU, bit for bit. CPR_APPROX_BF16 takes tensor
// core scores of features rounded to bfloat16 (float16 stays) for the truth instead, on either of the first routes.
// Letters: B queries, V views, U views in use, K memory entries, D feature width, n stages.
#include "cpr_fast.h"
#include "launch.cuh"
#include "select.cuh"
#include "tensor_score.cuh"
#include "tile.cuh"

namespace cpr {
namespace {

constexpr int kMaxStages = 256;
constexpr int64_t kRowUnit = 64;  // rows of the workspace start on 256-byte boundaries

enum Route : int { kOnChip, kInCache, kRefined };

// Everything about a call but its pointers, and the cut of its workspace:
// scores float [U, chunk, row], survivors and window uint32 [chunk, row] each where the route has them,
// ranking uint64 [chunk, ranking_row], key_squares float [U].
struct Plan {
  int64_t B, K, D, row, chunk, ranking_row, top_k;
  int stages, views_used;
  Route route;
  int16_t view[kMaxStages];       // [stages] position of each stage's view among those in use
  int32_t keep[kMaxStages];       // [stages] at most K
  int32_t view_used[kMaxStages];  // [views_used] view of the inputs
};
static_assert(sizeof(Plan) < 3900, "kernel parameters are limited to 4 KiB before CUDA 12.1");

struct alignas(16) CascadeShared {
  SelectShared select;
  float low[kMaxStages], high[kMaxStages];  // what is known of the survivors' range in each view in use; NaN: nothing
  float bound[kMaxStages];                  // on the error of a score in each view in use, where scores are refined
};

const char* check(const cpr_cascade_args& args) {
  if (args.V < 1 || args.B < 1 || args.K < 1 || args.D < 1 || args.n < 1) return "V, B, K, D, n: expected at least 1";
  if (args.K > INT32_MAX || args.V > INT32_MAX) return "memory: the CUDA kernel takes at most 2^31 - 1 entries";
  if (args.n > kMaxStages) return "views: the CUDA kernel takes at most 256 stages";
  return nullptr;
}

int64_t bytes_per_query(const Plan& plan) {
  const int lists = plan.route == kOnChip ? 0 : plan.route == kInCache ? 1 : 2;
  return plan.row * static_cast<int64_t>(sizeof(float)) * (plan.views_used + lists) +
         plan.ranking_row * static_cast<int64_t>(sizeof(uint64_t));
}

// The bytes of rows that stay in the L2 cache beside the memory that streams through it.
int64_t cache_budget() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device) != cudaSuccess) return 0;
  return static_cast<int64_t>(bytes) / 8 * 5;
}

// A refined chunk below the 32 queries of a tile would waste products: rows of which so many fit the cache stay there.
Route route_of(const Plan& plan, const cpr_cascade_args& args) {
  const int64_t rows = plan.views_used * plan.row * static_cast<int64_t>(sizeof(float));
  if (plan.K <= kMaxMarked && static_cast<int64_t>(sizeof(CascadeShared)) + rows <= shared_memory_limit()) {
    return kOnChip;
  }
  const bool fits = kScoreQueries * bytes_per_query(plan) <= cache_budget();
  return fits || plan.D > kMaxBoundedWidth || args.precision == CPR_APPROX_BF16 ? kInCache : kRefined;
}

// Queries per chunk. Rows that fit the L2 cache together, where they do; for longer rows enough queries to fill
// the multiprocessors, within a memory limit; at least one.
int64_t chunk_of(const Plan& plan) {
  const int64_t bytes = bytes_per_query(plan);
  const int64_t in_cache = cache_budget() / bytes;
  const int64_t in_memory = (static_cast<int64_t>(plan.route == kRefined ? 1024 : 256) << 20) / bytes;
  const int64_t filling = in_memory < 128 ? in_memory : 128;
  const int64_t chunk = in_cache > filling ? in_cache : filling;
  return chunk < 1 ? 1 : chunk < plan.B ? chunk : plan.B;
}

Plan plan_of(const cpr_cascade_args& args) {
  Plan plan = {};
  plan.B = args.B, plan.K = args.K, plan.D = args.D;
  plan.stages = static_cast<int>(args.n);
  for (int s = 0; s < plan.stages; ++s) {
    int u = 0;
    while (u < plan.views_used && plan.view_used[u] != args.views[s]) ++u;
    if (u == plan.views_used) plan.view_used[plan.views_used++] = static_cast<int32_t>(args.views[s]);
    plan.view[s] = static_cast<int16_t>(u);
    plan.keep[s] = static_cast<int32_t>(args.keep[s] < args.K ? args.keep[s] : args.K);
  }
  plan.top_k = args.keep[args.n - 1];
  plan.row = round_up(plan.K, kRowUnit);
  const int64_t ranked = plan.keep[plan.stages - 1];
  plan.ranking_row = ranked > kCandidates ? round_up(ranked, kRowUnit) : 0;  // fewer are ranked in shared memory
  plan.route = kInCache;
  plan.route = route_of(plan, args);
  plan.chunk = chunk_of(plan);
  return plan;
}

// What never is compared: an empty slot, and the query's own (own id -1 matches no live entry).
__device__ __forceinline__ bool excluded(const int64_t* memory_ids, int64_t id, int64_t own_id) {
  return memory_ids != nullptr && (id == -1 || id == own_id);
}

// scores[u, b, k] for a tile of queries and of slots, NaN where the entry is empty or of the query's own id.
template <typename T, int kThreadRows, int kThreadColumns>
__global__ void __launch_bounds__(kTileThreads)
    score_kernel(const __grid_constant__ Plan plan, const T* queries, const T* memory, const int64_t* query_ids,
                 const int64_t* memory_ids, int64_t first_query, int64_t chunk_queries, float* scores) {
  auto& shared = shared_memory<DotShared<kThreadRows, kThreadColumns>>();
  const int u = blockIdx.z;
  const int64_t view = plan.view_used[u];
  const int64_t query0 = static_cast<int64_t>(blockIdx.y) * kTileRows * kThreadRows;
  const int64_t slot0 = static_cast<int64_t>(blockIdx.x) * kTileLanes * kThreadColumns;
  const Matrix<T> query(queries + (view * plan.B + first_query) * plan.D, chunk_queries, plan.D);
  const Matrix<T> keys(memory + view * plan.K * plan.D, plan.K, plan.D);
  float score[kThreadRows][kThreadColumns];
  dot_tile(query, query0, keys, slot0, shared, score);

  int64_t id[kThreadColumns];
#pragma unroll
  for (int j = 0; j < kThreadColumns; ++j) {
    const int64_t slot = slot0 + threadIdx.x % kTileLanes + j * kTileLanes;
    id[j] = memory_ids != nullptr && slot < plan.K ? memory_ids[slot] : 0;
  }
#pragma unroll
  for (int i = 0; i < kThreadRows; ++i) {
    const int64_t b = query0 + threadIdx.x / kTileLanes + i * kTileRows;
    if (b >= chunk_queries) continue;
    const int64_t own_id = query_ids != nullptr ? query_ids[first_query + b] : -1;
    float* out = scores + (u * plan.chunk + b) * plan.row;
#pragma unroll
    for (int j = 0; j < kThreadColumns; ++j) {
      const int64_t slot = slot0 + threadIdx.x % kTileLanes + j * kTileLanes;
      if (slot >= plan.K) continue;
      out[slot] =
          excluded(memory_ids, id[j], own_id) ? NAN : score[i][j] + 0.0f;  // -0 + 0 is +0: equal scores get equal bits
    }
  }
}

// The same from tensor cores. kBounded: to be refined, canonical where no bound holds, and the greatest squared norm
// of a key in each view goes to key_squares (which starts as zeros); otherwise in one term and taken as they are.
template <typename T, bool kBounded>
__global__ void __launch_bounds__(kTileThreads, 2)
    tensor_score_kernel(const __grid_constant__ Plan plan, const T* queries, const T* memory, const int64_t* query_ids,
                        const int64_t* memory_ids, int64_t first_query, int64_t chunk_queries, float* scores,
                        unsigned* key_squares) {
  using E = typename Multiplied<T>::Type;
  constexpr int kTerms = kBounded && sizeof(T) > sizeof(E) ? 2 : 1;
  auto& shared = shared_memory<TensorScoreShared<E, kTerms>>();
  const int u = blockIdx.z;
  const int64_t view = plan.view_used[u];
  const int64_t b0 = static_cast<int64_t>(blockIdx.y) * kScoreQueries,
                k0 = static_cast<int64_t>(blockIdx.x) * kScoreKeys;
  const Matrix<T> query(queries + (view * plan.B + first_query) * plan.D, chunk_queries, plan.D);
  const Matrix<T> keys(memory + view * plan.K * plan.D, plan.K, plan.D, memory_ids);
  float* out = scores + u * plan.chunk * plan.row;
  TensorScores score;
  score_tile(query, b0, keys, k0, shared, score);

  const int lane = threadIdx.x % kWarp, column0 = threadIdx.x / kWarp * kTensorKeyPieces * 8 + lane % 4 * 2;
  int64_t id[kTensorKeyPieces][2];
#pragma unroll
  for (int n = 0; n < kTensorKeyPieces; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t slot = k0 + column0 + n * 8 + j;
      id[n][j] = memory_ids != nullptr && slot < plan.K ? memory_ids[slot] : 0;
    }
  }
#pragma unroll
  for (int i = 0; i < kTensorQueryPieces * 2; ++i) {
    const int64_t b = b0 + i * 8 + lane / 4;
    if (b >= chunk_queries) continue;
    const int64_t own_id = query_ids != nullptr ? query_ids[first_query + b] : -1;
#pragma unroll
    for (int n = 0; n < kTensorKeyPieces; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t slot = k0 + column0 + n * 8 + j;
        const float value = excluded(memory_ids, id[n][j], own_id) ? NAN : score[i / 2][n][i % 2 * 2 + j] + 0.0f;
        if (slot < plan.K) out[b * plan.row + slot] = value;
      }
    }
  }
  if (!kBounded) return;
  bool out_of_range = unbounded(shared.key_square[threadIdx.x]);
  if (threadIdx.x < kScoreQueries) out_of_range |= unbounded(shared.query_square[threadIdx.x]);
  if (blockIdx.y == 0 && !unbounded(shared.key_square[threadIdx.x])) {
    atomicMax(&key_squares[u], __float_as_uint(shared.key_square[threadIdx.x]));  // floats >= 0 order as integers
  }
  if (!__syncthreads_or(out_of_range)) return;
  for (int row = 0; row < kScoreQueries; ++row) {
    const int64_t b = b0 + row, slot = k0 + threadIdx.x;
    if (b >= chunk_queries || slot >= plan.K) continue;
    if (!unbounded(shared.query_square[row]) && !unbounded(shared.key_square[threadIdx.x])) continue;
    const int64_t memory_id = memory_ids != nullptr ? memory_ids[slot] : 0;
    const int64_t own_id = query_ids != nullptr ? query_ids[first_query + b] : -1;
    const bool out_of_play = excluded(memory_ids, memory_id, own_id);
    out[b * plan.row + slot] = out_of_play ? NAN : canonical_score(query, b, keys, slot);
  }
}
static_assert(kScoreKeys == kTileThreads, "a thread looks after one key of the tile");

// Scores that are what is to be compared.
struct Final {
  template <typename Survivors>
  __device__ __forceinline__ uint64_t last_kept(const Survivors& survivors, unsigned keep, int u,
                                                CascadeShared& shared) const {
    return kth_best(survivors, keep, shared.low[u], shared.high[u], shared.select);
  }
  __device__ __forceinline__ void settle(const ListedSurvivors&, int) const {}
  __device__ __forceinline__ void settle(const MarkedSurvivors&, int) const {}
};

// Scores within shared.bound of the canonical ones, which replace them where they decide.
template <typename T>
struct Refined {
  const Plan& plan;
  const T *queries, *memory;
  int64_t b;         // of the inputs
  float* rows;       // [U, chunk, row] from the query's row on
  uint32_t* window;  // [row] scratch

  __device__ __forceinline__ void rescore(int u, const uint32_t* slots, unsigned count) const {
    const int64_t view = plan.view_used[u];
    const Matrix<T> query(queries + view * plan.B * plan.D, plan.B, plan.D);
    const Matrix<T> keys(memory + view * plan.K * plan.D, plan.K, plan.D);
    float* row = rows + u * plan.chunk * plan.row;
    for (unsigned i = threadIdx.x; i < count; i += kSelectThreads) {
      row[slots[i]] = canonical_score(query, b, keys, slots[i]);
    }
    __syncthreads();
  }

  // With scores off by at most e, so is their keep-th best, t. Above t + 2e all are among the best and below t - 2e
  // none is; those between are rescored, and the last of the best is one of them. Infinite t: all of t, by "not >".
  __device__ __forceinline__ uint64_t last_kept(const ListedSurvivors& survivors, unsigned keep, int u,
                                                CascadeShared& shared) const {
    const uint64_t near = kth_best(survivors, keep, shared.low[u], shared.high[u], shared.select);
    const float threshold = score_of(near), reach = 2 * shared.bound[u];
    auto listed = [&](unsigned i) { return survivors.slots[i]; };
    auto undecided = [&](uint32_t slot) { return !(fabsf(survivors.scores[slot] - threshold) > reach); };
    const unsigned count = compact(survivors.count, listed, undecided, window, shared.select);
    unsigned above = 0;
    survivors.for_each([&](uint32_t slot, float score) { above += score > threshold && !undecided(slot); });
    above = block_reduce<kSelectThreads>(above, Sum(), shared.select.counts);
    rescore(u, window, count);
    const ListedSurvivors close = {survivors.scores, window, count};
    return kth_best(close, keep - above, threshold - 2 * reach, threshold + 2 * reach, shared.select);
  }

  __device__ __forceinline__ void settle(const ListedSurvivors& survivors, int u) const {
    rescore(u, survivors.slots, survivors.count);
  }

  // A query outside the range of the bound has canonical scores only.
  __device__ void find_bounds(const unsigned* key_squares, CascadeShared& shared) const {
    for (int u = 0; u < plan.views_used; ++u) {
      const T* query = queries + (plan.view_used[u] * plan.B + b) * plan.D;
      float square = 0;
      for (int64_t d = threadIdx.x; d < plan.D; d += kSelectThreads) square += widen(query[d]) * widen(query[d]);
      square = block_reduce<kSelectThreads>(square, Sum(), shared.select.scratch);
      const float bound = error_bound(square, __uint_as_float(key_squares[u]), plan.D, sizeof(T) > 2);
      if (threadIdx.x == 0) shared.bound[u] = unbounded(square) ? 0.0f : bound;
    }
    __syncthreads();
  }
};

// Whether an entry is a number in every view in use; rows: of the query, view_stride apart.
__device__ __forceinline__ bool comparable(const Plan& plan, const float* rows, int64_t view_stride, uint32_t slot) {
  bool number = true;
  for (int u = 0; u < plan.views_used; ++u) number &= !isnan(rows[u * view_stride + slot]);
  return number;
}

// Runs the stages of one query over survivors that start as all that is comparable.
template <typename Survivors, typename Scores>
__device__ __forceinline__ void run_stages(const Plan& plan, const float* rows, int64_t view_stride,
                                           const Scores& scores, Survivors& survivors, CascadeShared& shared) {
  for (int u = threadIdx.x; u < plan.views_used; u += kSelectThreads) shared.low[u] = NAN;
  __syncthreads();
  for (int s = 0; s < plan.stages; ++s) {
    const unsigned keep = static_cast<unsigned>(plan.keep[s]);
    if (keep >= survivors.count) continue;
    const int u = plan.view[s];
    survivors.scores = rows + u * view_stride;
    if (isnan(shared.low[u])) {
      float low, high;
      score_range(survivors, shared.select, &low, &high);
      if (threadIdx.x == 0) shared.low[u] = low, shared.high[u] = high;
      __syncthreads();
    }
    const uint64_t last = scores.last_kept(survivors, keep, u, shared);
    survivors.keep_from(last, keep, shared.select);
    if (threadIdx.x == 0 && fabsf(score_of(last)) < INFINITY) shared.low[u] = score_of(last);
    __syncthreads();
  }
  const int u = plan.view[plan.stages - 1];
  survivors.scores = rows + u * view_stride;
  scores.settle(survivors, u);
}

// Writes the survivors in the order of the last stage. ranking [ranking_row] global, for more than kCandidates.
template <typename Survivors>
__device__ __forceinline__ void write_best(const Plan& plan, const Survivors& survivors, uint64_t* ranking,
                                           CascadeShared& shared, int64_t* indices, float* top_scores) {
  const unsigned count = survivors.count;
  const bool in_shared = count <= kCandidates;
  uint64_t* ranks = in_shared ? shared.select.candidates : ranking;
  if (threadIdx.x == 0) shared.select.gathered = 0;
  __syncthreads();
  survivors.for_each([&](uint32_t slot, float score) {
    ranks[atomicAdd(&shared.select.gathered, 1u)] = rank_of(score, slot);  // distinct ranks: sorted below, in one way
  });
  __syncthreads();
  if (!in_shared) sort_ranks(ranks, count);
  for (unsigned i = threadIdx.x; i < count; i += kSelectThreads) {
    const unsigned place = in_shared ? place_among(ranks, count, ranks[i]) : i;
    indices[place] = slot_of(ranks[i]);
    top_scores[place] = score_of(ranks[i]);
  }
  for (int64_t i = count + threadIdx.x; i < plan.top_k; i += kSelectThreads) {
    indices[i] = -1;
    top_scores[i] = -INFINITY;
  }
}

// The workspace of a chunk and the outputs; `at` moves to one query.
struct Chunk {
  float* scores;
  uint32_t *survivors, *window;
  uint64_t* ranking;
  unsigned* key_squares;
  int64_t* indices;
  float* top_scores;

  __device__ __forceinline__ void at(const Plan& plan, int64_t row, int64_t first_query) {
    scores += row * plan.row;
    survivors += row * plan.row;
    window += row * plan.row;
    ranking += row * plan.ranking_row;
    indices += (first_query + row) * plan.top_k;
    top_scores += (first_query + row) * plan.top_k;
  }
};

// One block per query, its rows copied to shared memory behind CascadeShared.
__global__ void __launch_bounds__(kSelectThreads)
    select_on_chip_kernel(const __grid_constant__ Plan plan, Chunk chunk, int64_t first_query) {
  auto& shared = shared_memory<CascadeShared>();
  float* rows = reinterpret_cast<float*>(&shared + 1);
  chunk.at(plan, blockIdx.x, first_query);
  for (int u = 0; u < plan.views_used; ++u) {
    const float* from = chunk.scores + u * plan.chunk * plan.row;
    float* to = rows + u * plan.row;
    const int64_t whole = plan.K / 4 * 4;
    for (int64_t i = threadIdx.x * 4; i < whole; i += kSelectThreads * 4) copy_async<16>(to + i, from + i, true);
    for (int64_t i = whole + threadIdx.x; i < plan.K; i += kSelectThreads) to[i] = from[i];
  }
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();

  MarkedSurvivors survivors = {nullptr, {}, 0};
  unsigned own = 0;
#pragma unroll
  for (int word = 0; word < kMarkWords; ++word) {
    for (int bit = 0; bit < 32; ++bit) {
      const int64_t slot = (word * 32 + bit) * kSelectThreads + threadIdx.x;
      if (slot >= plan.K) break;
      if (comparable(plan, rows, plan.row, static_cast<uint32_t>(slot))) survivors.marks[word] |= 1u << bit, ++own;
    }
  }
  survivors.count = block_reduce<kSelectThreads>(own, Sum(), shared.select.counts);
  run_stages(plan, rows, plan.row, Final(), survivors, shared);
  write_best(plan, survivors, chunk.ranking, shared, chunk.indices, chunk.top_scores);
}

__device__ __forceinline__ ListedSurvivors all_comparable(const Plan& plan, const Chunk& chunk, CascadeShared& shared) {
  auto every_slot = [](unsigned i) { return i; };
  auto number = [&](uint32_t slot) { return comparable(plan, chunk.scores, plan.chunk * plan.row, slot); };
  const unsigned entries = static_cast<unsigned>(plan.K);
  return {nullptr, chunk.survivors, compact(entries, every_slot, number, chunk.survivors, shared.select)};
}

// One block per query, its rows and the list of survivors in global memory.
__global__ void __launch_bounds__(kSelectThreads)
    select_kernel(const __grid_constant__ Plan plan, Chunk chunk, int64_t first_query) {
  auto& shared = shared_memory<CascadeShared>();
  chunk.at(plan, blockIdx.x, first_query);
  ListedSurvivors survivors = all_comparable(plan, chunk, shared);
  run_stages(plan, chunk.scores, plan.chunk * plan.row, Final(), survivors, shared);
  write_best(plan, survivors, chunk.ranking, shared, chunk.indices, chunk.top_scores);
}

// The same over scores that are refined.
template <typename T>
__global__ void __launch_bounds__(kSelectThreads)
    select_refined_kernel(const __grid_constant__ Plan plan, Chunk chunk, const T* queries, const T* memory,
                          int64_t first_query) {
  auto& shared = shared_memory<CascadeShared>();
  chunk.at(plan, blockIdx.x, first_query);
  const Refined<T> scores = {plan, queries, memory, first_query + blockIdx.x, chunk.scores, chunk.window};
  scores.find_bounds(chunk.key_squares, shared);
  ListedSurvivors survivors = all_comparable(plan, chunk, shared);
  run_stages(plan, chunk.scores, plan.chunk * plan.row, scores, survivors, shared);
  write_best(plan, survivors, chunk.ranking, shared, chunk.indices, chunk.top_scores);
}

template <typename T>
struct Inputs {
  const T *queries, *memory;
  const int64_t *query_ids, *memory_ids;
};

template <int kThreadRows, int kThreadColumns, typename T>
const char* launch_scores(const Plan& plan, const Inputs<T>& in, int64_t first, int64_t queries, const Chunk& chunk,
                          cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(plan.K, kTileLanes * kThreadColumns)),
                  static_cast<unsigned>(ceil_div(queries, kTileRows * kThreadRows)),
                  static_cast<unsigned>(plan.views_used));
  return launch<DotShared<kThreadRows, kThreadColumns>>(score_kernel<T, kThreadRows, kThreadColumns>, grid,
                                                        kTileThreads, stream, plan, in.queries, in.memory, in.query_ids,
                                                        in.memory_ids, first, queries, chunk.scores);
}

template <bool kBounded, typename T>
const char* launch_tensor_scores(const Plan& plan, const Inputs<T>& in, int64_t first, int64_t queries,
                                 const Chunk& chunk, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(plan.K, kScoreKeys)),
                  static_cast<unsigned>(ceil_div(queries, kScoreQueries)), static_cast<unsigned>(plan.views_used));
  using Shared = TensorScoreShared<typename Multiplied<T>::Type, 2>;  // one term uses less of it
  return launch<Shared>(tensor_score_kernel<T, kBounded>, grid, kTileThreads, stream, plan, in.queries, in.memory,
                        in.query_ids, in.memory_ids, first, queries, chunk.scores, chunk.key_squares);
}

template <typename T>
const char* run_chunk(const Plan& plan, const Inputs<T>& in, bool approximate, int64_t first, int64_t queries,
                      const Chunk& chunk, cudaStream_t stream) {
  const char* error;
  if (plan.route == kRefined) {
    error = launch_tensor_scores<true>(plan, in, first, queries, chunk, stream);
  } else if (approximate) {
    error = launch_tensor_scores<false>(plan, in, first, queries, chunk, stream);
  } else if (queries <= 32) {  // small tiles, so that there are enough of them for every multiprocessor
    error = launch_scores<4, 4>(plan, in, first, queries, chunk, stream);
  } else {
    error = launch_scores<8, 8>(plan, in, first, queries, chunk, stream);
  }
  if (error != nullptr) return error;
  const dim3 blocks(static_cast<unsigned>(queries));
  const int64_t rows = plan.views_used * plan.row * static_cast<int64_t>(sizeof(float));
  switch (plan.route) {
    case kOnChip:
      return launch_sized(select_on_chip_kernel, blocks, kSelectThreads, sizeof(CascadeShared) + rows, stream, plan,
                          chunk, first);
    case kInCache:
      return launch<CascadeShared>(select_kernel, blocks, kSelectThreads, stream, plan, chunk, first);
    default:
      return launch<CascadeShared>(select_refined_kernel<T>, blocks, kSelectThreads, stream, plan, chunk, in.queries,
                                   in.memory, first);
  }
}

template <typename T>
const char* run(const cpr_cascade_args& args, void* workspace, cudaStream_t stream) {
  const Plan plan = plan_of(args);
  const int64_t entries = plan.chunk * plan.row;
  Chunk chunk = {};
  chunk.scores = static_cast<float*>(workspace);
  chunk.survivors = reinterpret_cast<uint32_t*>(chunk.scores + plan.views_used * entries);
  chunk.window = chunk.survivors + (plan.route == kOnChip ? 0 : entries);
  chunk.ranking = reinterpret_cast<uint64_t*>(chunk.window + (plan.route == kRefined ? entries : 0));
  chunk.key_squares = reinterpret_cast<unsigned*>(chunk.ranking + plan.chunk * plan.ranking_row);
  chunk.indices = args.indices, chunk.top_scores = args.scores;
  if (plan.route == kRefined) {
    const cudaError_t status = cudaMemsetAsync(chunk.key_squares, 0, plan.views_used * sizeof(unsigned), stream);
    if (status != cudaSuccess) return cudaGetErrorString(status);
  }
  const Inputs<T> in = {static_cast<const T*>(args.queries), static_cast<const T*>(args.memory), args.query_ids,
                        args.memory_ids};
  for (int64_t first = 0; first < plan.B; first += plan.chunk) {
    const int64_t queries = plan.B - first < plan.chunk ? plan.B - first : plan.chunk;
    const char* error = run_chunk(plan, in, args.precision == CPR_APPROX_BF16, first, queries, chunk, stream);
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace
}  // namespace cpr

extern "C" size_t cpr_cascade_select_cuda_workspace(const cpr_cascade_args* args) {
  if (cpr::check(*args) != nullptr) return 0;
  const cpr::Plan plan = cpr::plan_of(*args);
  return static_cast<size_t>(plan.chunk * cpr::bytes_per_query(plan)) + plan.views_used * sizeof(unsigned);
}

extern "C" const char* cpr_cascade_select_cuda(const cpr_cascade_args* args, void* workspace, void* stream) {
  if (const char* error = cpr::check(*args)) return error;
  return cpr::with_element_type(args->dtype, [&](auto element) {
    return cpr::run<decltype(element)>(*args, workspace, static_cast<cudaStream_t>(stream));
  });
}
