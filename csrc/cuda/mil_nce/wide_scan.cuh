// The scan of the memory in float32 for many queries. The units of sm_90 multiply-add twice as fast as those of sm_80,
// and shared memory serves both at the same rate: a thread has to use each word it reads four times, as it does with
// 8 x 8 scores and with the weighted sum of 8 rows in 8 columns.
//
// A block computes the scores of 64 queries and 128 keys, and adds the keys in two halves of kSumTerms. These are the
// tiles of scan.cuh, and every row is computed by the same operations in the same order, so both scans have the same
// bits. Letters as in mil_nce.cu.
#pragma once

#include "cuda/common/copied_tile.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/tile.cuh"
#include "cuda/mil_nce/problem.cuh"
#include "cuda/mil_nce/scan.cuh"

namespace cpr {
namespace {

constexpr int kWideThreadRows = 8, kWideRows = kTileRows * kWideThreadRows;   // 64 queries
constexpr int kWideThreadKeys = 8, kWideKeys = kTileLanes * kWideThreadKeys;  // 128 keys
static_assert(kWideKeys == 2 * kSumTerms, "a tile is two tiles of scan.cuh");

// A panel of either kind; shared memory holds the one in use and the one that is being copied.
union WidePanel {
  struct {
    float queries[kWideRows][kCopiedStride], keys[kWideKeys][kCopiedStride];
  } features;     // of all rows of a tile: kCopiedDepth columns
  RowPanel rows;  // kSumPanel keys: kSumColumns columns
};

struct alignas(16) WideScanShared {
  WidePanel panels[2];
  float weights[kWideRows][kWeightStride];
  int64_t ids[2][kWideKeys];  // of this tile and the next one
  int64_t own[kWideRows];     // ids of the queries
};

// Copies what a block reads to shared memory, and zeros for what does not exist.
struct WideCopier {
  const float *queries, *memory;  // queries: from the first one of the block
  const int64_t* ids;
  int64_t query_count, K, D, column0;

  // Features d .. d + kCopiedDepth - 1 of the queries and of the keys from key0 on.
  __device__ __forceinline__ void copy_features(int64_t key0, int64_t d, WidePanel& to) const {
    copy_columns<kWideRows>(queries, query_count, d, to.features.queries);
    copy_columns<kWideKeys>(memory + key0 * D, K - key0, d, to.features.keys);
  }

  template <int kRows>
  __device__ __forceinline__ void copy_columns(const float* rows, int64_t count, int64_t d,
                                               float (*to)[kCopiedStride]) const {
    constexpr int kRowVectors = kCopiedDepth / 4, kStep = kTileThreads / kRowVectors;
    const int first = threadIdx.x / kRowVectors, column = threadIdx.x % kRowVectors * 4;
    const int present = static_cast<int>(count < kRows ? count : kRows);
    const float* from = rows + first * D + d + column;
#pragma unroll
    for (int row = 0; row < kRows; row += kStep) {
      const bool live = first + row < present;
      copy_async<16>(&to[first + row][column], live ? from + row * D : rows, live);
    }
  }

  // The columns of the block of kSumPanel keys from key0 + first on; zeros for keys without an entry.
  __device__ __forceinline__ void copy_rows(int64_t key0, int first, const int64_t (&tile_ids)[kWideKeys],
                                            WidePanel& to) const {
    constexpr int kRowVectors = kSumColumns / 4, kStep = kTileThreads / kRowVectors;
    const int row0 = threadIdx.x / kRowVectors, column = threadIdx.x % kRowVectors * 4;
    const float* from = memory + (key0 + first + row0) * D + column0 + column;
#pragma unroll
    for (int row = 0; row < kSumPanel; row += kStep) {
      const bool live = tile_ids[first + row0 + row] != -1 && column0 + column < D;
      copy_async<16>(&to.rows[row0 + row][column], live ? from + row * D : memory, live);
    }
  }

