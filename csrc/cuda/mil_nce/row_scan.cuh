// The scan of the memory for 16-bit features of width 128 on tensor cores, as FlashAttention-2: a warp owns 16 queries
// and goes through all keys of a tile with them.
//
// The queries, the scores and the weights of a warp stay in its registers: the registers that hold a product of scores
// are those in which the next product takes its weights. Shared memory holds keys only, which every warp reads twice,
// and warps wait for each other once per tile. A row is computed in the same order whatever rows are beside it.
// Layout of products and the two terms of a weight: as in tensor_scan.cuh.
#pragma once

#include <string.h>

#include "cuda/common/reduce.cuh"
#include "cuda/common/tensor_core.cuh"
#include "cuda/mil_nce/problem.cuh"
#include "cuda/mil_nce/tensor_scan.cuh"

namespace cpr {

constexpr int kRowWidth = 128;  // features
constexpr int kRowKeys = 64;    // in a tile
constexpr int kWarpRows = 16;   // queries of a warp
constexpr int kKeyPieces = kRowKeys / kPieceColumns, kWidthPieces = kRowWidth / kPieceColumns;
static_assert(kSumTerms % kRowKeys == 0, "a split ends on a tile");

template <typename T>
struct alignas(16) RowScanShared {
  T keys[2][kRowKeys][kRowWidth + kPad];
  int64_t ids[3][kRowKeys];  // of this tile, the next one and the one that is being copied
};

// Returns 2^x; results below the normal numbers are 0.
__device__ __forceinline__ float power_of_two(float x) {
#ifdef __CUDACC__
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
#else
  return exp2f(x);
#endif
}

template <typename T>
__device__ __forceinline__ uint32_t bits_of(const Pair<T>& pair) {
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// Scores of 16 queries and a tile of keys: [n][e] is a piece of a product, so bit 4 n + e of a mask belongs to it.
using RowScores = float[kKeyPieces][4];
static_assert(kKeyPieces * 4 == 32, "a mask of the scores of a lane has 32 bits");
// Weights of 16 queries and 16 keys, as a factor of a product: two terms, whose sum is the weight.
using RowWeights = uint32_t[2][4];

// Copies tiles of the memory to shared memory: ids two tiles ahead, then the rows, zero for slots without an entry.
template <typename T, int kThreads>
struct RowTiles {
  const T* memory;
  const int64_t* ids;
  int64_t K;

  __device__ __forceinline__ void copy_ids(int64_t key0, int64_t (&out)[kRowKeys]) const {
    if (threadIdx.x >= kRowKeys) return;
    const int64_t key = key0 + threadIdx.x;
    if (ids != nullptr && key < K) {
      copy_async<sizeof(int64_t)>(&out[threadIdx.x], ids + key, true);
    } else {
      out[threadIdx.x] = key < K ? 0 : -1;
    }
  }

  __device__ __forceinline__ void copy_rows(int64_t key0, const int64_t (&tile_ids)[kRowKeys],
                                            T (&out)[kRowKeys][kRowWidth + kPad]) const {
    constexpr int kVector = 16 / sizeof(T), kVectors = kRowWidth / kVector;
    const int row0 = threadIdx.x / kVectors, column = threadIdx.x % kVectors * kVector;
    const T* from = memory + (key0 + row0) * kRowWidth + column;
#pragma unroll
    for (int row = 0; row < kRowKeys; row += kThreads / kVectors) {
      const bool live = tile_ids[row0 + row] != -1;
      copy_async<16>(&out[row0 + row][column], live ? from + row * kRowWidth : memory, live);
    }
  }
};

// The queries of a warp as factors of the products, of 16 features each.
template <typename T>
struct RowQueries {
  uint32_t factor[kRowWidth / 16][4];

  // Reads them from shared memory [rows of the block][width].
  template <int kRows>
  __device__ __forceinline__ void load(const T (&queries)[kRows][kRowWidth + kPad]) {
    const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp * kWarpRows + lane % 16;
#pragma unroll
    for (int step = 0; step < kRowWidth / 16; ++step) {
      load_matrices(factor[step], &queries[row][step * 16 + lane / 16 * 8]);
    }
  }

  __device__ __forceinline__ void score(const T (&keys)[kRowKeys][kRowWidth + kPad], RowScores& out) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int n = 0; n < kKeyPieces; ++n) {
      out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0;
#pragma unroll
      for (int d = 0; d < kRowWidth; d += 32) {
        uint32_t key[4];
        load_matrices(key, &keys[n * kPieceColumns + lane % 8][d + lane / 8 * 8]);
        multiply_add<T>(out[n], factor[d / 16], key[0], key[1]);
        multiply_add<T>(out[n], factor[d / 16 + 1], key[2], key[3]);
      }
    }
  }
};

