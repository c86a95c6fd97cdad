// What becomes of the entries that a thread has the scores of in a tile of the streamed route: the stages decide about
// sets of entries, of which each has a bit. Letters as in cascade_select.cu.
#pragma once

#include "cuda/cascade_select/plan.cuh"
#include "cuda/cascade_select/tensor_score.cuh"

namespace cpr {
namespace {

constexpr int kKeysPerThread = kTensorKeyPieces * 2;
template <typename Tile>
constexpr int kQueriesPerThread = Tile::kQueryPieces * 2;
template <typename Tile>
constexpr int kEntriesPerThread = kQueriesPerThread<Tile> * kKeysPerThread;
static_assert(kKeysPerThread == 8 && kMaxSiftedStages == 8 && kMaxSiftedViews == 2);

constexpr uint32_t kOfEachQuery = 0x01010101;

// The entries of a thread in a tile: query i of it, l/4 + 8i of its warp, and key 2n + j of it, 8n + 2(l%4) + j of its
// warp, is entry 8i + 2n + j. A set of entries has a bit for each. Returns the score of entry e, a constant.
template <typename Tile>
__device__ __forceinline__ float& score_at(typename Tile::Scores& score, int e) {
  return score[e / 16][e % 8 / 2][e / 8 % 2 * 2 + e % 2];
}

// The first stage that an entry may fail to pass, and whether it drops out there for certain. Bit b of the stage of
// entry e is bit e of stage[b].
struct Fates {
  static constexpr int kBits = 3;
  uint32_t stage[kBits] = {};
  uint32_t fallen = 0, dropped = 0;  // entries that have such a stage; those that drop out there

  // Returns all entries or none, as bit b of s is.
  static __device__ __forceinline__ uint32_t spread(int s, int b) { return 0u - (static_cast<uint32_t>(s) >> b & 1); }

  // Returns the entries whose stage is s.
  __device__ __forceinline__ uint32_t at(int s) const {
    uint32_t equal = fallen;
#pragma unroll
    for (int b = 0; b < kBits; ++b) equal &= ~(stage[b] ^ spread(s, b));
    return equal;
  }

  // Returns the stage of one entry.
  __device__ __forceinline__ unsigned of(int entry) const {
    return (stage[0] >> entry & 1) | (stage[1] >> entry & 1) << 1 | (stage[2] >> entry & 1) << 2;
  }

  // Takes the entries through stage s, which comes after all before it: `passes` pass for certain; of the others,
  // `drops` drop out for certain.
  __device__ __forceinline__ void go_through(int s, uint32_t passes, uint32_t drops) {
    const uint32_t fail = ~passes & ~fallen;
#pragma unroll
    for (int b = 0; b < kBits; ++b) stage[b] |= spread(s, b) & fail;
    dropped |= fail & drops;
    fallen |= fail;
  }

  // Takes the fate of each entry in `other` where its stage there is earlier. The two have no stage in common.
  __device__ __forceinline__ void merge(const Fates& other) {
    uint32_t earlier = 0, equal = ~0u;
#pragma unroll
    for (int b = kBits - 1; b >= 0; --b) {
      earlier |= equal & stage[b] & ~other.stage[b];
      equal &= ~(stage[b] ^ other.stage[b]);
    }
    earlier = other.fallen & (earlier | ~fallen);
#pragma unroll
    for (int b = 0; b < kBits; ++b) stage[b] = (stage[b] & ~earlier) | (other.stage[b] & earlier);
    dropped = (dropped & ~earlier) | (other.dropped & earlier);
    fallen |= other.fallen;
  }

  // Lets `entries` fall at the first stage, where they do not drop out.
  __device__ __forceinline__ void start_over(uint32_t entries) {
#pragma unroll
    for (int b = 0; b < kBits; ++b) stage[b] &= ~entries;
    dropped &= ~entries;
    fallen |= entries;
  }
};
static_assert(kMaxSiftedStages == 1 << Fates::kBits);

// Returns `bits` moved up by one, below them the sign of x, which is a number and not -0.
__device__ __forceinline__ uint32_t append_sign(uint32_t bits, float x) {
  return __funnelshift_l(__float_as_uint(x), bits, 1);
}

// Exact scores are compared as they are, with limits that are widened by their errors.
template <typename Tile>
struct ExactLimits {
  using Scores = typename Tile::Scores;
  float2 of_stage[kMaxSiftedStages][Tile::kQueries];  // lower and upper limit of the thresholds

