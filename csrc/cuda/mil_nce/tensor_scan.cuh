// The scan of the memory for wide 16-bit features on tensor cores.
//
// As in flash-decoding, a block holds 32 queries and goes through its split of the memory in tiles of keys; the next
// tile is copied asynchronously while the current one is used. The warps divide the scores of a tile by keys, then the
// weighted sum of keys by columns, so every key is read from shared memory twice, for any width. Sums are float.
// Weights are split into two 16-bit terms: the gradient is a difference of two weighted sums, which cancel as the loss
// falls, and the rounding of a single term (2^-8 of 1 / temperature for bfloat16) would dominate it.
//
// In every product lane l owns rows l/4 and l/4 + 8 and columns 2(l%4) and 2(l%4) + 1 of a 16 x 8 piece.
#pragma once

#include "cpr_fast.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/tensor_core.cuh"
#include "cuda/mil_nce/problem.cuh"
#include "cuda/mil_nce/tensor_running.cuh"

namespace cpr {

// Copies tiles of the memory to shared memory: first the ids of a tile (two tiles ahead), then its rows, zero for slots
// without an entry.
template <typename T, int kWidth>
struct KeyTiles {
  using Shape = ScanShape<kWidth>;
  const T* memory;
  const int64_t* ids;
  int64_t K;

  __device__ __forceinline__ void copy_ids(int64_t key0, int64_t (&out)[Shape::kKeys]) const {
    if (threadIdx.x >= Shape::kKeys) return;
    const int64_t key = key0 + threadIdx.x;
    if (ids != nullptr && key < K) {
      copy_async<sizeof(int64_t)>(&out[threadIdx.x], ids + key, true);
    } else {
      out[threadIdx.x] = key < K ? 0 : -1;
    }
  }

  __device__ __forceinline__ void copy_rows(int64_t key0, const int64_t (&tile_ids)[Shape::kKeys],
                                            T (&out)[Shape::kKeys][kWidth + kPad]) const {
    constexpr int kVector = 16 / sizeof(T), kVectors = kWidth / kVector;
#pragma unroll
    for (int i = 0; i < Shape::kKeys * kVectors / Shape::kThreads; ++i) {
      const int at = threadIdx.x + i * Shape::kThreads, row = at / kVectors, column = at % kVectors * kVector;
      const bool live = tile_ids[row] != -1;
      copy_async<16>(&out[row][column], live ? memory + (key0 + row) * kWidth + column : memory, live);
    }
  }
};

// Computes the share of the warp in query [32, width] keys [keys, width]^T.
template <typename T, int kWidth>
__device__ __forceinline__ void score_keys(const TensorScanShared<T, kWidth>& shared,
                                           const T (&keys)[ScanShape<kWidth>::kKeys][kWidth + kPad],
                                           typename TensorRunning<T, kWidth>::Scores& score) {
  using Shape = ScanShape<kWidth>;
  using Group = TensorRunning<T, kWidth>;
  const int lane = threadIdx.x % kWarp;
  const int query_row = Group::score_piece() * kPieceRows + lane % 16;
  const int key_row = Group::key_warp() * Shape::kScoreKeys * kPieceColumns + lane % 8;
#pragma unroll
  for (int m = 0; m < Shape::kScoreRows; ++m) {
#pragma unroll
    for (int n = 0; n < Shape::kScoreKeys; ++n) score[m][n][0] = score[m][n][1] = score[m][n][2] = score[m][n][3] = 0;
  }
#pragma unroll 4
  for (int d = 0; d < kWidth; d += 32) {
    uint32_t query[Shape::kScoreRows][2][4];
#pragma unroll
    for (int m = 0; m < Shape::kScoreRows; ++m) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        load_matrices(query[m][step], &shared.query[query_row + m * kPieceRows][d + step * 16 + lane / 16 * 8]);
      }
    }
#pragma unroll
    for (int n = 0; n < Shape::kScoreKeys; ++n) {
      uint32_t key[4];
      load_matrices(key, &keys[key_row + n * kPieceColumns][d + lane / 8 * 8]);
#pragma unroll
      for (int m = 0; m < Shape::kScoreRows; ++m) {
        multiply_add<T>(score[m][n], query[m][0], key[0], key[1]);
        multiply_add<T>(score[m][n], query[m][1], key[2], key[3]);
      }
    }
  }
}

