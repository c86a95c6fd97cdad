// Scores of queries against the memory on tensor cores, with a bound on their difference from the canonical scores.
//
// float32 features are split into two bfloat16 terms and a remainder, x = h + l + r. A score is the sum of
// hh' + hl' + lh'. With P = sum_d |q_d k_d| <= |q| |k|, the unit roundoff 2^-8 of bfloat16 and D features, the error is
// at most
//   3.1 * 2^-16 P      from the split (ll' and the two products with r are left out), plus
//   3.5 D * 2^-23 P    from the float sums of the products: 3 D / 16 sums of 17 terms, each term truncated to 24 bits,
// and the canonical chain itself rounds by at most 1.05 D * 2^-24 P. Products of 16-bit features are exact and take one
// term. `relative_error` and `norm_bound` round all of this up. Where norms are outside the range of the bound, scores
// are canonical.
#pragma once

#include "cuda/common/tensor_core.cuh"
#include "cuda/common/tile.cuh"

namespace cpr {

constexpr int kScoreDepth = 32;                // of a step
constexpr int kScoreStride = kScoreDepth + 8;  // padded: the 16-byte rows of a matrix lie in different banks
constexpr int kMaxBoundedWidth = 4096;
constexpr float kGreatestSquare = 0x1p60f;  // the greatest squared norm for which nothing overflows

constexpr int kTensorKeyPieces = 4;  // of eight keys

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

// Whether a row with this squared norm is outside the range of the bound; true for infinity and NaN.
__device__ __forceinline__ bool unbounded(float square) { return !(square <= kGreatestSquare); }

// The greatest difference of a score from the canonical one is relative_error * norm_bound of the query * norm_bound of
// the key. The small constant covers underflow.
__host__ __device__ __forceinline__ float relative_error(int64_t D, bool split) {
  return (split ? 0x1p-14f : 0.0f) + 5 * 0x1p-23f * static_cast<float>(D);
}

__device__ __forceinline__ float norm_bound(float square) { return 1.01f * sqrtf(square) + 0x1p-34f; }

// Returns the bound on the errors of the scores of a query with keys of at most this squared norm, in all threads of
// the block. A query outside the range of the bound has canonical scores, hence bound 0. scratch as in block_reduce.
template <int kThreads, typename T>
__device__ __forceinline__ float query_bound(const T* query, int64_t D, unsigned key_square, float* scratch) {
  float square = 0;
  for (int64_t d = threadIdx.x; d < D; d += kThreads) square += widen(query[d]) * widen(query[d]);
  square = block_reduce<kThreads>(square, Sum(), scratch);
  const float relative = relative_error(D, sizeof(T) > 2);
  // Tiles sum the same squares in another order: a norm at the limit may be within the range there.
  const bool everywhere_canonical = !(square <= 2 * kGreatestSquare);
  return everywhere_canonical ? 0.0f : relative * norm_bound(square) * norm_bound(__uint_as_float(key_square));
}

// Computes a canonical score in one thread. Both rows must have content.
template <typename Q, typename T>
__device__ __forceinline__ float canonical_score(const Matrix<Q>& queries, int64_t b, const Matrix<T>& keys,
                                                 int64_t k) {
  float score = 0;
  const auto add = [&](const float4& x, const float4& y) {
    score = __fmaf_rn(x.x, y.x, score);
    score = __fmaf_rn(x.y, y.y, score);
    score = __fmaf_rn(x.z, y.z, score);
    score = __fmaf_rn(x.w, y.w, score);
  };
  if (queries.aligned && keys.aligned) {
    const auto* x = reinterpret_cast<const Packed4<Q>*>(queries.data + queries.at(b));
    const auto* y = reinterpret_cast<const Packed4<T>*>(keys.data + keys.at(k));
    const int vectors = static_cast<int>(keys.D / 4);
#pragma unroll 4
    for (int i = 0; i < vectors; ++i) add(widen4(x[i]), widen4(y[i]));
  } else {
    for (int64_t d = 0; d < keys.D; d += 4) add(queries.load4(b, d), keys.load4(k, d));
  }
  return score + 0.0f;  // -0 + 0 is +0: equal scores get equal bits
}

template <typename Tile, typename E, int kTerms>
struct alignas(16) TensorScoreShared {
  E queries[kTerms][Tile::kQueries][kScoreStride];
  E keys[kTerms][Tile::kKeys][kScoreStride];
  float query_square[Tile::kQueries], key_square[Tile::kKeys];  // squared norms
};

// Copies panels of rows to shared memory in 16-bit terms, and with kSquares sums the squares of each row. Rows of
// aligned vectors in whole panels are read through pointers that are moved from panel to panel: one for rows that
// follow each other, otherwise one for each row of this thread. Rows: Matrix<T>, or with the same members.
template <typename T, typename Rows, typename E, int kTerms, int kRows, int kThreads, bool kSquares>
struct TermPanel {
  using Values = Panel<kRows, kScoreDepth, kThreads>;
  static constexpr int kRowStep = kThreads / Values::kVectorsPerRow;  // between the rows of a thread
  static constexpr int kPointers = Rows::kConsecutive ? 1 : Values::kVectors;
  const Rows& matrix;
  int64_t row0;
  const Packed4<T>* next[kPointers];  // of the rows of this thread
  int64_t step;                       // vectors between its rows, if they follow each other
  unsigned live;                      // a bit for each of its rows that is read
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
      next[i] = reinterpret_cast<const Packed4<T>*>(matrix.data + start);
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

