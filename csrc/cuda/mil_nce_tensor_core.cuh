// The scan of the memory for 16-bit features of a fixed width, on tensor cores.
//
// Flash-decoding: a block holds 32 queries and walks its split of the memory in tiles of keys, the next tile copied
// asynchronously while this one is used. Its warps share the scores of a tile by keys, then the weighted sum of keys
// by columns, so every key is read from shared memory twice whatever the width. Sums are float. Weights are split
// into two 16-bit terms: the gradient is a difference of two weighted sums that cancel as the loss falls, and one
// term's rounding (2^-8 of 1 / temperature for bfloat16) would be all that is left of it.
//
// In every product lane l owns rows l/4 and l/4 + 8 of a 16 x 8 piece, columns 2(l%4) and 2(l%4) + 1.
#pragma once

#include <type_traits>

#include "cpr_fast.h"
#include "mil_nce.cuh"
#include "reduce.cuh"
#include "tensor_core.cuh"

namespace cpr {

constexpr int kPieceRows = 16, kPieceColumns = 8;  // of one product
constexpr int kRowPieces = 2;
constexpr int kScanRows = kRowPieces * kPieceRows;
constexpr int kPad = 8;  // elements: the 16-byte rows of a matrix fall in distinct banks

// Wide features: more warps for the columns, fewer keys a tile so that two tiles fit a multiprocessor of sm_80.
template <int kWidth>
struct ScanShape {
  static constexpr int kWarps = kWidth <= 128 ? 4 : 8, kThreads = kWarps * kWarp;
  static constexpr int kKeys = kWidth <= 128 ? 64 : 32;
  static constexpr int kScoreRows = kWidth <= 128 ? 2 : 1;              // row pieces a warp scores
  static constexpr int kRowWarps = kRowPieces / kScoreRows;             // warps that share a tile's rows
  static constexpr int kKeyWarps = kWarps / kRowWarps;                  // warps that share its keys
  static constexpr int kScoreKeys = kKeys / kKeyWarps / kPieceColumns;  // key pieces a warp scores
  static constexpr int kColumns = kWidth / kWarps;                      // columns of the weighted sum a warp owns
  static constexpr int kColumnPieces = kColumns / kPieceColumns;
  static_assert(kSumTerms % kKeys == 0, "a split ends on a tile");
};

template <typename T, int kWidth>
struct alignas(16) TensorScanShared {
  using Shape = ScanShape<kWidth>;
  T query[kScanRows][kWidth + kPad];
  T keys[2][Shape::kKeys][kWidth + kPad];
  T weights[2][kScanRows][Shape::kKeys + kPad];  // the terms whose sum is the weight
  int64_t ids[3][Shape::kKeys];                  // of this tile, the next, and the one being copied
  float of_rows[Shape::kKeyWarps][kScanRows];    // a tile's greatest logits; in the end the sums
};

// Weights lie in 0..1. Scaled so that those worth adding up over a long memory stay clear of float16's least numbers.
template <typename T>
constexpr float kWeightScale = 1.0f;
template <>
constexpr float kWeightScale<__half> = 32768.0f;

// The tile at key0 of the memory: its ids (for the tile after the next), then its rows, zero where no live entry is.
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

// Online logsumexp and weighted sum of keys of one group, as Running in mil_nce.cu, in the layout of the products.
template <typename T, int kWidth>
struct TensorRunning {
  using Shape = ScanShape<kWidth>;
  using Shared = TensorScanShared<T, kWidth>;
  using Scores = float[Shape::kScoreRows][Shape::kScoreKeys][4];
  float maximum[kRowPieces][2];     // of all rows a lane owns
  float sum[Shape::kScoreRows][2];  // over the keys this lane scores, until finish()
  float weighted[kRowPieces][Shape::kColumnPieces][4];

  // The first row piece that the warp scores, and `of_all` for its row piece m.
  static __device__ int score_piece() { return threadIdx.x / kWarp % Shape::kRowWarps * Shape::kScoreRows; }
  static __device__ int key_warp() { return threadIdx.x / kWarp / Shape::kRowWarps; }
  static __device__ __forceinline__ float scored(const float (&of_all)[kRowPieces][2], int m, int half) {
    if constexpr (Shape::kRowWarps == 1) return of_all[m][half];
    return score_piece() == 0 ? of_all[0][half] : of_all[1][half];
  }

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int m = 0; m < kRowPieces; ++m) {
      maximum[m][0] = maximum[m][1] = -INFINITY;
#pragma unroll
      for (int n = 0; n < Shape::kColumnPieces; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) weighted[m][n][e] = 0;
      }
    }
