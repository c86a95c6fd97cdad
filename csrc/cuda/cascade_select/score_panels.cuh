// The tiles that tensor cores compute scores of, and the panels of features in shared memory that they read: 16-bit
// terms of float features, or 16-bit features as they are.
#pragma once

#include "cuda/common/tensor_core.cuh"
#include "cuda/common/tile.cuh"

namespace cpr {

constexpr int kScoreDepth = 32;                // of a step
constexpr int kScoreStride = kScoreDepth + 8;  // padded: the 16-byte rows of a matrix lie in different banks
constexpr int kTensorKeyPieces = 4;            // of eight keys

// A tile of scores. Each warp of the block has half of the queries, in pieces of 16, and 32 keys.
template <int kQueriesOfTile, int kThreadsOfTile>
struct ScoreTile {
  static constexpr int kQueries = kQueriesOfTile, kThreads = kThreadsOfTile, kQueryPieces = kQueries / 32;
  static constexpr int kKeys = kThreads / 2;
  static_assert(kQueries % 32 == 0 && kThreads % (2 * kWarp) == 0 && kTensorKeyPieces * 8 == kWarp);
  using Scores = float[kQueryPieces][kTensorKeyPieces][4];

  // Return the first query and the first key of this warp.
  static __device__ __forceinline__ int first_query() { return threadIdx.x / kWarp % 2 * (kQueries / 2); }
  static __device__ __forceinline__ int first_key() { return threadIdx.x / kWarp / 2 * kWarp; }
};
using LargeTile = ScoreTile<64, 256>;
using TileOfFew = ScoreTile<32, 256>;  // for at most 32 queries: half of a large tile would be empty
constexpr int kScoreQueries = LargeTile::kQueries, kScoreKeys = LargeTile::kKeys;
static_assert(TileOfFew::kKeys == kScoreKeys);

// The type that the tensor cores multiply: bfloat16 for float features.
template <typename T>
struct Multiplied {
  using Type = T;
};
template <>
struct Multiplied<float> {
  using Type = __nv_bfloat16;
};

// Whether tensor cores multiply the features as they are, so that they can be copied.
template <typename T>
constexpr bool kCopiedWhole = sizeof(T) == 2;

// The terms of a feature: float features have two where scores must be precise.
template <typename T, bool kPrecise>
constexpr int kTermsOf = kPrecise && !kCopiedWhole<T> ? 2 : 1;

// The features of a tile. Float features have a panel for each of their terms; 16-bit features have two in turn, one
// that is multiplied and one that is copied.
template <typename Tile, typename T, int kTerms>
struct alignas(16) TensorScoreShared {
  using E = typename Multiplied<T>::Type;
  static constexpr int kPanels = kCopiedWhole<T> ? 2 : kTerms;
  E queries[kPanels][Tile::kQueries][kScoreStride];
  E keys[kPanels][Tile::kKeys][kScoreStride];
  float query_square[Tile::kQueries], key_square[Tile::kKeys];  // squared norms
};

// Copies panels of rows of float features to shared memory in kTerms terms, and with kSquares sums the squares of each
// row. Rows of aligned vectors in whole panels are read through pointers that are moved from panel to panel: one for
// rows that follow each other, otherwise one for each row of this thread. Rows: Matrix<float>, or with the same
// members.
template <typename Rows, int kTerms, int kRows, int kThreads, bool kSquares>
struct TermPanel {
  using E = Multiplied<float>::Type;
  using Values = Panel<kRows, kScoreDepth, kThreads>;
  static constexpr int kRowStep = kThreads / Values::kVectorsPerRow;  // between the rows of a thread
  static constexpr int kPointers = Rows::kConsecutive ? 1 : Values::kVectors;
  const Rows& matrix;
  int64_t row0;
  const Packed4<float>* next[kPointers];  // of the rows of this thread
  int64_t step;                           // vectors between its rows, if they follow each other
  unsigned live;                          // a bit for each of its rows that is read
  bool whole;
  Values panel;
  float square[Values::kVectors] = {};

  __device__ __forceinline__ TermPanel(const Rows& matrix, int64_t row0)
      : matrix(matrix),
        row0(row0),
        step(kRowStep * (matrix.D / 4)),
        live(0),
        whole(matrix.aligned && matrix.D % kScoreDepth == 0) {
    const int64_t row = row0 + threadIdx.x / Values::kVectorsPerRow;
#pragma unroll
    for (int i = 0; i < kPointers; ++i) {
      const int64_t own = row + i * kRowStep;
      const int64_t start = own < matrix.rows ? matrix.at(own) + threadIdx.x % Values::kVectorsPerRow * 4 : 0;
      next[i] = reinterpret_cast<const Packed4<float>*>(matrix.data + start);
    }
#pragma unroll
    for (int v = 0; v < Values::kVectors; ++v) {
      if (matrix.holds(row + v * kRowStep)) live |= 1u << v;
    }
  }

  // Reads the panel that starts at column d0; they are read in order.
  __device__ __forceinline__ void load(int64_t d0) {
    if (!whole) {
      panel.load(matrix, row0, d0);
      return;
    }
#pragma unroll
    for (int v = 0; v < Values::kVectors; ++v) {
      panel.values[v] = make_float4(0, 0, 0, 0);
      if ((live >> v & 1) != 0) panel.values[v] = widen4(kPointers == 1 ? next[0][v * step] : *next[v % kPointers]);
    }
#pragma unroll
    for (int i = 0; i < kPointers; ++i) next[i] += kScoreDepth / 4;
  }