  // The ids of the keys from key0 on: -1 without an entry, 0 for all others if the memory has no ids.
  __device__ __forceinline__ void copy_ids(int64_t key0, int64_t (&to)[kWideKeys]) const {
    static_assert(kWideKeys == kTileThreads);
    const int64_t key = key0 + threadIdx.x;
    if (ids != nullptr && key < K) {
      copy_async<sizeof(int64_t)>(&to[threadIdx.x], ids + key, true);
    } else {
      to[threadIdx.x] = key < K ? 0 : -1;
    }
  }
};

using WideScores = float[kWideThreadRows][kWideThreadKeys];

// Divides the scores by the temperature; those that do not count become -inf. own: ids of the queries of the block, or
// null if none is ignored.
__device__ __forceinline__ void scale_members(float inverse_temperature, const int64_t* own,
                                              const int64_t (&ids)[kWideKeys], WideScores& score) {
  const int lane = threadIdx.x % kTileLanes, row = threadIdx.x / kTileLanes;
#pragma unroll
  for (int j = 0; j < kWideThreadKeys; ++j) {
    const int64_t id = ids[lane + j * kTileLanes];
#pragma unroll
    for (int i = 0; i < kWideThreadRows; ++i) {
      const bool ignored = own != nullptr && own[row + i * kTileRows] == id;
      score[i][j] = id != -1 && !ignored ? score[i][j] * inverse_temperature : -INFINITY;
    }
  }
}

// Adds half of the scores of a tile and its keys, from score `first` of each row of a thread on. panel: the one that is
// used next. start_next(key, to): starts the copy of the panel after the present one, to which the rows from `key` of
// the tile on belong.
template <typename StartNext>
__device__ __forceinline__ void add_half(const WideScores& score, int first, Running<kWideThreadRows>& all,
                                         WideScanShared& shared, int& panel, StartNext start_next) {
  all.absorb(score, first, shared.weights);
#pragma unroll 1  // unrolled, it takes more registers than there are
  for (int term0 = 0; term0 < kSumTerms; term0 += kSumPanel) {
    wait_for_copies<0>();
    __syncthreads();  // this panel is complete, the weights are written, and the panel before has been read
    start_next(first / kThreadKeys * kSumTerms + term0 + kSumPanel, shared.panels[panel ^ 1]);
    commit_copies();
    add_panel(shared.weights, term0, shared.panels[panel].rows, all.weighted);
    panel ^= 1;
  }
}

// Grid: (tiles of 64 queries, S, groups of 128 columns). Each group of columns computes the scores again. D must be a
// multiple of kCopiedDepth, and feature rows 16-byte aligned. Without positives by id.
__global__ void __launch_bounds__(kTileThreads, 2)
    wide_scan_kernel(const __grid_constant__ Problem problem, const float* queries, const float* memory,
                     int64_t first_query, int64_t chunk_queries, int64_t tiles, Partials out) {
  auto& shared = shared_memory<WideScanShared>();
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kWideRows;
  const int64_t column0 = static_cast<int64_t>(blockIdx.z) * kSumColumns, D = problem.D;
  const int64_t begin = blockIdx.y * tiles * kSumTerms;
  const int64_t end = begin + tiles * kSumTerms < problem.K ? begin + tiles * kSumTerms : problem.K;
  const WideCopier copier = {
      queries + (first_query + row0) * D, memory, problem.memory_ids, chunk_queries - row0, problem.K, D, column0};
  const bool ignores = problem.query_ids != nullptr && problem.same_id == CPR_SAME_IGNORE;
  if (threadIdx.x < kWideRows) shared.own[threadIdx.x] = problem.own_id(first_query + row0 + threadIdx.x);

  Running<kWideThreadRows> all;
  all.start();
  copier.copy_ids(begin, shared.ids[0]);
  copier.copy_features(begin, 0, shared.panels[0]);
  commit_copies();
  int panel = 0, tile = 0;
  for (int64_t key0 = begin; key0 < end; key0 += kWideKeys, ++tile) {
    auto& ids = shared.ids[tile % 2];
    WideScores score = {};
    for (int64_t d = 0; d < D; d += kCopiedDepth) {
      wait_for_copies<0>();
      __syncthreads();  // this panel is complete, and the one before has been read
      if (d + kCopiedDepth < D) {
        copier.copy_features(key0, d + kCopiedDepth, shared.panels[panel ^ 1]);
      } else {
        copier.copy_rows(key0, 0, ids, shared.panels[panel ^ 1]);
      }
      commit_copies();
      add_dots<kCopiedDepth>(shared.panels[panel].features.queries, shared.panels[panel].features.keys, score);
      panel ^= 1;
    }
    scale_members(problem.inverse_temperature, ignores ? shared.own : nullptr, ids, score);
    const int terms = key0 + kSumTerms < end ? kWideKeys : kSumTerms;  // of this split
    const auto start_next = [&](int first, WidePanel& to) {
      if (first == kSumPanel) copier.copy_ids(key0 + kWideKeys, shared.ids[(tile + 1) % 2]);
      if (first < terms) {
        copier.copy_rows(key0, first, ids, to);
      } else if (key0 + kWideKeys < end) {
        copier.copy_features(key0 + kWideKeys, 0, to);
      }
    };
    add_half(score, 0, all, shared, panel, start_next);
    if (terms == kWideKeys) {
      __syncthreads();  // the weights of the first half have been read
      add_half(score, kThreadKeys, all, shared, panel, start_next);
    }
  }
  wait_for_copies<0>();
  all.finish(out, blockIdx.y, row0, chunk_queries, column0, D);
}

// Whether larger tiles keep the busiest multiprocessor at most about as long as those of scan.cuh on sm_80, where both
// take the same time for the same work: there are fewer of them, and a split may end within one.
inline bool wide_tiles_pay(int64_t queries, const Splits& splits) {
  const int64_t processors = device_attribute(cudaDevAttrMultiProcessorCount, 1);
  const int64_t wide = ceil_div(ceil_div(queries, kWideRows) * splits.count, processors);
  const int64_t small = ceil_div(ceil_div(queries, kSumRows) * splits.count, processors);
  return 8 * wide * (kWideRows / kSumRows) * round_up(splits.tiles, kWideKeys / kSumTerms) <= 9 * small * splits.tiles;
}

// Launches this scan if it can scan these features and pays; *launched says whether it was launched.
template <bool kPositiveById, typename T>
const char* launch_wide_scan(const Problem& problem, const T* queries, const T* memory, int64_t first_query,
                             int64_t chunk_queries, const Splits& splits, const Partials& out, cudaStream_t stream,
                             bool* launched) {
  *launched = false;
  if constexpr (sizeof(T) == 4 && !kPositiveById) {
    const auto addresses = reinterpret_cast<uintptr_t>(queries) | reinterpret_cast<uintptr_t>(memory);
    if (problem.D % kCopiedDepth != 0 || addresses % 16 != 0) return nullptr;
    if (2 * static_cast<int64_t>(sizeof(WideScanShared)) > shared_memory_limit()) return nullptr;  // two blocks
    if (!wide_tiles_pay(chunk_queries, splits)) return nullptr;
    *launched = true;
    const dim3 grid(static_cast<unsigned>(ceil_div(chunk_queries, kWideRows)), static_cast<unsigned>(splits.count),
                    static_cast<unsigned>(ceil_div(problem.D, kSumColumns)));
    return launch<WideScanShared>(wide_scan_kernel, grid, kTileThreads, stream, problem, queries, memory, first_query,
                                  chunk_queries, splits.tiles, out);
  }
  return nullptr;
}

}  // namespace
}  // namespace cpr
