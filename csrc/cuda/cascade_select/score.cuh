// The kernels that compute the scores of a chunk of queries in every view that a stage compares, either canonically or
// on tensor cores. Letters as in cascade_select.cu.
#pragma once

#include "cuda/cascade_select/plan.cuh"
#include "cuda/cascade_select/tensor_score.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/tile.cuh"

namespace cpr {
namespace {

// Returns whether an entry is excluded: an empty slot, or an entry with the id of the query (id -1 of a query matches
// no non-empty slot).
__device__ __forceinline__ bool excluded(const int64_t* memory_ids, int64_t id, int64_t own_id) {
  return memory_ids != nullptr && (id == -1 || id == own_id);
}

// Computes the canonical scores[u, b, k] of a tile of queries and slots; NaN for excluded entries.
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

// Computes the scores of a tile on tensor cores. kBounded (refined route): the scores are canonical where the bound
// does not hold, and the greatest squared norm of a key in each view goes to key_squares, which must start as zeros.
// Otherwise features are rounded to one 16-bit term and the scores are final.
template <typename T, bool kBounded>
__global__ void __launch_bounds__(kTileThreads, kBounded ? 2 : 3)
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
  score_tile<kBounded>(query, b0, keys, k0, shared, score);

  const int lane = threadIdx.x % kWarp, column0 = threadIdx.x / kWarp * kTensorKeyPieces * 8 + lane % 4 * 2;
  int64_t id[kTensorKeyPieces][2] = {};
#pragma unroll
  for (int n = 0; n < kTensorKeyPieces; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t slot = k0 + column0 + n * 8 + j;
      if (memory_ids != nullptr && slot < plan.K) id[n][j] = memory_ids[slot];
    }
  }
#pragma unroll
  for (int i = 0; i < kTensorQueryPieces * 2; ++i) {
    const int64_t b = b0 + i * 8 + lane / 4;
    if (b >= chunk_queries) continue;
    const int64_t own_id = query_ids != nullptr ? query_ids[first_query + b] : -1;
    float* to = out + b * plan.row + k0 + column0;
#pragma unroll
    for (int n = 0; n < kTensorKeyPieces; ++n) {
      float value[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        value[j] = excluded(memory_ids, id[n][j], own_id) ? NAN : score[i / 2][n][i % 2 * 2 + j] + 0.0f;
      }
      const int64_t slot = k0 + column0 + n * 8;  // even
      if (slot + 1 < plan.K) {
        *reinterpret_cast<float2*>(to + n * 8) = {value[0], value[1]};
      } else if (slot < plan.K) {
        to[n * 8] = value[0];
      }
    }
  }
  if (!kBounded) return;
  bool out_of_range = unbounded(shared.key_square[threadIdx.x]);
  if (threadIdx.x < kScoreQueries) out_of_range |= unbounded(shared.query_square[threadIdx.x]);
  if (blockIdx.y == 0 && !unbounded(shared.key_square[threadIdx.x])) {
    atomicMax(&key_squares[u], __float_as_uint(shared.key_square[threadIdx.x]));  // floats >= 0 order as their bits
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
  using Shared = TensorScoreShared<typename Multiplied<T>::Type, 2>;  // with one term, part of it is unused
  return launch<Shared>(tensor_score_kernel<T, kBounded>, grid, kTileThreads, stream, plan, in.queries, in.memory,
                        in.query_ids, in.memory_ids, first, queries, chunk.scores, chunk.key_squares);
}

}  // namespace
}  // namespace cpr
