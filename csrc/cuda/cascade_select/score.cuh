// The kernels that compute the scores of a chunk of queries in every view that a stage compares, either canonically or
// on tensor cores. Letters as in cascade_select.cu.
#pragma once

#include "cuda/cascade_select/plan.cuh"
#include "cuda/cascade_select/tensor_score.cuh"
#include "cuda/common/copied_tile.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/tile.cuh"

namespace cpr {
namespace {

// Returns whether an entry is excluded: an empty slot, or an entry with the id of the query (id -1 of a query matches
// no non-empty slot).
__device__ __forceinline__ bool excluded(const int64_t* memory_ids, int64_t id, int64_t own_id) {
  return memory_ids != nullptr && (id == -1 || id == own_id);
}

// Small tiles of float features are copied asynchronously.
template <typename T, int kThreadRows>
constexpr bool kCopied = sizeof(T) == sizeof(float) && kThreadRows <= 4;

template <int kThreadRows, int kThreadColumns, bool kWithCopies>
union ScoreShared {
  DotShared<kThreadRows, kThreadColumns> dot;
  CopiedDotShared<kThreadRows, kThreadColumns> copied;
};
template <int kThreadRows, int kThreadColumns>
union ScoreShared<kThreadRows, kThreadColumns, false> {
  DotShared<kThreadRows, kThreadColumns> dot;
};

// Computes the canonical scores[u, b, k] of a tile of queries and slots; NaN for excluded entries.
template <typename T, int kThreadRows, int kThreadColumns>
__global__ void __launch_bounds__(kTileThreads)
    score_kernel(const __grid_constant__ Plan plan, const T* queries, const T* memory, const int64_t* query_ids,
                 const int64_t* memory_ids, int64_t first_query, int64_t chunk_queries, float* scores) {
  auto& shared = shared_memory<ScoreShared<kThreadRows, kThreadColumns, kCopied<T, kThreadRows>>>();
  const int u = blockIdx.z;
  const int64_t view = plan.view_used[u];
  const int64_t query0 = static_cast<int64_t>(blockIdx.y) * kTileRows * kThreadRows;
  const int64_t slot0 = static_cast<int64_t>(blockIdx.x) * kTileLanes * kThreadColumns;
  const Matrix<T> query(queries + (view * plan.B + first_query) * plan.D, chunk_queries, plan.D);
  const Matrix<T> keys(memory + view * plan.K * plan.D, plan.K, plan.D);
  float score[kThreadRows][kThreadColumns];
  bool copied = false;
  if constexpr (kCopied<T, kThreadRows>) {
    copied = copyable(query) && copyable(keys);
    if (copied) copied_dot_tile(query, query0, keys, slot0, shared.copied, score);
  }
  if (!copied) dot_tile(query, query0, keys, slot0, shared.dot, score);

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

// Returns the slot of an entry of the sample: one from each of 2^bits equal parts of the row, at a place that depends
// on the part as if at random.
__device__ __forceinline__ int64_t sampled_slot(int64_t part, int64_t entries, int bits) {
  const uint64_t K = static_cast<uint64_t>(entries), number = static_cast<uint64_t>(part);
  const uint64_t scattered = static_cast<uint32_t>(number + 1) * 2654435761u;
  return static_cast<int64_t>((number * K + ((scattered * K) >> 32)) >> bits);
}

// The sampled rows of a matrix.
template <typename T>
struct SampledRows {
  static constexpr bool kConsecutive = false;
  Matrix<T> all;
  int64_t rows, D;
  const T* data;
  bool aligned;
  int bits;

  __device__ SampledRows(const Matrix<T>& all, const Plan& plan)
      : all(all), rows(plan.sample()), D(all.D), data(all.data), aligned(all.aligned), bits(plan.sample_bits) {}

  __device__ __forceinline__ int64_t slot(int64_t part) const { return sampled_slot(part, all.rows, bits); }
  __device__ __forceinline__ int64_t at(int64_t part) const { return all.at(slot(part)); }
  __device__ __forceinline__ bool holds(int64_t part) const { return all.holds(slot(part)); }
  __device__ __forceinline__ float4 load4(int64_t part, int64_t d) const { return all.load4(slot(part), d); }
};
static_assert((1 << kSampleBits) % kScoreKeys == 0, "tiles of sampled rows are whole");

// Computes the scores of a tile on tensor cores, of features rounded to kTerms 16-bit terms; NaN for excluded entries.
// With kSampled, keys are the sample of the memory.
template <typename T, bool kSampled, int kTerms, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    tensor_score_kernel(const __grid_constant__ Plan plan, Chunk chunk, Inputs<T> in, int64_t first_query,
                        int64_t queries) {
  auto& shared = shared_memory<TensorScoreShared<Tile, T, kTerms>>();
  const int u = blockIdx.z;
  const int64_t view = plan.view_used[u], entries = kSampled ? plan.sample() : plan.K,
                row = kSampled ? plan.sample() : plan.row;
  const int64_t b0 = static_cast<int64_t>(blockIdx.y) * Tile::kQueries,
                k0 = static_cast<int64_t>(blockIdx.x) * Tile::kKeys;
  const Matrix<T> query(in.queries + (view * plan.B + first_query) * plan.D, queries, plan.D);
  const Matrix<T> keys(in.memory + view * plan.K * plan.D, plan.K, plan.D, in.memory_ids);
  typename Tile::Scores score;
  if constexpr (kSampled) {
    score_tile<false>(query, b0, SampledRows<T>(keys, plan), k0, shared, score);
  } else {
    score_tile<false>(query, b0, keys, k0, shared, score);
  }

  const int lane = threadIdx.x % kWarp, column0 = Tile::first_key() + lane % 4 * 2;
  int64_t id[kTensorKeyPieces][2] = {};
#pragma unroll
  for (int n = 0; n < kTensorKeyPieces; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int64_t entry = k0 + column0 + n * 8 + j;
      if (in.memory_ids == nullptr || entry >= entries) continue;
      id[n][j] = in.memory_ids[kSampled ? sampled_slot(entry, plan.K, plan.sample_bits) : entry];
    }
  }
#pragma unroll
  for (int i = 0; i < Tile::kQueryPieces * 2; ++i) {
    const int64_t b = b0 + Tile::first_query() + i * 8 + lane / 4;
    if (b >= queries) continue;
    const int64_t own_id = in.query_ids != nullptr ? in.query_ids[first_query + b] : -1;
    float* to = chunk.scores + (u * plan.chunk + b) * row + k0 + column0;
#pragma unroll
    for (int n = 0; n < kTensorKeyPieces; ++n) {
      float value[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        value[j] = excluded(in.memory_ids, id[n][j], own_id) ? NAN : score[i / 2][n][i % 2 * 2 + j] + 0.0f;
      }
      const int64_t slot = k0 + column0 + n * 8;  // even
      if (slot + 1 < entries) {
        *reinterpret_cast<float2*>(to + n * 8) = {value[0], value[1]};
      } else if (slot < entries) {
        to[n * 8] = value[0];
      }
    }
  }
}

template <int kThreadRows, int kThreadColumns, typename T>
const char* launch_scores(const Plan& plan, const Inputs<T>& in, int64_t first, int64_t queries, const Chunk& chunk,
                          cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(plan.K, kTileLanes * kThreadColumns)),
                  static_cast<unsigned>(ceil_div(queries, kTileRows * kThreadRows)),
                  static_cast<unsigned>(plan.views_used));
  return launch<ScoreShared<kThreadRows, kThreadColumns, kCopied<T, kThreadRows>>>(
      score_kernel<T, kThreadRows, kThreadColumns>, grid, kTileThreads, stream, plan, in.queries, in.memory,
      in.query_ids, in.memory_ids, first, queries, chunk.scores);
}