#pragma unroll
    for (int m = 0; m < Shape::kScoreRows; ++m) sum[m][0] = sum[m][1] = 0;
  }

  // The greatest of this warp's scores of each row, for all warps to see; -inf where a row has none.
  __device__ __forceinline__ void offer_maxima(const Scores& score, unsigned members, Shared& shared) const {
#pragma unroll
    for (int m = 0; m < Shape::kScoreRows; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float greatest = -INFINITY;
#pragma unroll
        for (int n = 0; n < Shape::kScoreKeys; ++n) {
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            if (members >> ((m * Shape::kScoreKeys + n) * 4 + e) & 1) greatest = fmaxf(greatest, score[m][n][e]);
          }
        }
        greatest = warp_reduce<4>(greatest, Max());
        const int row = (score_piece() + m) * kPieceRows + half * 8 + threadIdx.x % kWarp / 4;
        if (threadIdx.x % 4 == 0) shared.of_rows[key_warp()][row] = greatest;
      }
    }
  }

  // Moves to the maxima offered, rescaling what is summed; the references that weights are relative to.
  __device__ __forceinline__ void take_maxima(const Shared& shared, float (&reference)[kRowPieces][2]) {
    float rescale[kRowPieces][2];
    bool moved = false;
#pragma unroll
    for (int m = 0; m < kRowPieces; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float greatest = maximum[m][half];
#pragma unroll
        for (int w = 0; w < Shape::kKeyWarps; ++w) {
          greatest = fmaxf(greatest, shared.of_rows[w][m * kPieceRows + half * 8 + threadIdx.x % kWarp / 4]);
        }
        reference[m][half] = greatest == -INFINITY ? 0.0f : greatest;  // nothing yet: exp(-inf), not exp(NaN)
        rescale[m][half] = __expf(maximum[m][half] - reference[m][half]);
        moved |= greatest != maximum[m][half];
        maximum[m][half] = greatest;
      }
    }
    if (!__any_sync(kFullWarp, moved)) return;
#pragma unroll
    for (int m = 0; m < kRowPieces; ++m) {
#pragma unroll
      for (int n = 0; n < Shape::kColumnPieces; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) weighted[m][n][e] *= rescale[m][e / 2];
      }
    }