// Starts the copy of the queries of the block to shared memory, [kRows, width]; rows beyond the chunk are zero.
template <int kRows, int kThreads, typename T, int kStride>
__device__ __forceinline__ void copy_queries(const T* queries, int64_t first_query, int64_t row0, int64_t chunk_queries,
                                             T (*out)[kStride]) {
  constexpr int kWidth = kStride - kPad, kVector = 16 / sizeof(T), kVectors = kWidth / kVector;
  for (int at = threadIdx.x; at < kRows * kVectors; at += kThreads) {
    const int64_t row = row0 + at / kVectors;
    const T* from = row < chunk_queries ? queries + (first_query + row) * kWidth + at % kVectors * kVector : queries;
    copy_async<16>(&out[at / kVectors][at % kVectors * kVector], from, row < chunk_queries);
  }
}

// Divides the scores of a tile by the temperature, and marks those that count in the denominator (`members`) and those
// that are positives by id (`positives`): bit (m * kScoreKeys + n) * 4 + e belongs to score[m][n][e].
template <bool kPositiveById, int kWidth, int kRows, int kKeys>
__device__ __forceinline__ void find_members(const Problem& problem, const int64_t (&own)[kRows][2],
                                             const int64_t (&ids)[ScanShape<kWidth>::kKeys], int key_warp,
                                             float (&score)[kRows][kKeys][4], unsigned& members, unsigned& positives) {
#pragma unroll
  for (int n = 0; n < kKeys; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t id = ids[(key_warp * kKeys + n) * kPieceColumns + threadIdx.x % kWarp % 4 * 2 + e % 2];
#pragma unroll
      for (int m = 0; m < kRows; ++m) {
        const unsigned bit = 1u << ((m * kKeys + n) * 4 + e);
        const bool live = id != -1, same = live && id == own[m][e / 2];
        score[m][n][e] *= problem.inverse_temperature;
        if (live && !(same && problem.same_id == CPR_SAME_IGNORE)) members |= bit;
        if (kPositiveById && same) positives |= bit;
      }
    }
  }
}

// Finds the ids of the queries whose scores the lane holds. `first`: the query of the first row of the warp.
template <int kRows>
__device__ __forceinline__ void find_own_ids(const Problem& problem, int64_t first, int64_t (&own)[kRows][2]) {
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      own[m][half] = problem.own_id(first + m * kPieceRows + half * 8 + threadIdx.x % kWarp / 4);
    }
  }
}

// Adds the positives of a tile to their running softmax. Called by the whole block: its two barriers also keep these
// writes behind the reads of the sum over all keys.
template <typename T, int kWidth>
__device__ __forceinline__ void absorb_positives(TensorRunning<T, kWidth>& positive,
                                                 const typename TensorRunning<T, kWidth>::Scores& score,
                                                 unsigned members, float (&reference)[kRowPieces][2],
                                                 TensorScanShared<T, kWidth>& shared,
                                                 const T (&keys)[ScanShape<kWidth>::kKeys][kWidth + kPad]) {
  positive.offer_maxima(score, members, shared);
  __syncthreads();
  positive.take_maxima(shared, reference);
  positive.weigh(score, members, reference, shared);
  __syncthreads();
  positive.add_weighted_keys(shared, keys);
}

