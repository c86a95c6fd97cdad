// Shared by the scans and the finish of mil_nce: which slots are in the sums of a query, the splits of the memory, and
// the layout of the results of a scan. Letters as in mil_nce.cu.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/common/tile.cuh"

namespace cpr {

constexpr int64_t kMaxSplits = 128;
constexpr int64_t kChunk = 256;  // queries whose partial results fit the workspace
constexpr int kGroups = 2;       // the two sums: all of the denominator, and the positives by id
constexpr int kAll = 0, kPositive = 1;
constexpr int kThreadKeys = kSumTerms / kTileLanes;  // keys per thread of a tile of kSumTerms

struct Problem {
  const int64_t* positives;
  const int64_t* query_ids;
  const int64_t* memory_ids;
  const int64_t* self_mode;
  int64_t B, K, D, P;
  int same_id, self_positive;
  float inverse_temperature;

  // Whether slot k holds an entry, and whether its id is `own`. Explicit positives are not considered.
  __device__ bool live(int64_t k) const { return k < K && (memory_ids == nullptr || memory_ids[k] != -1); }
  __device__ bool same(int64_t own, int64_t k) const { return own != -1 && memory_ids[k] == own; }
  __device__ int64_t own_id(int64_t b) const { return query_ids != nullptr && b < B ? query_ids[b] : -1; }
};

// The splits of the memory: split s consists of tiles s * tiles .. (s + 1) * tiles - 1 of kSumTerms keys each.
struct Splits {
  int64_t count, tiles;
  explicit Splits(int64_t K) {
    const int64_t all = ceil_div(K, kSumTerms);
    tiles = ceil_div(all, all < kMaxSplits ? all : kMaxSplits);
    count = ceil_div(all, tiles);
  }
};

// An explicit positive in the finish: the sums that it must still be added to, and its score, which is later replaced
// by its coefficient in the gradient.
struct Named {
  float value;
  int membership;
};

// The workspace of a chunk of queries.
struct Partials {
  float* maximum;   // [groups, S, kChunk]
  float* sum;       // [groups, S, kChunk]
  float* weighted;  // [groups, S, kChunk, D]
  Named* named;     // [kChunk, P]
};

}  // namespace cpr
