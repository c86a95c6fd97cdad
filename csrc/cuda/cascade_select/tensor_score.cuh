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

#include <type_traits>

#include "cuda/cascade_select/score_panels.cuh"

namespace cpr {

constexpr int kMaxBoundedWidth = 4096;
constexpr float kGreatestSquare = 0x1p60f;  // the greatest squared norm for which nothing overflows

// Whether a row with this squared norm is outside the range of the bound; true for infinity and NaN.
__device__ __forceinline__ bool unbounded(float square) { return !(square <= kGreatestSquare); }

// The greatest difference of a score from the canonical one is relative_error * norm_bound of the query * norm_bound of
// the key. The small constant covers underflow.
__host__ __device__ __forceinline__ float relative_error(int64_t D, bool split) {
  return (split ? 0x1.9p-15f : 0.0f) + 4.1f * 0x1p-23f * static_cast<float>(D);
}

__device__ __forceinline__ float norm_bound(float square) { return 1.01f * sqrtf(square) + 0x1p-34f; }

// Returns the bound on the errors of the scores of a query with keys of at most this squared norm, in all threads of
// the block. A query outside the range of the bound has canonical scores, hence bound 0. scratch as in block_reduce.
template <int kThreads, typename T>
__device__ __forceinline__ float query_bound(const T* query, int64_t D, unsigned key_square, float* scratch) {
  float square = 0;
  for (int64_t d = threadIdx.x; d < D; d += kThreads) square += widen(query[d]) * widen(query[d]);
  square = block_reduce<kThreads>(square, Sum(), scratch);
  const float relative = relative_error(D, !kCopiedWhole<T>);
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

// Adds the products of a panel, or of the terms from it on, to the scores of the warp; with two terms all products but
// low * low.
template <typename Tile, typename T, int kTerms>
__device__ __forceinline__ void add_products(const TensorScoreShared<Tile, T, kTerms>& shared, int panel,
                                             typename Tile::Scores& score) {
  using E = typename Multiplied<T>::Type;
  const int lane = threadIdx.x % kWarp, query0 = Tile::first_query(), key0 = Tile::first_key();
#pragma unroll
  for (int column = 0; column < kScoreDepth; column += 16) {
    uint32_t query[kTerms][Tile::kQueryPieces][4];
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
#pragma unroll
      for (int m = 0; m < Tile::kQueryPieces; ++m) {
        load_matrices(query[term][m],
                      &shared.queries[panel + term][query0 + m * 16 + lane % 16][column + lane / 16 * 8]);
      }
    }
#pragma unroll
    for (int n = 0; n < kTensorKeyPieces; n += 2) {  // two pieces in one load
#pragma unroll
      for (int key_term = 0; key_term < kTerms; ++key_term) {
        uint32_t key[4];
        const int row = key0 + n * 8 + lane / 16 * 8 + lane % 8;
        load_matrices(key, &shared.keys[panel + key_term][row][column + lane / 8 % 2 * 8]);
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

// Adds the scores of a tile of float features. With kSquares, leaves the squared norms of the rows in `shared`, before
// a barrier.
template <bool kSquares, typename Tile, int kTerms, typename Keys>
__device__ __forceinline__ void add_scores(const Matrix<float>& queries, int64_t b0, const Keys& keys, int64_t k0,
                                           TensorScoreShared<Tile, float, kTerms>& shared,
                                           typename Tile::Scores& score) {
  TermPanel<Matrix<float>, kTerms, Tile::kQueries, Tile::kThreads, kSquares> query_panel(queries, b0);
  TermPanel<Keys, kTerms, Tile::kKeys, Tile::kThreads, kSquares> key_panel(keys, k0);
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
    add_products(shared, 0, score);
  }
  if (!kSquares) return;
  query_panel.store_squares(shared.query_square);
  key_panel.store_squares(shared.key_square);
}

// The same for 16-bit features. kWhole: both matrices have whole panels.
template <bool kSquares, bool kWhole, typename Tile, typename T, typename Keys>
__device__ __forceinline__ void add_copied_scores(const Matrix<T>& queries, int64_t b0, const Keys& keys, int64_t k0,
                                                  TensorScoreShared<Tile, T, 1>& shared, typename Tile::Scores& score) {
  CopiedTerms<T, Matrix<T>, Tile::kQueries, Tile::kThreads, kSquares, kWhole> query_panel(queries, b0);
  CopiedTerms<T, Keys, Tile::kKeys, Tile::kThreads, kSquares, kWhole> key_panel(keys, k0);
  int left = static_cast<int>((static_cast<uint32_t>(queries.D) + kScoreDepth - 1) / kScoreDepth);  // panels
  const auto copy = [&](auto panel) {
    constexpr int kPanel = decltype(panel)::value;
    query_panel.template copy<kPanel>(shared.queries[kPanel % 2]);
    key_panel.template copy<kPanel>(shared.keys[kPanel % 2]);
    commit_copies();
  };
  // Multiplies panel `place` of two, and copies the one after it if there is one.
  const auto multiply = [&](auto place) {
    constexpr int kPlace = decltype(place)::value;
    wait_for_copies<0>();
    if (kSquares) {
      query_panel.add_squares(shared.queries[kPlace]);
      key_panel.add_squares(shared.keys[kPlace]);
    }
    __syncthreads();  // this panel is complete, and the previous one has been read
    if (left > kPlace + 1) copy(std::integral_constant<int, kPlace + 1>());
    add_products(shared, kPlace, score);
  };
  __syncthreads();  // what was in the place of the features has been read
  copy(std::integral_constant<int, 0>());
  for (; left > 0; left -= 2) {
    multiply(std::integral_constant<int, 0>());
    if (left == 1) break;
    multiply(std::integral_constant<int, 1>());
    query_panel.advance(2);
    key_panel.advance(2);
  }
  if (!kSquares) return;
  query_panel.store_squares(shared.query_square);
  key_panel.store_squares(shared.key_square);
}

// Computes the scores of a tile, of queries from b0 on and keys from k0 on. Lane l holds the queries l/4 + 8i and the
// keys 8n + 2(l%4) + j of its warp at score[i/2][n][2(i%2) + j]. With kSquares, the squared norms of the rows are left
// in `shared`.
template <bool kSquares, typename Tile, int kTerms, typename T, typename Keys>
__device__ __forceinline__ void score_tile(const Matrix<T>& queries, int64_t b0, const Keys& keys, int64_t k0,
                                           TensorScoreShared<Tile, T, kTerms>& shared, typename Tile::Scores& score) {
#pragma unroll
  for (int m = 0; m < Tile::kQueryPieces; ++m) {
#pragma unroll
    for (int n = 0; n < kTensorKeyPieces; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) score[m][n][e] = 0;
    }
  }
  if constexpr (kCopiedWhole<T>) {
    if (has_whole_panels(queries) && has_whole_panels(keys)) {
      add_copied_scores<kSquares, true>(queries, b0, keys, k0, shared, score);
    } else {
      add_copied_scores<kSquares, false>(queries, b0, keys, k0, shared, score);
    }
  } else {
    add_scores<kSquares>(queries, b0, keys, k0, shared, score);
  }
  if (kSquares) __syncthreads();
}

}  // namespace cpr
