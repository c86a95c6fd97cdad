// The running softmax of one group in the scan on tensor cores, and the shapes of that scan. Letters as in mil_nce.cu.
#pragma once

#include "cuda/common/reduce.cuh"
#include "cuda/common/tensor_core.cuh"
#include "cuda/mil_nce/problem.cuh"

namespace cpr {

constexpr int kPieceRows = 16, kPieceColumns = 8;  // the sizes of one product
constexpr int kRowPieces = 2;
constexpr int kScanRows = kRowPieces * kPieceRows;
constexpr int kPad = 8;  // elements: the 16-byte rows of a matrix lie in different banks

template <int kWidth>
struct ScanShape {
  static constexpr int kWarps = 8, kThreads = kWarps * kWarp;
  static constexpr int kKeys = 32;                                      // in a tile: two fit a multiprocessor of sm_80
  static constexpr int kScoreRows = 1;                                  // row pieces that a warp scores
  static constexpr int kRowWarps = kRowPieces / kScoreRows;             // warps that divide the rows of a tile
  static constexpr int kKeyWarps = kWarps / kRowWarps;                  // warps that divide its keys
  static constexpr int kScoreKeys = kKeys / kKeyWarps / kPieceColumns;  // key pieces that a warp scores
  static constexpr int kColumns = kWidth / kWarps;                      // columns of the weighted sum that a warp owns
  static constexpr int kColumnPieces = kColumns / kPieceColumns;
  static_assert(kSumTerms % kKeys == 0, "a split ends on a tile");
};

template <typename T, int kWidth>
struct alignas(16) TensorScanShared {
  using Shape = ScanShape<kWidth>;
  T query[kScanRows][kWidth + kPad];
  T keys[2][Shape::kKeys][kWidth + kPad];
  T weights[2][kScanRows][Shape::kKeys + kPad];  // two terms, whose sum is the weight
  int64_t ids[3][Shape::kKeys];                  // of this tile, the next one and the one that is being copied
  float of_rows[Shape::kKeyWarps][kScanRows];    // the greatest scores of a tile; in finish() the sums
};

// Scales the weights, which lie in 0..1, so that small weights, whose sum over a long memory matters, are not lost
// among the subnormal numbers of float16.
template <typename T>
constexpr float kWeightScale = 1.0f;
template <>
constexpr float kWeightScale<__half> = 32768.0f;
template <typename T>
constexpr float kWeightExponent = 0.0f;  // log2 of the scale
template <>
constexpr float kWeightExponent<__half> = 15.0f;

// The running logsumexp and weighted sum of keys of one group, like Running in scan.cuh, in the layout of the products.
template <typename T, int kWidth>
struct TensorRunning {
  using Shape = ScanShape<kWidth>;
  using Shared = TensorScanShared<T, kWidth>;
  using Scores = float[Shape::kScoreRows][Shape::kScoreKeys][4];
  float maximum[kRowPieces][2];     // of all rows that the lane owns
  float sum[Shape::kScoreRows][2];  // over the keys that this lane scores, until finish()
  float weighted[kRowPieces][Shape::kColumnPieces][4];

  // The first row piece that the warp scores, and the value in `of_all` for its row piece m.
  static __device__ int score_piece() { return threadIdx.x / kWarp % Shape::kRowWarps * Shape::kScoreRows; }
  static __device__ int key_warp() { return threadIdx.x / kWarp / Shape::kRowWarps; }
  static __device__ __forceinline__ float scored(const float (&of_all)[kRowPieces][2], int m, int half) {
    return score_piece() + m == 0 ? of_all[0][half] : of_all[1][half];
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

  // Writes the greatest score of each row in this warp to shared memory, -inf if there is none.
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

  // Reads the greatest maxima of all warps and rescales the sums; returns the references that weights are relative
  // to.
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
        reference[m][half] = greatest == -INFINITY ? 0.0f : greatest;  // no score yet: exp(-inf) instead of exp(NaN)
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

  // Adds the weights of the scores of this warp to the sums, and writes them to shared memory for the products.
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

  // Computes weighted += weights [32, keys] keys [keys, the columns of the warp].
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

  // Writes the result of the split for the rows of the block, from row0 on and below `rows`.
  __device__ __forceinline__ void finish(const Partials& out, int64_t group_split, int64_t row0, int64_t rows,
                                         Shared& shared) {
    const int group_row = threadIdx.x % kWarp / 4;
    __syncthreads();  // all reads of of_rows are complete
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

}  // namespace cpr
