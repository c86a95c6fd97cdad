// The scan of the memory in float32, for features of any type and width. Letters as in mil_nce.cu.
#pragma once

#include "cuda/common/reduce.cuh"
#include "cuda/common/tile.cuh"
#include "cuda/mil_nce/problem.cuh"

namespace cpr {
namespace {

struct ScanShared {
  union {
    DotShared<kSumThreadRows, kThreadKeys> dot;
    RowPanel panel;
  };
  Weights weights[kGroups];
};

// The running logsumexp of one group for the rows that a thread works on, and the weighted sum of the columns it owns.
template <int kThreadRows>
struct Running {
  float maximum[kThreadRows], sum[kThreadRows];  // sum: over the keys of this thread, until finish()
  WeightedRows<kThreadRows> weighted;

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      maximum[i] = -INFINITY;
      sum[i] = 0;
#pragma unroll
      for (int c = 0; c < kSumThreadColumns; ++c) weighted[i][c] = 0;
    }
  }

  // Adds the scores of a tile of kSumTerms keys, score[i][first .. first + kThreadKeys - 1]; those of -inf do not
  // count. Writes the weights of the keys to `weights` and rescales the sums to the new maximum.
  template <int kColumns>
  __device__ __forceinline__ void absorb(const float (&score)[kThreadRows][kColumns], int first,
                                         float (*weights)[kWeightStride]) {
    const int lane = threadIdx.x % kTileLanes, row = threadIdx.x / kTileLanes;
    float reference[kThreadRows];
    raise_maxima(score, first, reference);
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
#pragma unroll
      for (int j = 0; j < kThreadKeys; ++j) {
        const float weight = expf(score[i][first + j] - reference[i]);
        sum[i] += weight;
        weights[row + i * kTileRows][lane + j * kTileLanes] = weight;
      }
    }
  }

  // Raises the maxima to those of the tile, which the weights refer to, and rescales the sums.
  template <int kColumns>
  __device__ __forceinline__ void raise_maxima(const float (&score)[kThreadRows][kColumns], int first,
                                               float (&reference)[kThreadRows]) {
    float before[kThreadRows];
    bool raised = false;
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      before[i] = maximum[i];
#pragma unroll
      for (int j = 0; j < kThreadKeys; ++j) maximum[i] = fmaxf(maximum[i], score[i][first + j]);
      maximum[i] = warp_reduce<kTileLanes>(maximum[i], Max());
      raised |= maximum[i] != before[i];
      reference[i] = maximum[i] == -INFINITY ? 0.0f : maximum[i];  // no score yet: exp(-inf) instead of exp(NaN)
    }
    if (!in_all_lanes(raised)) return;
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const float rescale = expf(before[i] - reference[i]);
      sum[i] *= rescale;
#pragma unroll
      for (int c = 0; c < kSumThreadColumns; ++c) weighted[i][c] *= rescale;
    }
  }

  // Writes the result of the split for rows row0 + t/16 + 8i below `rows`, and columns from column0 on.
  __device__ __forceinline__ void finish(const Partials& out, int64_t group_split, int64_t row0, int64_t rows,
                                         int64_t column0, int64_t D) {
    const int lane = threadIdx.x % kTileLanes;
#pragma unroll
    for (int i = 0; i < kThreadRows; ++i) {
      const float total = warp_reduce<kTileLanes>(sum[i], Sum());
      const int64_t row = row0 + threadIdx.x / kTileLanes + i * kTileRows;
      if (row >= rows) continue;
      const int64_t at = group_split * kChunk + row;
      if (lane == 0 && column0 == 0) {
        out.maximum[at] = maximum[i];
        out.sum[at] = total;
      }
#pragma unroll
      for (int c = 0; c < kSumThreadColumns; ++c) {
        const int64_t column = column0 + lane * 4 + c / 4 * 64 + c % 4;
        if (column < D) out.weighted[at * D + column] = weighted[i][c];
      }
    }
  }
};

// Replaces the scores outside of a mask by -inf: bit i * kThreadKeys + j belongs to score[i][j].
__device__ __forceinline__ void keep_members(unsigned members, float (&score)[kSumThreadRows][kThreadKeys]) {
#pragma unroll
  for (int i = 0; i < kSumThreadRows; ++i) {
#pragma unroll
    for (int j = 0; j < kThreadKeys; ++j) {
      if (!(members >> (i * kThreadKeys + j) & 1)) score[i][j] = -INFINITY;
    }
  }
}

// Grid: (tiles of 32 queries, S, groups of 128 columns). Each group of columns computes the scores again.
template <typename T, bool kPositiveById>
__global__ void __launch_bounds__(kTileThreads, 2)
    scan_kernel(const __grid_constant__ Problem problem, const T* queries, const T* memory, int64_t first_query,
                int64_t chunk_queries, int64_t tiles, Partials out) {
  auto& shared = shared_memory<ScanShared>();
  const int lane = threadIdx.x % kTileLanes, row = threadIdx.x / kTileLanes;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kSumRows;
  const int64_t column0 = static_cast<int64_t>(blockIdx.z) * kSumColumns;
  const Matrix<T> query(queries + first_query * problem.D, chunk_queries, problem.D);
  const Matrix<T> keys(memory, problem.K, problem.D);
  const Matrix<T> live_keys(memory, problem.K, problem.D, problem.memory_ids);
  int64_t own[kSumThreadRows];
#pragma unroll
  for (int i = 0; i < kSumThreadRows; ++i) own[i] = problem.own_id(first_query + row0 + row + i * kTileRows);

  Running<kSumThreadRows> all, positive;
  all.start();
  positive.start();
  for (int64_t tile = blockIdx.y * tiles; tile < (blockIdx.y + 1) * tiles; ++tile) {
    const int64_t key0 = tile * kSumTerms;
    if (key0 >= problem.K) break;
    float score[kSumThreadRows][kThreadKeys];
    dot_tile(query, row0, keys, key0, shared.dot, score);
    unsigned positives = 0;
#pragma unroll
    for (int j = 0; j < kThreadKeys; ++j) {
      const int64_t key = key0 + lane + j * kTileLanes;
      const bool live = problem.live(key);
#pragma unroll
      for (int i = 0; i < kSumThreadRows; ++i) {
        const unsigned bit = 1u << (i * kThreadKeys + j);
        const bool same = live && problem.same(own[i], key);
        const bool member = live && !(same && problem.same_id == CPR_SAME_IGNORE);
        score[i][j] = member ? score[i][j] * problem.inverse_temperature : -INFINITY;
        if (kPositiveById && same) positives |= bit;
      }
    }
    all.absorb(score, 0, shared.weights[kAll]);
    const bool any = kPositiveById && __syncthreads_or(positives != 0);
    if (any) {
      keep_members(positives, score);
      positive.absorb(score, 0, shared.weights[kPositive]);
    }
    add_weighted_rows(shared.weights[kAll], any ? &shared.weights[kPositive] : nullptr, live_keys, key0, column0,
                      shared.panel, all.weighted, positive.weighted);
  }
  all.finish(out, blockIdx.y, row0, chunk_queries, column0, problem.D);
  if (kPositiveById) {
    positive.finish(out, kPositive * static_cast<int64_t>(gridDim.y) + blockIdx.y, row0, chunk_queries, column0,
                    problem.D);
  }
}

}  // namespace
}  // namespace cpr
