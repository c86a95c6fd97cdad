// Finds the key of a given rank in a row of integer keys, without sorting it.
#pragma once

#include "cpu/common/lanes.h"

namespace cpr::CPR_VARIANT {
namespace {

constexpr int kSample = 32;    // keys that are sampled to bracket the threshold
constexpr int kDirect = 48;    // up to this many keys are ranked without a sample
constexpr int kMaxRounds = 8;  // brackets before the fallback to bisection

// Finds the keys of descending ranks `upper` <= `lower` among n keys in N vectors padded with kNoKey.
template <int N>
void ranked_vectors(const int32_t* padded, int n, int upper, int lower, int32_t* upper_key, int32_t* lower_key) {
  Key16 lanes[N], rank[N];  // rank: the number of greater keys; equal keys have equal ranks
  for (int v = 0; v < N; ++v) {
    lanes[v] = load(padded + v * 16);
    rank[v] = broadcast(0);
  }
  for (int i = 0; i < n; ++i) {
    const Key16 key = broadcast(padded[i]);
    for (int v = 0; v < N; ++v) rank[v] = add_greater(rank[v], key, lanes[v]);
  }
  Key16 at_upper = broadcast(INT32_MAX), at_lower = at_upper;
  for (int v = 0; v < N; ++v) {
    at_upper = min(at_upper, select(greater(rank[v], broadcast(upper)), broadcast(INT32_MAX), lanes[v]));
    at_lower = min(at_lower, select(greater(rank[v], broadcast(lower)), broadcast(INT32_MAX), lanes[v]));
  }
  *upper_key = least(at_upper);
  *lower_key = least(at_lower);
}

// Finds the key of descending `rank` among n <= kDirect keys.
int32_t ranked(const int32_t* keys, int n, int rank) {
  alignas(64) int32_t padded[kDirect];
  for (int i = 0; i < kDirect; i += 16) {
    store(padded + i, i < n ? select(first_lanes(n - i), load(keys + i), broadcast(kNoKey)) : broadcast(kNoKey));
  }
  int32_t key, same;
  if (n <= 16) {
    ranked_vectors<1>(padded, n, rank, rank, &key, &same);
  } else if (n <= 32) {
    ranked_vectors<2>(padded, n, rank, rank, &key, &same);
  } else {
    ranked_vectors<kDirect / 16>(padded, n, rank, rank, &key, &same);
  }
  return key;
}

int64_t count_greater(const int32_t* keys, int64_t n, int32_t than) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += 16) {
    count += count_lanes(greater(load(keys + i), broadcast(than)) & first_lanes(n - i));
  }
  return count;
}

struct Threshold {
  int32_t key;
  int64_t greater;  // the number of greater keys
};

// Finds the key by bisection over all integers, in 32 passes. For rows that sampling cannot narrow, such as rows with
// few distinct values.
Threshold bisect(const int32_t* keys, int64_t n, int64_t rank) {
  int64_t low = INT32_MIN, high = INT32_MAX;  // the threshold lies in low..high
  while (low < high) {
    const int64_t middle = (low + high) >> 1;
    if (count_greater(keys, n, static_cast<int32_t>(middle)) <= rank) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return {static_cast<int32_t>(low), count_greater(keys, n, static_cast<int32_t>(low))};
}

// Copies the keys in low..high to `out`, returns their number, and counts the greater ones in `above`.
int64_t bracket(const int32_t* keys, int64_t n, int32_t low, int32_t high, int32_t* out, int64_t* above) {
  const Key16 lows = broadcast(low), highs = broadcast(high);
  int64_t count = 0, greater_count = 0;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const Key16 key = load(keys + i);
    const Mask16 over = greater(key, highs);
    greater_count += count_lanes(over);
    count += compress(out + count, static_cast<Mask16>(~(over | greater(lows, key))), key);
  }
  if (i < n) {
    const Key16 key = load(keys + i);
    const Mask16 valid = first_lanes(n - i), over = greater(key, highs);
    greater_count += count_lanes(valid & over);
    count += compress(out + count, valid & ~(over | greater(lows, key)), key);
  }
  *above = greater_count;
  return count;
}

// Finds the key of descending `rank` (0-based) among n keys. Order statistics of a sample bracket the key, the keys in
// the bracket are copied, and this repeats until few enough remain to be ranked directly. `scratch`: two buffers of n
// keys.
Threshold select_rank(const int32_t* keys, int64_t n, int64_t rank, int32_t* const scratch[2]) {
  int64_t above = 0;
  for (int round = 0; n > kDirect; ++round) {
    if (round == kMaxRounds) {
      const Threshold found = bisect(keys, n, rank);
      return {found.key, above + found.greater};
    }
    alignas(64) int32_t sample[kSample];
    int32_t low, high;
    for (int i = 0; i < kSample; ++i) sample[i] = keys[(2 * i + 1) * n / (2 * kSample)];
    const float share = (static_cast<float>(rank) + 0.5f) / static_cast<float>(n);
    const float deviation = __builtin_sqrtf(kSample * share * (1.0f - share));
    const float width = 1.25f * deviation + 0.5f;  // misses one time in ten; a wider one would hold more keys
    const int upper = static_cast<int>(kSample * share - width), lower = static_cast<int>(kSample * share + width);
    ranked_vectors<kSample / 16>(sample, kSample, upper < 0 ? 0 : upper, lower >= kSample ? kSample - 1 : lower, &high,
                                 &low);
    if (kSample * share - width < 0) high = INT32_MAX;
    if (lower >= kSample) low = INT32_MIN;

    int32_t* out = keys == scratch[0] ? scratch[1] : scratch[0];
    int64_t greater_count;
    int64_t inside = bracket(keys, n, low, high, out, &greater_count);
    if (rank < greater_count) {  // the key is above the bracket
      inside = bracket(keys, n, high + 1, INT32_MAX, out, &greater_count);
    } else if (rank >= greater_count + inside) {  // the key is below the bracket
      inside = bracket(keys, n, INT32_MIN, low - 1, out, &greater_count);
    } else if (low == high) {
      return {low, above + greater_count};
    }
    above += greater_count;
    rank -= greater_count;
    n = inside;
    keys = out;
  }
  const int32_t key = ranked(keys, static_cast<int>(n), static_cast<int>(rank));
  return {key, above + count_greater(keys, n, key)};
}

}  // namespace
}  // namespace cpr::CPR_VARIANT
