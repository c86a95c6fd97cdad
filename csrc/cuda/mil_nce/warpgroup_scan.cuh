// The scan of row_scan.cuh with the matrix products of sm_90a, whose tensor cores reach their full rate only through
// them. A warpgroup owns 64 queries; the blocks of large calls have two, which share the keys in shared memory.
//
// A tile of keys is a factor twice, from the same shared memory: with its rows along the features for the scores, and
// transposed for the weighted sum. Registers hold the other factor of both, as in row_scan.cuh, and a row is computed
// by the same sums in the same order. The weights of 16 keys are multiplied while those of the next 16 are computed.
#pragma once

#include "cuda/common/warpgroup.cuh"
#include "cuda/mil_nce/row_scan.cuh"

namespace cpr {

constexpr int kGroupRows = 64;                               // queries of a warpgroup
constexpr int kHalfWidth = kSwizzledBytes / sizeof(__half);  // features in a row of a half
constexpr int kHalves = kRowWidth / kHalfWidth;
constexpr int kStepKeys = 16;  // keys, or features, of one product

// The keys of a tile, by halves of their features, swizzled.
template <typename T>
using KeyHalves = T[kHalves][kRowKeys][kHalfWidth];

template <typename T, int kWarpgroups>
struct alignas(1024) WarpgroupScanShared {
  KeyHalves<T> keys[2];
  T queries[kWarpgroups * kGroupRows][kRowWidth + kPad];
  int64_t ids[3][kRowKeys];  // of this tile, the next one and the one that is being copied
};

// Copies the rows of a tile, zero for slots without an entry.
template <int kThreads, typename T>
__device__ __forceinline__ void copy_swizzled_rows(const T* memory, int64_t key0, const int64_t (&tile_ids)[kRowKeys],
                                                   KeyHalves<T>& out) {
  constexpr int kVector = 16 / sizeof(T), kVectors = kRowWidth / kVector, kRows = kThreads / kVectors;
  static_assert(kRows % kSwizzledRows == 0, "the rows of a thread are permuted alike");
  const int row0 = threadIdx.x / kVectors, vector = threadIdx.x % kVectors;
  const T* from = memory + (key0 + row0) * kRowWidth + vector * kVector;
  T* to = &out[vector / kSwizzledRows][0][0] + swizzled(row0, vector % kSwizzledRows) * kVector;
#pragma unroll
  for (int row = 0; row < kRowKeys; row += kRows) {
    const bool live = tile_ids[row0 + row] != -1;
    copy_async<16>(to + row * kHalfWidth, live ? from + row * kRowWidth : memory, live);
  }
}

// Starts the products of the queries of the warpgroup with a tile of keys.
template <typename T>
__device__ __forceinline__ void start_scores(const RowQueries<T>& query, uint32_t keys, RowScores& score) {
  constexpr int kHalfBytes = sizeof(KeyHalves<T>) / kHalves, kStepBytes = kStepKeys * sizeof(T);
  constexpr int kSteps = kHalfWidth / kStepKeys;
  fence_registers();
#pragma unroll
  for (int step = 0; step < kRowWidth / kStepKeys; ++step) {
    const uint64_t factor = factor_at(keys + step / kSteps * kHalfBytes + step % kSteps * kStepBytes, 0);
    if (step == 0) {
      start_product<T, false>(score, query.factor[step], factor);
    } else {
      start_product<T, true>(score, query.factor[step], factor);
    }
  }
  commit_products();
}

// Adds a tile to the sums of a group. Scores of -inf do not count. scale: log2(e) / temperature.
template <typename T>
__device__ __forceinline__ void absorb_tile(RowRunning<T>& group, const RowScores& score, float scale, uint32_t keys) {
  constexpr int kHalfBytes = sizeof(KeyHalves<T>) / kHalves;
  float exponent[2];
  group.move_maxima(score, scale, exponent);
  pin_registers(group.weighted);
  RowWeights weight[kRowKeys / kStepKeys];  // all in registers, because products read those of earlier steps
#pragma unroll
  for (int step = 0; step < kRowKeys / kStepKeys; ++step) {
    group.weigh(score, step * kStepKeys, scale, exponent, weight[step]);
    const uint64_t factor = factor_at(keys + step * kStepKeys * kSwizzledBytes, kHalfBytes);
    pin_registers(weight[step]);
    fence_registers();
    start_transposed_product<T>(group.weighted, weight[step][0], factor);
    start_transposed_product<T>(group.weighted, weight[step][1], factor);
    commit_products();
  }
  wait_for_products();
  pin_registers(group.weighted);
}

// Grid: (tiles of 64 kWarpgroups queries, S). Feature rows must be 16-byte aligned. Only sm_90a has its code.
template <typename T, int kWarpgroups, bool kPositiveById>
__global__ void __launch_bounds__(kWarpgroups* kWarpgroup, 2 / kWarpgroups)
    warpgroup_scan_kernel(const __grid_constant__ Problem problem, const T* queries, const T* memory,
                          int64_t first_query, int64_t chunk_queries, int64_t tiles, Partials out) {
#ifdef CPR_HAS_WARPGROUP_PRODUCTS
  constexpr int kThreads = kWarpgroups * kWarpgroup, kRows = kWarpgroups * kGroupRows;
  auto& shared = shared_memory<WarpgroupScanShared<T, kWarpgroups>>();
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kRows;
  const RowTiles<T, kThreads> source = {memory, problem.memory_ids, problem.K};
  const int64_t begin = blockIdx.y * tiles * kSumTerms;
  const int64_t end = begin + tiles * kSumTerms < problem.K ? begin + tiles * kSumTerms : problem.K;

  copy_queries<kRows, kThreads>(queries, first_query, row0, chunk_queries, shared.queries);
  source.copy_ids(begin, shared.ids[0]);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  copy_swizzled_rows<kThreads>(memory, begin, shared.ids[0], shared.keys[0]);
  source.copy_ids(begin + kRowKeys, shared.ids[1]);
  commit_copies();

  const int64_t warp_row = row0 + threadIdx.x / kWarp * kWarpRows;
  RowQueries<T> query;
  if (!kPositiveById) query.load(shared.queries);
  int64_t own[1][2];
  find_own_ids(problem, first_query + warp_row, own);
  const float scale = problem.inverse_temperature * 1.4426950408889634f;
  RowRunning<T> all, positive;
  all.start();
  positive.start();
  int tile = 0;
  for (int64_t key0 = begin; key0 < end; key0 += kRowKeys, ++tile) {
    wait_for_copies<0>();
    publish_to_products();
    __syncthreads();  // the copy of this tile is complete, and all warps have used the previous tile
    const uint32_t keys = shared_address(shared.keys[tile % 2]);
    if (kPositiveById) query.load(shared.queries);  // no registers are left to keep them
    RowScores score;
    start_scores(query, keys, score);
    if (key0 + kRowKeys < end) {
      copy_swizzled_rows<kThreads>(memory, key0 + kRowKeys, shared.ids[(tile + 1) % 3], shared.keys[(tile + 1) % 2]);
      source.copy_ids(key0 + 2 * kRowKeys, shared.ids[(tile + 2) % 3]);
    }
    commit_copies();
    unsigned members, positives;
    find_row_members<kPositiveById>(problem.same_id, own[0], shared.ids[tile % 3], members, positives);
    wait_for_products();
    pin_registers(score);

    if (__any_sync(kFullWarp, members != ~0u)) keep_members(members, score);
    absorb_tile(all, score, scale, keys);
    if (kPositiveById && __syncthreads_or(positives != 0)) {  // products are of whole warpgroups
      keep_members(positives, score);
      absorb_tile(positive, score, scale, keys);
    }
  }
  wait_for_copies<0>();
  all.finish(out, blockIdx.y, warp_row, chunk_queries, problem.inverse_temperature);
  if (kPositiveById) {
    positive.finish(out, kPositive * static_cast<int64_t>(gridDim.y) + blockIdx.y, warp_row, chunk_queries,
                    problem.inverse_temperature);
  }
#endif
}

// Launches this scan if it can scan these features on this device; *launched says whether it was launched.
template <bool kPositiveById, typename T>
const char* launch_warpgroup_scan(const Problem& problem, const T* queries, const T* memory, int64_t first_query,
                                  int64_t chunk_queries, const Splits& splits, const Partials& out, cudaStream_t stream,
                                  bool* launched) {
  *launched = false;
  if constexpr (sizeof(T) == 2) {
    if (!has_scanned_rows(problem, queries, memory) || !has_warpgroup_products()) return nullptr;
    *launched = true;
    const auto start = [&](auto kernel, auto groups) {
      constexpr int kWarpgroups = decltype(groups)::value;
      const dim3 grid(static_cast<unsigned>(ceil_div(chunk_queries, kWarpgroups * kGroupRows)),
                      static_cast<unsigned>(splits.count));
      return launch<WarpgroupScanShared<T, kWarpgroups>>(kernel, grid, kWarpgroups * kWarpgroup, stream, problem,
                                                         queries, memory, first_query, chunk_queries, splits.tiles,
                                                         out);
    };
    return chunk_queries <= kGroupRows
               ? start(warpgroup_scan_kernel<T, 1, kPositiveById>, std::integral_constant<int, 1>())
               : start(warpgroup_scan_kernel<T, 2, kPositiveById>, std::integral_constant<int, 2>());
  }
  return nullptr;
}

}  // namespace cpr