  __device__ __forceinline__ void store(E (*out)[kRows][kScoreStride]) {
#pragma unroll
    for (int v = 0; v < Values::kVectors; ++v) {
      const int at = threadIdx.x + v * kThreads;
      const int row = at / Values::kVectorsPerRow, column = at % Values::kVectorsPerRow * 4;
      const float4 x = panel.values[v];
      if (kSquares) square[v] += (x.x * x.x + x.y * x.y) + (x.z * x.z + x.w * x.w);
      const Pair<E> low_half(x.x, x.y), high_half(x.z, x.w);
      *reinterpret_cast<Pair<E>*>(&out[0][row][column]) = low_half;
      *reinterpret_cast<Pair<E>*>(&out[0][row][column + 2]) = high_half;
      if constexpr (kTerms == 2) {
        const float2 a = low_half.widened(), b = high_half.widened();
        *reinterpret_cast<Pair<E>*>(&out[1][row][column]) = Pair<E>(x.x - a.x, x.y - a.y);
        *reinterpret_cast<Pair<E>*>(&out[1][row][column + 2]) = Pair<E>(x.z - b.x, x.w - b.y);
      }
    }
  }

  // Returns the squared norms of the rows, after all panels have been stored.
  __device__ __forceinline__ void store_squares(float (&out)[kRows]) const {
#pragma unroll
    for (int v = 0; v < Values::kVectors; ++v) {
      const float total = warp_reduce<Values::kVectorsPerRow>(square[v], Sum());
      const int at = threadIdx.x + v * kThreads;
      if (at % Values::kVectorsPerRow == 0) out[at / Values::kVectorsPerRow] = total;
    }
  }
};

// Whether all panels of the rows are whole vectors of 16 bytes.
template <typename Rows>
__device__ __forceinline__ bool has_whole_panels(const Rows& matrix) {
  return matrix.D % kScoreDepth == 0 && reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0;
}

// Copies panels of rows of 16-bit features to shared memory, in the order of their columns, and with kSquares sums the
// squares of each row; zeros for rows without content and behind the last column. Aligned rows are copied
// asynchronously, with kWhole in vectors of 16 bytes, otherwise of 8. Rows: Matrix<T>, or with the same members.
template <typename T, typename Rows, int kRows, int kThreads, bool kSquares, bool kWhole>
struct CopiedTerms {
  static constexpr int kVectorFeatures = 16 / sizeof(T), kRowVectors = kScoreDepth / kVectorFeatures;
  static constexpr int kRowStep = kThreads / kRowVectors;  // between the rows of a thread
  static constexpr int kVectors = (kRows + kRowStep - 1) / kRowStep;
  const T* next[kVectors];  // of the rows of this thread
  bool live[kVectors];      // whether they are read
  int left;                 // columns from the next vector of this thread on
  bool aligned;
  float square[kVectors] = {};

  static __device__ __forceinline__ int first_row() { return threadIdx.x / kRowVectors; }
  static __device__ __forceinline__ int column() { return threadIdx.x % kRowVectors * kVectorFeatures; }
  static __device__ __forceinline__ bool within(int v) { return first_row() + v * kRowStep < kRows; }

  __device__ __forceinline__ CopiedTerms(const Rows& matrix, int64_t row0)
      : left(static_cast<int>(matrix.D) - column()), aligned(matrix.aligned) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t row = row0 + first_row() + v * kRowStep;
      const uint32_t slot = row < matrix.rows ? static_cast<uint32_t>(matrix.slot(row)) : 0;
      next[v] = matrix.data + (static_cast<uint64_t>(slot) * static_cast<uint32_t>(matrix.D) + column());
      live[v] = within(v) && matrix.holds(row);
    }
  }

  // Starts to copy panel kAhead from the next on, and completes the copy of rows that are not aligned.
  template <int kAhead>
  __device__ __forceinline__ void copy(T (&to)[kRows][kScoreStride]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!within(v)) continue;
      const T* from = next[v] + kAhead * kScoreDepth;
      T* place = &to[first_row() + v * kRowStep][column()];
      if constexpr (kWhole) {
        copy_async<16>(place, from, live[v]);
      } else {
        copy_part(place, from, live[v], left - kAhead * kScoreDepth);
      }
    }
  }

  __device__ __forceinline__ void advance(int panels) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) next[v] += panels * kScoreDepth;
    left -= panels * kScoreDepth;
  }

  // Copies a vector that ends `columns` columns before the end of the row, or behind it.
  __device__ __forceinline__ void copy_part(T* place, const T* from, bool holds, int columns) const {
    if (aligned) {
#pragma unroll
      for (int d = 0; d < kVectorFeatures; d += 4) {
        const bool valid = holds && d < columns;
        copy_async<8>(place + d, valid ? from + d : next[0] - column(), valid);
      }
      return;
    }
#pragma unroll 1
    for (int d = 0; d < kVectorFeatures; ++d) place[d] = holds && d < columns ? from[d] : T();
  }

  // Adds the squares of the features that this thread has copied: the copy must be complete.
  __device__ __forceinline__ void add_squares(const T (&panel)[kRows][kScoreStride]) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (!within(v)) continue;
      const auto* copied = reinterpret_cast<const Packed4<T>*>(&panel[first_row() + v * kRowStep][column()]);
#pragma unroll
      for (int half = 0; half < kVectorFeatures / 4; ++half) {
        const float4 x = widen4(copied[half]);
        square[v] += (x.x * x.x + x.y * x.y) + (x.z * x.z + x.w * x.w);
      }
    }
  }

  // Returns the squared norms of the rows, after all panels have been added.
  __device__ __forceinline__ void store_squares(float (&out)[kRows]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float total = warp_reduce<kRowVectors>(square[v], Sum());
      if (within(v) && threadIdx.x % kRowVectors == 0) out[first_row() + v * kRowStep] = total;
    }
  }
};

}  // namespace cpr