  __device__ __forceinline__ void store(E (&out)[kTerms][kRows][kScoreStride]) {
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

// Adds the products of one panel to the scores of the warp; with two terms all products but low * low.
template <typename Tile, typename E, int kTerms>
__device__ __forceinline__ void add_products(const TensorScoreShared<Tile, E, kTerms>& shared,
                                             typename Tile::Scores& score) {
  const int lane = threadIdx.x % kWarp, query0 = Tile::first_query(), key0 = Tile::first_key();
#pragma unroll
  for (int column = 0; column < kScoreDepth; column += 16) {
    uint32_t query[kTerms][Tile::kQueryPieces][4];
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
#pragma unroll
      for (int m = 0; m < Tile::kQueryPieces; ++m) {
        load_matrices(query[term][m], &shared.queries[term][query0 + m * 16 + lane % 16][column + lane / 16 * 8]);
      }
    }
#pragma unroll
    for (int n = 0; n < kTensorKeyPieces; n += 2) {  // two pieces in one load
#pragma unroll
      for (int key_term = 0; key_term < kTerms; ++key_term) {
        uint32_t key[4];
        load_matrices(key, &shared.keys[key_term][key0 + n * 8 + lane / 16 * 8 + lane % 8][column + lane / 8 % 2 * 8]);
#pragma unroll
        for (int query_term = 0; query_term < kTerms - key_term; ++query_term) {
#pragma unroll
          for (int m = 0; m < Tile::kQueryPieces; ++m) {
            multiply_add<E>(score[m][n], query[query_term][m], key[0], key[1]);
            multiply_add<E>(score[m][n + 1], query[query_term][m], key[2], key[3]);
          }
        }
      }
    }
  }
}

// Computes the scores of a tile, of queries from b0 on and keys from k0 on. Lane l holds the queries l/4 + 8i and the
// keys 8n + 2(l%4) + j of its warp at score[i/2][n][2(i%2) + j]. With kSquares, the squared norms of the rows are left
// in `shared`.
template <bool kSquares, typename Tile, typename E, int kTerms, typename T, typename Keys>
__device__ __forceinline__ void score_tile(const Matrix<T>& queries, int64_t b0, const Keys& keys, int64_t k0,
                                           TensorScoreShared<Tile, E, kTerms>& shared, typename Tile::Scores& score) {
  TermPanel<T, Matrix<T>, E, kTerms, Tile::kQueries, Tile::kThreads, kSquares> query_panel(queries, b0);
  TermPanel<T, Keys, E, kTerms, Tile::kKeys, Tile::kThreads, kSquares> key_panel(keys, k0);
#pragma unroll
  for (int m = 0; m < Tile::kQueryPieces; ++m) {
#pragma unroll
    for (int n = 0; n < kTensorKeyPieces; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) score[m][n][e] = 0;
    }
  }
  query_panel.load(0);
  key_panel.load(0);
  for (int64_t d0 = 0; d0 < queries.D; d0 += kScoreDepth) {
    __syncthreads();  // the previous panel has been read
    query_panel.store(shared.queries);
    key_panel.store(shared.keys);
    __syncthreads();
    if (d0 + kScoreDepth < queries.D) {  // load the next panel while this one is used
      query_panel.load(d0 + kScoreDepth);
      key_panel.load(d0 + kScoreDepth);
    }
    add_products(shared, score);
  }
  if (!kSquares) return;
  query_panel.store_squares(shared.query_square);
  key_panel.store_squares(shared.key_square);
  __syncthreads();
}

}  // namespace cpr