// Returns the cycles that a multiprocessor is busy with tiles of 4 x kColumns scores of a thread, for each four
// features of a tile: four for a vector read from shared memory, and two for a multiply-add of sm_80, whose rate is
// half of that of later devices.
template <int kColumns>
int64_t cycles_of_tiles(const Plan& plan, int64_t processors) {
  const int64_t tiles = ceil_div(plan.K, kTileLanes * kColumns) * plan.views_used;
  constexpr int64_t kReads = 4 * (4 + kColumns), kMultiplyAdds = 2 * 4 * kColumns;
  return ceil_div(tiles, processors) * (kReads > kMultiplyAdds ? kReads : kMultiplyAdds);
}

// Computes the scores of at most 32 queries, in the tiles that take the least time; of several, the largest.
template <typename T>
const char* launch_scores_of_few(const Plan& plan, const Inputs<T>& in, int64_t first, int64_t queries,
                                 const Chunk& chunk, cudaStream_t stream) {
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount, 1);
  const int64_t large = cycles_of_tiles<8>(plan, processors), medium = cycles_of_tiles<4>(plan, processors);
  const int64_t small = cycles_of_tiles<2>(plan, processors);
  if (large <= medium && large <= small) return launch_scores<4, 8>(plan, in, first, queries, chunk, stream);
  if (medium <= small) return launch_scores<4, 4>(plan, in, first, queries, chunk, stream);
  return launch_scores<4, 2>(plan, in, first, queries, chunk, stream);
}

// Computes the scores of a chunk or, with kSampled, of the sample on tensor cores. With kPrecise, float features have
// two terms: limits from a sample must not be off by the rounding of a query, which is the same in all of its scores.
template <bool kSampled, bool kPrecise, typename Tile = LargeTile, typename T>
const char* launch_tensor_scores(const Plan& plan, const Inputs<T>& in, int64_t first, int64_t queries,
                                 const Chunk& chunk, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(kSampled ? plan.sample() : plan.K, Tile::kKeys)),
                  static_cast<unsigned>(ceil_div(queries, Tile::kQueries)), static_cast<unsigned>(plan.views_used));
  constexpr int kTerms = kTermsOf<T, kPrecise>;
  return launch<TensorScoreShared<Tile, T, kTerms>>(tensor_score_kernel<T, kSampled, kTerms, Tile>, grid,
                                                    Tile::kThreads, stream, plan, chunk, in, first, queries);
}

}  // namespace
}  // namespace cpr