#pragma unroll
    for (int m = 0; m < Shape::kScoreRows; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) sum[m][half] *= scored(rescale, m, half);
    }
  }

  // Adds the weights of this warp's scores to the sums and leaves them in shared memory for the products.
  __device__ __forceinline__ void weigh(const Scores& score, unsigned members, const float (&reference)[kRowPieces][2],
                                        Shared& shared) {
#pragma unroll
    for (int m = 0; m < Shape::kScoreRows; ++m) {
#pragma unroll
      for (int n = 0; n < Shape::kScoreKeys; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float weight[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const bool member = members >> ((m * Shape::kScoreKeys + n) * 4 + half * 2 + e) & 1;
            weight[e] = member ? __expf(score[m][n][half * 2 + e] - scored(reference, m, half)) : 0.0f;
          }
          sum[m][half] += weight[0] + weight[1];
          const float x = weight[0] * kWeightScale<T>, y = weight[1] * kWeightScale<T>;
          const Pair<T> high(x, y);
          const float2 rounded = high.widened();
          const int row = (score_piece() + m) * kPieceRows + half * 8 + threadIdx.x % kWarp / 4;
          const int key = (key_warp() * Shape::kScoreKeys + n) * kPieceColumns + threadIdx.x % 4 * 2;
          *reinterpret_cast<Pair<T>*>(&shared.weights[0][row][key]) = high;
          *reinterpret_cast<Pair<T>*>(&shared.weights[1][row][key]) = Pair<T>(x - rounded.x, y - rounded.y);
        }
      }
    }
  }

  // weighted += weights [32, keys] keys [keys, the warp's columns].
  __device__ __forceinline__ void add_weighted_keys(const Shared& shared,
                                                    const T (&keys)[Shape::kKeys][kWidth + kPad]) {
    const int lane = threadIdx.x % kWarp, row = lane % 16, offset = lane / 16 * 8;
    const int column0 = threadIdx.x / kWarp * Shape::kColumns;
#pragma unroll
    for (int key = 0; key < Shape::kKeys; key += 16) {
      uint32_t weight[2][kRowPieces][4];
#pragma unroll
      for (int term = 0; term < 2; ++term) {
#pragma unroll
        for (int m = 0; m < kRowPieces; ++m) {
          load_matrices(weight[term][m], &shared.weights[term][m * kPieceRows + row][key + offset]);
        }
      }
#pragma unroll
      for (int n = 0; n < Shape::kColumnPieces; n += 2) {
        uint32_t value[4];
        load_matrices_transposed(value, &keys[key + row][column0 + n * kPieceColumns + offset]);
#pragma unroll
        for (int term = 0; term < 2; ++term) {
#pragma unroll
          for (int m = 0; m < kRowPieces; ++m) {
            multiply_add<T>(weighted[m][n], weight[term][m], value[0], value[1]);
            multiply_add<T>(weighted[m][n + 1], weight[term][m], value[2], value[3]);
          }
        }
      }
    }
  }

  // Writes the split's result for the block's rows from row0 on, below `rows`.
  __device__ __forceinline__ void finish(const Partials& out, int64_t group_split, int64_t row0, int64_t rows,
                                         Shared& shared) {
    const int group_row = threadIdx.x % kWarp / 4;
    __syncthreads();  // whoever read of_rows last is done
#pragma unroll
    for (int m = 0; m < Shape::kScoreRows; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float total = warp_reduce<4>(sum[m][half], Sum());
        const int row = (score_piece() + m) * kPieceRows + half * 8 + group_row;
        if (threadIdx.x % 4 == 0) shared.of_rows[key_warp()][row] = total;
      }
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kRowPieces; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = m * kPieceRows + half * 8 + group_row;
        if (row0 + row >= rows) continue;
        const int64_t at = group_split * kChunk + row0 + row;
        if (threadIdx.x / kWarp == 0 && threadIdx.x % 4 == 0) {
          float total = 0;
          for (int w = 0; w < Shape::kKeyWarps; ++w) total += shared.of_rows[w][row];
          out.maximum[at] = maximum[m][half];
          out.sum[at] = total;
        }
        float* columns = out.weighted + at * kWidth + threadIdx.x / kWarp * Shape::kColumns + threadIdx.x % 4 * 2;
#pragma unroll
        for (int n = 0; n < Shape::kColumnPieces; ++n) {
          columns[n * kPieceColumns] = weighted[m][n][2 * half] * (1 / kWeightScale<T>);
          columns[n * kPieceColumns + 1] = weighted[m][n][2 * half + 1] * (1 / kWeightScale<T>);
        }
      }
    }
  }
};

// score = the warp's share of query [32, width] keys [keys, width]^T.
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

// Blocks that a multiprocessor must be able to hold: bounds the registers of a thread.
template <int kWidth, bool kPositiveById>
constexpr int kScanBlocks = kWidth > 128    ? 1
                            : kPositiveById ? 2
                                            : 3;

