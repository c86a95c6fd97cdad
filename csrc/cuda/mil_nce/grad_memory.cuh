// The gradient of mil_nce to the memory: another pass over it, which computes the scores again. Letters as in
// mil_nce.cu.
#pragma once

#include "cuda/common/tile.cuh"
#include "cuda/mil_nce/problem.cuh"

namespace cpr {
namespace {

struct GradMemoryShared {
  union {
    DotShared<kSumThreadRows, kThreadKeys> dot;
    RowPanel panel;
  };
  Weights weights;
  unsigned listed[kSumTerms];  // bit r: key r of the block is an explicit positive of the query
};

// Computes d loss / d memory. Grid: (tiles of 32 keys, groups of 128 columns). A block goes through all queries in
// order.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, 2)
    grad_memory_kernel(const __grid_constant__ Problem problem, const T* queries, const T* memory,
                       const float* grad_loss, const float* lse_all, const float* lse_positive, float* grad_memory) {
  auto& shared = shared_memory<GradMemoryShared>();
  const int lane = threadIdx.x % kTileLanes, row = threadIdx.x / kTileLanes;
  const int64_t key0 = static_cast<int64_t>(blockIdx.x) * kSumRows;
  const int64_t column0 = static_cast<int64_t>(blockIdx.y) * kSumColumns;
  const Matrix<T> keys(memory, problem.K, problem.D);
  const Matrix<T> query(queries, problem.B, problem.D);
  WeightedSum gradient = {}, unused;
  for (int64_t query0 = 0; query0 < problem.B; query0 += kSumTerms) {
    const int64_t queries_here = problem.B - query0 < kSumTerms ? problem.B - query0 : kSumTerms;
    if (threadIdx.x < kSumTerms) shared.listed[threadIdx.x] = 0;
    float score[kSumThreadRows][kThreadKeys];
    dot_tile(keys, key0, query, query0, shared.dot, score);  // contains the barriers that the clearing above needs
    for (int64_t at = threadIdx.x; at < queries_here * problem.P; at += kTileThreads) {
      const int64_t key = problem.positives[query0 * problem.P + at] - key0;
      if (key >= 0 && key < kSumRows) atomicOr(&shared.listed[at / problem.P], 1u << key);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kThreadKeys; ++j) {
      const int64_t b = query0 + lane + j * kTileLanes;
      const int64_t own = problem.own_id(b);
      const bool valid = b < problem.B;
      const float scale = valid ? grad_loss[b] * problem.inverse_temperature : 0.0f;
      const float all = valid ? lse_all[b] : 0.0f, positive = valid ? lse_positive[b] : 0.0f;
#pragma unroll
      for (int i = 0; i < kSumThreadRows; ++i) {
        const int key_row = row + i * kTileRows;
        const int64_t key = key0 + key_row;
        float weight = 0;
        if (valid && problem.live(key)) {
          const float logit = score[i][j] * problem.inverse_temperature;
          const bool same = problem.same(own, key), listed = (shared.listed[lane + j * kTileLanes] >> key_row) & 1;
          if (listed || !same || problem.same_id != CPR_SAME_IGNORE) weight += expf(logit - all);
          if (listed || (same && problem.same_id == CPR_SAME_POSITIVE)) weight -= expf(logit - positive);
        }
        shared.weights[key_row][lane + j * kTileLanes] = weight * scale;
      }
    }
    add_weighted_rows(shared.weights, nullptr, query, query0, column0, shared.panel, gradient, unused);
  }
#pragma unroll
  for (int i = 0; i < kSumThreadRows; ++i) {
    const int64_t key = key0 + row + i * kTileRows;
#pragma unroll
    for (int c = 0; c < kSumThreadColumns; ++c) {
      const int64_t column = column0 + lane * 4 + c / 4 * 64 + c % 4;
      if (key < problem.K && column < problem.D) grad_memory[key * problem.D + column] = gradient[i][c];
    }
  }
}

}  // namespace
}  // namespace cpr
