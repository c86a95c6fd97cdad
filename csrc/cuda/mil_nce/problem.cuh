// What the scans of the memory and the finish of mil_nce agree on: what a slot means to a query, how the memory is cut,
// and where a scan leaves its results. Letters as in mil_nce.cu.
#pragma once

#include "cuda/common/launch.cuh"
#include "cuda/common/tile.cuh"

namespace cpr {

constexpr int64_t kMaxSplits = 128;
constexpr int64_t kChunk = 256;  // queries whose partial results the workspace holds
constexpr int kGroups = 2;       // what is summed: everything in the denominator, and positives by id
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

  // What slot k means to a query of id `own`, explicit positives aside.
  __device__ bool live(int64_t k) const { return k < K && (memory_ids == nullptr || memory_ids[k] != -1); }
  __device__ bool same(int64_t own, int64_t k) const { return own != -1 && memory_ids[k] == own; }
  __device__ int64_t own_id(int64_t b) const { return query_ids != nullptr && b < B ? query_ids[b] : -1; }
};

// How the memory is cut: split s covers tiles of kSumTerms keys s * tiles .. (s + 1) * tiles - 1.
struct Splits {
  int64_t count, tiles;
  explicit Splits(int64_t K) {
    const int64_t all = ceil_div(K, kSumTerms);
    tiles = ceil_div(all, all < kMaxSplits ? all : kMaxSplits);
    count = ceil_div(all, tiles);
  }
};

// An explicit positive in the finish: what it still adds to, and its score, later its gradient coefficient.
struct Named {
  float value;
  int membership;
};

// The workspace, for a chunk of queries.
struct Partials {
  float* maximum;   // [groups, S, kChunk]
  float* sum;       // [groups, S, kChunk]
  float* weighted;  // [groups, S, kChunk, D]
  Named* named;     // [kChunk, P]
};

}  // namespace cpr