// The running logsumexp and weighted sum of keys of one group, like Running in scan.cuh. Maxima are of the products,
// before they are divided by the temperature.
template <typename T>
struct RowRunning {
  float maximum[2];                 // of rows l/4 and l/4 + 8 of the warp
  float sum[2];                     // times kWeightScale, over the keys of this lane until finish()
  float weighted[kWidthPieces][4];  // times kWeightScale

  __device__ __forceinline__ void start() {
    maximum[0] = maximum[1] = -INFINITY;
    sum[0] = sum[1] = 0;
#pragma unroll
    for (int n = 0; n < kWidthPieces; ++n) weighted[n][0] = weighted[n][1] = weighted[n][2] = weighted[n][3] = 0;
  }

  // Adds a tile. Scores of -inf do not count. scale: log2(e) / temperature.
  __device__ __forceinline__ void absorb(const RowScores& score, float scale,
                                         const T (&keys)[kRowKeys][kRowWidth + kPad]) {
    float exponent[2];
    move_maxima(score, scale, exponent);
    const int lane = threadIdx.x % kWarp, row = lane % 16, offset = lane / 16 * 8;
#pragma unroll
    for (int key = 0; key < kRowKeys; key += 16) {
      RowWeights weight;
      weigh(score, key, scale, exponent, weight);
#pragma unroll
      for (int n = 0; n < kWidthPieces; n += 2) {
        uint32_t value[4];
        load_matrices_transposed(value, &keys[key + row][n * kPieceColumns + offset]);
#pragma unroll
        for (int term = 0; term < 2; ++term) {
          multiply_add<T>(weighted[n], weight[term], value[0], value[1]);
          multiply_add<T>(weighted[n + 1], weight[term], value[2], value[3]);
        }
      }
    }
  }