  __device__ __forceinline__ void set(int s, int row, const Sieve& sieve, int) {
    of_stage[s][row] = {sieve.low[s], sieve.high[s]};
  }

  __device__ __forceinline__ void clear(int s, int row) { of_stage[s][row] = {0, 0}; }

  // Takes the entries through stage s. The scores of query i are off by at most reach[i]; they are finite and not -0,
  // so that no difference is -0.
  __device__ __forceinline__ void decide(int s, Scores& score, const float (&reach)[kQueriesPerThread<Tile>],
                                         Fates& fates) const {
    const int row = Tile::first_query() + threadIdx.x % kWarp / 4;
    uint32_t drops = 0, passes = 0;
#pragma unroll
    for (int i = kQueriesPerThread<Tile> - 1; i >= 0; --i) {
      const float2 limits = of_stage[s][row + i * 8];
      const float drop_below = limits.x - reach[i], pass_above = limits.y + reach[i];  // the latter not -0
#pragma unroll
      for (int key = kKeysPerThread - 1; key >= 0; --key) {
        const float x = score_at<Tile>(score, i * 8 + key);
        drops = append_sign(drops, x - drop_below);
        passes = append_sign(passes, pass_above - x);
      }
    }
    fates.go_through(s, passes, drops);
  }
};

// Returns the bits of the greatest bfloat16 number that is at most x.
__device__ __forceinline__ uint32_t round_down(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits >> 16) + (bits >> 31 != 0 && (bits & 0xffff) != 0 ? 1 : 0);
}

// Scores of products rounded to bfloat16 are compared in pairs of bfloat16, which takes half of the instructions. They
// are rounded to nearest, and limits outwards, so that what is certain of the rounded ones is certain of the scores. A
// center is subtracted before, about the limit of the first stage of the view: of scores that are all alike, bfloat16
// would hold little more than what they have in common.
template <typename Tile>
struct PairedLimits {
  // Of key k, the scores of queries 2m and 2m + 1 of a thread.
  using Scores = uint32_t[kKeysPerThread][Tile::kQueryPieces];
  static constexpr uint32_t kOnes = 0x3f803f80, kSign = 0x8000;
  static constexpr int kPairs = Tile::kQueries / 2;  // of queries 16m + r and 16m + r + 8
  // Of the thresholds, the lower limit with the other sign and the upper limit.
  alignas(8) uint16_t of_stage[kMaxSiftedStages][kPairs][2][2];
  float center[kMaxSiftedViews][Tile::kQueries];

  __device__ __forceinline__ void set(int s, int row, const Sieve& sieve, int u) {
    uint16_t (&limits)[2][2] = of_stage[s][row / 16 * 8 + row % 8];
    uint32_t below = round_down(sieve.low[s] - sieve.center[u]);
    if ((below & ~kSign) == 0) below = kSign + 1;  // the greatest number below 0: differences with it are not -0
    limits[0][row / 8 % 2] = static_cast<uint16_t>(below ^ kSign);
    limits[1][row / 8 % 2] = static_cast<uint16_t>(round_down(sieve.center[u] - sieve.high[s]) ^ kSign);
    if (s < kMaxSiftedViews) center[s][row] = sieve.center[s];
  }

  __device__ __forceinline__ void clear(int s, int row) {
    for (int limit = 0; limit < 2; ++limit) of_stage[s][row / 16 * 8 + row % 8][limit][row / 8 % 2] = 0;
    if (s < kMaxSiftedViews) center[s][row] = 0;
  }