// Grid (tiles of 32 queries, S). Feature rows must be 16-byte aligned.
template <typename T, int kWidth, bool kPositiveById>
__global__ void __launch_bounds__(ScanShape<kWidth>::kThreads, kScanBlocks<kWidth, kPositiveById>)
    tensor_scan_kernel(const __grid_constant__ Problem problem, const T* queries, const T* memory, int64_t first_query,
                       int64_t chunk_queries, int64_t tiles, Partials out) {
  using Shape = ScanShape<kWidth>;
  using Group = TensorRunning<T, kWidth>;
  auto& shared = shared_memory<TensorScanShared<T, kWidth>>();
  const int lane = threadIdx.x % kWarp;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * kScanRows;
  const KeyTiles<T, kWidth> source = {memory, problem.memory_ids, problem.K};
  const int64_t begin = blockIdx.y * tiles * kSumTerms;
  const int64_t end = begin + tiles * kSumTerms < problem.K ? begin + tiles * kSumTerms : problem.K;

  constexpr int kVector = 16 / sizeof(T), kVectors = kWidth / kVector;
  for (int at = threadIdx.x; at < kScanRows * kVectors; at += Shape::kThreads) {
    const int64_t row = row0 + at / kVectors;
    const T* from = row < chunk_queries ? queries + (first_query + row) * kWidth + at % kVectors * kVector : queries;
    copy_async<16>(&shared.query[at / kVectors][at % kVectors * kVector], from, row < chunk_queries);
  }
  source.copy_ids(begin, shared.ids[0]);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  source.copy_rows(begin, shared.ids[0], shared.keys[0]);
  source.copy_ids(begin + Shape::kKeys, shared.ids[1]);
  commit_copies();

  int64_t own[Shape::kScoreRows][2];
#pragma unroll
  for (int m = 0; m < Shape::kScoreRows; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = row0 + (Group::score_piece() + m) * kPieceRows + half * 8 + lane / 4;
      own[m][half] = problem.own_id(first_query + row);
    }
  }
  Group all, positive;
  all.start();
  positive.start();
  int tile = 0;
  for (int64_t key0 = begin; key0 < end; key0 += Shape::kKeys, ++tile) {
    wait_for_copies<0>();
    __syncthreads();  // this tile is there for all; the one before has been used by all
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
#pragma unroll
    for (int n = 0; n < Shape::kScoreKeys; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t id = ids[(Group::key_warp() * Shape::kScoreKeys + n) * kPieceColumns + lane % 4 * 2 + e % 2];
#pragma unroll
        for (int m = 0; m < Shape::kScoreRows; ++m) {
          const unsigned bit = 1u << ((m * Shape::kScoreKeys + n) * 4 + e);
          const bool live = id != -1, same = live && id == own[m][e / 2];
          score[m][n][e] *= problem.inverse_temperature;
          if (live && !(same && problem.same_id == CPR_SAME_IGNORE)) members |= bit;
          if (kPositiveById && same) positives |= bit;
        }
      }
    }

    float reference[kRowPieces][2];
    all.offer_maxima(score, members, shared);
    const bool any = __syncthreads_or(kPositiveById && positives != 0);
    all.take_maxima(shared, reference);
    all.weigh(score, members, reference, shared);
    __syncthreads();
    all.add_weighted_keys(shared, keys);
    if (kPositiveById && any) {  // the two barriers here also keep these writes behind the reads above
      positive.offer_maxima(score, positives, shared);
      __syncthreads();
      positive.take_maxima(shared, reference);
      positive.weigh(score, positives, reference, shared);
      __syncthreads();
      positive.add_weighted_keys(shared, keys);
    }
  }
  wait_for_copies<0>();
  all.finish(out, blockIdx.y, row0, chunk_queries, shared);
  if (kPositiveById) {
    positive.finish(out, kPositive * static_cast<int64_t>(gridDim.y) + blockIdx.y, row0, chunk_queries, shared);
  }
}

// Launches the scan on tensor cores where there is one for these features; otherwise leaves *launched false.
template <bool kPositiveById, typename T>
const char* launch_tensor_scan(const Problem& problem, const T* queries, const T* memory, int64_t first_query,
                               int64_t chunk_queries, const Splits& splits, const Partials& out, cudaStream_t stream,
                               bool* launched) {
  *launched = false;
  if constexpr (sizeof(T) == 2) {
    const auto start = [&](auto width) -> const char* {
      constexpr int kWidth = decltype(width)::value;
      using Shared = TensorScanShared<T, kWidth>;
      const auto addresses = reinterpret_cast<uintptr_t>(queries) | reinterpret_cast<uintptr_t>(memory);
      if (problem.D != kWidth || addresses % 16 != 0) return nullptr;
      if (static_cast<int64_t>(sizeof(Shared)) > shared_memory_limit()) return nullptr;
      *launched = true;
      const dim3 grid(static_cast<unsigned>(ceil_div(chunk_queries, kScanRows)), static_cast<unsigned>(splits.count));
      return launch<Shared>(tensor_scan_kernel<T, kWidth, kPositiveById>, grid, ScanShape<kWidth>::kThreads, stream,
                            problem, queries, memory, first_query, chunk_queries, splits.tiles, out);
    };
    const char* error = start(std::integral_constant<int, 128>());
    return *launched ? error : start(std::integral_constant<int, 512>());
  }
  return nullptr;
}

}  // namespace cpr