  // Computes the weights of the keys from `key` on, 2^(score * scale + exponent), and adds them to the sums.
  __device__ __forceinline__ void weigh(const RowScores& score, int key, float scale, const float (&exponent)[2],
                                        RowWeights& weight) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {
      const int n = key / kPieceColumns + part / 2, half = part % 2;
      const float x = power_of_two(__fmaf_rn(score[n][2 * half], scale, exponent[half]));
      const float y = power_of_two(__fmaf_rn(score[n][2 * half + 1], scale, exponent[half]));
      sum[half] += x + y;
      const Pair<T> high(x, y);
      const float2 rounded = high.widened();
      weight[0][part] = bits_of(high);
      weight[1][part] = bits_of(Pair<T>(x - rounded.x, y - rounded.y));
    }
  }

  // Raises the maxima to those of the tile and rescales the sums.
  __device__ __forceinline__ void move_maxima(const RowScores& score, float scale, float (&exponent)[2]) {
    float rescale[2];
    bool moved = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float greatest = maximum[half];
#pragma unroll
      for (int n = 0; n < kKeyPieces; ++n) {
        greatest = fmaxf(greatest, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
      }
      greatest = warp_reduce<4>(greatest, Max());
      const float reference = greatest == -INFINITY ? 0.0f : greatest;  // no score yet: 2^-inf instead of 2^NaN
      exponent[half] = __fmaf_rn(-reference, scale, kWeightExponent<T>);
      rescale[half] = power_of_two((maximum[half] - reference) * scale);
      moved |= greatest != maximum[half];
      maximum[half] = greatest;
    }
    if (!__any_sync(kFullWarp, moved)) return;
    sum[0] *= rescale[0], sum[1] *= rescale[1];
#pragma unroll
    for (int n = 0; n < kWidthPieces; ++n) {
      weighted[n][0] *= rescale[0], weighted[n][1] *= rescale[0];
      weighted[n][2] *= rescale[1], weighted[n][3] *= rescale[1];
    }
  }

  // Writes the result of the split for the rows of the warp, from row0 on and below `rows`.
  __device__ __forceinline__ void finish(const Partials& out, int64_t group_split, int64_t row0, int64_t rows,
                                         float inverse_temperature) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = warp_reduce<4>(sum[half], Sum());
      const int64_t row = row0 + half * 8 + lane / 4, at = group_split * kChunk + row;
      if (row >= rows) continue;
      if (lane % 4 == 0) {
        out.maximum[at] = maximum[half] * inverse_temperature;
        out.sum[at] = total * (1 / kWeightScale<T>);
      }
      float* columns = out.weighted + at * kRowWidth + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kWidthPieces; ++n) {
        *reinterpret_cast<float2*>(columns + n * kPieceColumns) = {weighted[n][2 * half] * (1 / kWeightScale<T>),
                                                                   weighted[n][2 * half + 1] * (1 / kWeightScale<T>)};
      }
    }
  }
};

// Finds which scores of a lane count in the denominator, and which are positives by id. `own`: the ids of its rows.
template <bool kPositiveById>
__device__ __forceinline__ void find_row_members(int same_id, const int64_t (&own)[2], const int64_t (&ids)[kRowKeys],
                                                 unsigned& members, unsigned& positives) {
  // Nearly no key is empty or has the id of a query: 32 bits of the ids show that, and leave nothing more to do.
  bool doubtful = false;
#pragma unroll
  for (int n = 0; n < kKeyPieces; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const auto id = static_cast<int>(ids[n * kPieceColumns + threadIdx.x % 4 * 2 + e]);
      doubtful |= id == -1 || id == static_cast<int>(own[0]) || id == static_cast<int>(own[1]);
    }
  }
  members = ~0u, positives = 0;
  if (!__any_sync(kFullWarp, doubtful)) return;
#pragma unroll
  for (int n = 0; n < kKeyPieces; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t id = ids[n * kPieceColumns + threadIdx.x % 4 * 2 + e % 2];
      const unsigned bit = 1u << (4 * n + e);
      const bool live = id != -1, same = live && id == own[e / 2];
      if (!live || (same && same_id == CPR_SAME_IGNORE)) members &= ~bit;
      if (kPositiveById && same) positives |= bit;
    }
  }
}

// Replaces the scores outside of a mask by -inf.
__device__ __forceinline__ void keep_members(unsigned members, RowScores& score) {
#pragma unroll
  for (int n = 0; n < kKeyPieces; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) score[n][e] = members >> (4 * n + e) & 1 ? score[n][e] : -INFINITY;
  }
}