  // Rounds the scores in view u. Returns the entries whose score is a number.
  __device__ __forceinline__ uint32_t round(int u, typename Tile::Scores& score, Scores& rounded) const {
    const int row = Tile::first_query() + threadIdx.x % kWarp / 4;
    float middle[kQueriesPerThread<Tile>];
#pragma unroll
    for (int i = 0; i < kQueriesPerThread<Tile>; ++i) middle[i] = center[u][row + i * 8];
    uint32_t zero = 0;  // NaN after an infinity or a NaN
#pragma unroll
    for (int key = 0; key < kKeysPerThread; ++key) {
#pragma unroll
      for (int m = 0; m < Tile::kQueryPieces; ++m) {
        const float (&own)[4] = score[m][key / 2];
        const float first = own[key % 2] - middle[2 * m], second = own[2 + key % 2] - middle[2 * m + 1];
        rounded[key][m] = Pair<__nv_bfloat16>(first, second).bits();
        zero = multiply_add_pair(rounded[key][m], 0, zero);
      }
    }
    uint32_t numbers = ~0u;
    if ((zero & 0x7fff7fff) == 0) return numbers;
#pragma unroll
    for (int e = 0; e < kEntriesPerThread<Tile>; ++e) {
      if (isnan(score_at<Tile>(score, e))) numbers &= ~(1u << e);
    }
    return numbers;
  }

  // Returns the signs of the differences of the queries of this thread, each in all bits of a byte. A NaN has none.
  static __device__ __forceinline__ uint32_t signs(const uint32_t (&difference)[Tile::kQueryPieces]) {
    return signs_of_pairs(difference[0], Tile::kQueryPieces > 1 ? difference[Tile::kQueryPieces - 1] : 0);
  }

  // Takes the entries through stage s.
  __device__ __forceinline__ void decide(int s, const Scores& score, const float (&)[kQueriesPerThread<Tile>],
                                         Fates& fates) const {
    static_assert(Tile::kQueryPieces <= 2);
    const int pair = Tile::first_query() / 2 + threadIdx.x % kWarp / 4;
    uint32_t drops = 0, passes = 0;
    uint2 limits[Tile::kQueryPieces];
#pragma unroll
    for (int m = 0; m < Tile::kQueryPieces; ++m) {
      limits[m] = *reinterpret_cast<const uint2*>(of_stage[s][pair + m * 8]);
    }
#pragma unroll
    for (int key = 0; key < kKeysPerThread; ++key) {
      uint32_t below[Tile::kQueryPieces], above[Tile::kQueryPieces];
#pragma unroll
      for (int m = 0; m < Tile::kQueryPieces; ++m) {
        below[m] = multiply_add_pair(score[key][m], kOnes, limits[m].x);
        above[m] = multiply_add_pair(score[key][m], kOnes ^ 0x80008000, limits[m].y);
      }
      drops |= signs(below) & kOfEachQuery << key;
      passes |= signs(above) & kOfEachQuery << key;
    }
    fates.go_through(s, passes, drops);
  }
};

// Returns the number of `entries` of each query of this thread: of query i in byte i.
__device__ __forceinline__ uint32_t count_by_query(uint32_t entries) {
  entries -= entries >> 1 & 0x55555555;
  entries = (entries & 0x33333333) + (entries >> 2 & 0x33333333);
  return (entries + (entries >> 4)) & 0x0f0f0f0f;
}

// Numbers of entries of the queries of a tile, at most 2^16 - 1 of each.
template <typename Tile>
struct QueryCounts {
  static constexpr int kGroups = 16;  // of queries r + 8i, of the warps with the same queries
  unsigned of_two[2][kGroups];        // those of i = p and of i = p + 2

  __device__ __forceinline__ void add(uint32_t entries) {
    if (entries == 0) return;
    const uint32_t counts = count_by_query(entries);
    const int group = Tile::first_query() * 2 / Tile::kQueries * 8 + threadIdx.x % kWarp / 4;
    atomicAdd(&of_two[0][group], counts & 0x00ff00ff);
    atomicAdd(&of_two[1][group], counts >> 8 & 0x00ff00ff);
  }

  __device__ __forceinline__ unsigned of(int row) const {
    constexpr int kHalf = Tile::kQueries / 2;
    const int i = row % kHalf / 8;
    return of_two[i % 2][row / kHalf * 8 + row % 8] >> i / 2 * 16 & 0xffff;
  }
};

}  // namespace
}  // namespace cpr