// Grid: (tiles of 32 queries, S). Feature rows must be 16-byte aligned.
template <typename T, int kWidth, bool kPositiveById>
__global__ void __launch_bounds__(ScanShape<kWidth>::kThreads)
    tensor_scan_kernel(const __grid_constant__ Problem problem, const T* queries, const T* memory, int64_t first_query,
                       int64_t chunk_queries, int64_t tiles, Partials out) {
  using Shape = ScanShape<kWidth>;
  using Group = TensorRunning<T, kWidth>;
  auto& shared = shared_memory<TensorScanShared<T, kWidth>>();
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kScanRows;
  const KeyTiles<T, kWidth> source = {memory, problem.memory_ids, problem.K};
  const int64_t begin = blockIdx.y * tiles * kSumTerms;
  const int64_t end = begin + tiles * kSumTerms < problem.K ? begin + tiles * kSumTerms : problem.K;

  copy_queries<kScanRows, Shape::kThreads>(queries, first_query, row0, chunk_queries, shared.query);
  source.copy_ids(begin, shared.ids[0]);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  source.copy_rows(begin, shared.ids[0], shared.keys[0]);
  source.copy_ids(begin + Shape::kKeys, shared.ids[1]);
  commit_copies();

  int64_t own[Shape::kScoreRows][2];
  find_own_ids(problem, first_query + row0 + Group::score_piece() * kPieceRows, own);
  Group all, positive;
  all.start();
  positive.start();
  int tile = 0;
  for (int64_t key0 = begin; key0 < end; key0 += Shape::kKeys, ++tile) {
    wait_for_copies<0>();
    __syncthreads();  // the copy of this tile is complete, and all warps have used the previous tile
    const auto& keys = shared.keys[tile % 2];
    const auto& ids = shared.ids[tile % 3];
    if (key0 + Shape::kKeys < end) {
      source.copy_rows(key0 + Shape::kKeys, shared.ids[(tile + 1) % 3], shared.keys[(tile + 1) % 2]);
      source.copy_ids(key0 + 2 * Shape::kKeys, shared.ids[(tile + 2) % 3]);
    }
    commit_copies();

    typename Group::Scores score;
    score_keys<T, kWidth>(shared, keys, score);
    unsigned members = 0, positives = 0;
    find_members<kPositiveById, kWidth>(problem, own, ids, Group::key_warp(), score, members, positives);

    float reference[kRowPieces][2];
    all.offer_maxima(score, members, shared);
    const bool any = __syncthreads_or(kPositiveById && positives != 0);
    all.take_maxima(shared, reference);
    all.weigh(score, members, reference, shared);
    __syncthreads();
    all.add_weighted_keys(shared, keys);
    if (kPositiveById && any) absorb_positives(positive, score, positives, reference, shared, keys);
  }
  wait_for_copies<0>();
  all.finish(out, blockIdx.y, row0, chunk_queries, shared);
  if (kPositiveById) {
    positive.finish(out, kPositive * static_cast<int64_t>(gridDim.y) + blockIdx.y, row0, chunk_queries, shared);
  }
}

// Launches the scan on tensor cores if there is one for these features; *launched says whether there is.
template <bool kPositiveById, typename T>
const char* launch_tensor_scan(const Problem& problem, const T* queries, const T* memory, int64_t first_query,
                               int64_t chunk_queries, const Splits& splits, const Partials& out, cudaStream_t stream,
                               bool* launched) {
  *launched = false;
  if constexpr (sizeof(T) == 2) {
    constexpr int kWidth = 512;
    using Shared = TensorScanShared<T, kWidth>;
    const auto addresses = reinterpret_cast<uintptr_t>(queries) | reinterpret_cast<uintptr_t>(memory);
    if (problem.D != kWidth || addresses % 16 != 0) return nullptr;
    if (static_cast<int64_t>(sizeof(Shared)) > shared_memory_limit()) return nullptr;
    *launched = true;
    const dim3 grid(static_cast<unsigned>(ceil_div(chunk_queries, kScanRows)), static_cast<unsigned>(splits.count));
    return launch<Shared>(tensor_scan_kernel<T, kWidth, kPositiveById>, grid, ScanShape<kWidth>::kThreads, stream,
                          problem, queries, memory, first_query, chunk_queries, splits.tiles, out);
  }
  return nullptr;
}

}  // namespace cpr