// Grid: (tiles of 16 kWarps queries, S). Feature rows must be 16-byte aligned.
template <typename T, int kWarps, bool kPositiveById>
__global__ void __launch_bounds__(kWarps* kWarp, 8 / kWarps)
    row_scan_kernel(const __grid_constant__ Problem problem, const T* queries, const T* memory, int64_t first_query,
                    int64_t chunk_queries, int64_t tiles, Partials out) {
  auto& shared = shared_memory<RowScanShared<T>>();
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kWarps * kWarpRows;
  const RowTiles<T, kWarps * kWarp> source = {memory, problem.memory_ids, problem.K};
  const int64_t begin = blockIdx.y * tiles * kSumTerms;
  const int64_t end = begin + tiles * kSumTerms < problem.K ? begin + tiles * kSumTerms : problem.K;

  copy_queries<kWarps * kWarpRows, kWarps * kWarp>(queries, first_query, row0, chunk_queries, shared.keys[1]);
  source.copy_ids(begin, shared.ids[0]);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  source.copy_rows(begin, shared.ids[0], shared.keys[0]);
  source.copy_ids(begin + kRowKeys, shared.ids[1]);
  commit_copies();

  const int64_t warp_row = row0 + threadIdx.x / kWarp * kWarpRows;
  RowQueries<T> query;
  query.load(shared.keys[1]);
  int64_t own[1][2];
  find_own_ids(problem, first_query + warp_row, own);
  const float scale = problem.inverse_temperature * 1.4426950408889634f;
  RowRunning<T> all, positive;
  all.start();
  positive.start();
  int tile = 0;
  for (int64_t key0 = begin; key0 < end; key0 += kRowKeys, ++tile) {
    wait_for_copies<0>();
    __syncthreads();  // the copy of this tile is complete, and all warps have used the previous tile or their queries
    const auto& keys = shared.keys[tile % 2];
    if (key0 + kRowKeys < end) {
      source.copy_rows(key0 + kRowKeys, shared.ids[(tile + 1) % 3], shared.keys[(tile + 1) % 2]);
      source.copy_ids(key0 + 2 * kRowKeys, shared.ids[(tile + 2) % 3]);
    }
    commit_copies();

    RowScores score;
    query.score(keys, score);
    unsigned members, positives;
    find_row_members<kPositiveById>(problem.same_id, own[0], shared.ids[tile % 3], members, positives);
    if (__any_sync(kFullWarp, members != ~0u)) keep_members(members, score);
    all.absorb(score, scale, keys);
    if (kPositiveById && __any_sync(kFullWarp, positives != 0)) {
      keep_members(positives, score);
      positive.absorb(score, scale, keys);
    }
  }
  wait_for_copies<0>();
  all.finish(out, blockIdx.y, warp_row, chunk_queries, problem.inverse_temperature);
  if (kPositiveById) {
    positive.finish(out, kPositive * static_cast<int64_t>(gridDim.y) + blockIdx.y, warp_row, chunk_queries,
                    problem.inverse_temperature);
  }
}

// Returns whether the rows have the width of this scan and are aligned to the vectors that it copies.
template <typename T>
bool has_scanned_rows(const Problem& problem, const T* queries, const T* memory) {
  const auto addresses = reinterpret_cast<uintptr_t>(queries) | reinterpret_cast<uintptr_t>(memory);
  return problem.D == kRowWidth && addresses % 16 == 0;
}

// Launches this scan if it can scan these features; *launched says whether it was launched.
template <bool kPositiveById, typename T>
const char* launch_row_scan(const Problem& problem, const T* queries, const T* memory, int64_t first_query,
                            int64_t chunk_queries, const Splits& splits, const Partials& out, cudaStream_t stream,
                            bool* launched) {
  *launched = false;
  if constexpr (sizeof(T) == 2) {
    if (!has_scanned_rows(problem, queries, memory)) return nullptr;
    *launched = true;
    const auto start = [&](auto kernel, int warps) {
      const dim3 grid(static_cast<unsigned>(ceil_div(chunk_queries, warps * kWarpRows)),
                      static_cast<unsigned>(splits.count));
      return launch<RowScanShared<T>>(kernel, grid, warps * kWarp, stream, problem, queries, memory, first_query,
                                      chunk_queries, splits.tiles, out);
    };
    return chunk_queries <= 2 * kWarpRows ? start(row_scan_kernel<T, 2, kPositiveById>, 2)
                                          : start(row_scan_kernel<T, 4, kPositiveById>, 4);
  }
  return nullptr;
}

}  // namespace cpr
