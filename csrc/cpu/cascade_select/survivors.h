// The stages of one query: the entries that survive each stage, and the order of the result.
#pragma once

#include "cpu/cascade_select/rank.h"

namespace cpr::CPR_VARIANT {
namespace {

constexpr int64_t kMostMerged = 64;  // up to this many survivors a merge sort is faster than a radix sort

// The survivors of one query: the slots of `count` entries in ascending order, and their keys in each compared view.
struct Survivors {
  int32_t* slots;  // [K]
  int32_t* keys;   // [U, ...] rows `stride` apart
  int64_t stride, U, count;
};

// Moves the lanes of `mask` from position `from` to position `to` <= `from`, in order, in each compared view, and
// returns their number. kViews: the number of compared views if known at compile time, else 0. With the usual two
// views, the pointers stay in registers.
template <int kViews>
inline int compact_vector(Survivors& s, int64_t from, int64_t to, Mask16 mask, Key16 slots) {
  const int64_t views = kViews ? kViews : s.U;
  const Compaction chosen(mask);
  for (int64_t u = 0; u < views; ++u) compress(s.keys + u * s.stride + to, chosen, load(s.keys + u * s.stride + from));
  return compress(s.slots + to, chosen, slots);
}

// Starts with the entries that are not empty, have another id than the query, and no NaN score in a compared view.
template <int kViews>
void drop_excluded(Survivors& s, const cpr_cascade_args& a, int64_t b) {
  static const int32_t iota[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int64_t own_id = a.query_ids ? a.query_ids[b] : -1;
  int64_t kept = 0;
  for (int64_t i = 0; i < a.K; i += 16) {
    Key16 lowest = load(s.keys + i);
    for (int64_t u = 1; u < (kViews ? kViews : s.U); ++u) lowest = min(lowest, load(s.keys + u * s.stride + i));
    Mask16 mask = first_lanes(a.K - i) & greater(lowest, broadcast(kNoKey));
    if (a.memory_ids && i + 16 <= a.K) {
      mask &= static_cast<Mask16>(~(equal_ids(a.memory_ids + i, -1) | equal_ids(a.memory_ids + i, own_id)));
    } else if (a.memory_ids) {
      for (int64_t k = i; k < a.K; ++k) {
        const bool excluded = a.memory_ids[k] == -1 || a.memory_ids[k] == own_id;
        mask &= static_cast<Mask16>(~(excluded << (k - i)));
      }
    }
    const Key16 slots = add(broadcast(static_cast<int32_t>(i)), load(iota));
    if (mask == kAllLanes && kept == i) {  // nothing has been dropped yet: the keys are in place
      store(s.slots + i, slots);
      kept += 16;
    } else {
      kept += compact_vector<kViews>(s, i, kept, mask, slots);
    }
  }
  s.count = kept;
}

// Runs one stage: keeps the best `keep` survivors in the order (key descending, slot ascending), stored in slot order.
template <int kViews>
void select_stage(Survivors& s, int64_t row, int64_t keep, int32_t* const scratch[2]) {
  if (s.count <= keep) return;
  const int32_t* keys = s.keys + row * s.stride;
  const Threshold threshold = select_rank(keys, s.count, keep - 1, scratch);
  int64_t ties =
      keep - threshold.greater;  // how many of the entries equal to the threshold stay: those with the lowest slots
  int64_t kept = 0;
  for (int64_t i = 0; i < s.count; i += 16) {
    const Key16 key = load(keys + i);
    const Mask16 valid = first_lanes(s.count - i);
    Mask16 tied = equal(key, broadcast(threshold.key)) & valid;
    if (tied) {
      while (count_lanes(tied) > ties) tied &= static_cast<Mask16>(~(0x8000u >> (__builtin_clz(tied) - 16)));
      ties -= count_lanes(tied);
    }
    const Mask16 mask = tied | (greater(key, broadcast(threshold.key)) & valid);
    kept += compact_vector<kViews>(s, i, kept, mask, load(s.slots + i));
  }
  s.count = kept;
}

// Sorts `count` words by merging; returns the buffer that holds the result.
uint64_t* merge_sort(uint64_t* words, uint64_t* other, int64_t count) {
  for (int64_t width = 1; width < count; width *= 2) {
    for (int64_t begin = 0; begin < count; begin += 2 * width) {
      const int64_t middle = begin + width < count ? begin + width : count;
      const int64_t end = begin + 2 * width < count ? begin + 2 * width : count;
      int64_t left = begin, right = middle;
      for (int64_t i = begin; i < end; ++i) {
        const bool take_left = left < middle && (right >= end || words[left] <= words[right]);
        other[i] = words[take_left ? left++ : right++];
      }
    }
    uint64_t* sorted = other;
    other = words;
    words = sorted;
  }
  return words;
}

// Sorts `count` words by their upper halves, byte by byte, stably; returns the buffer that holds the result.
uint64_t* radix_sort(uint64_t* words, uint64_t* other, int64_t count) {
  int32_t starts[4][256] = {};
  for (int64_t i = 0; i < count; ++i) {
    for (int byte = 0; byte < 4; ++byte) ++starts[byte][words[i] >> (32 + 8 * byte) & 0xff];
  }
  for (int byte = 0; byte < 4; ++byte) {
    const int shift = 32 + 8 * byte;
    if (starts[byte][words[0] >> shift & 0xff] == count) continue;  // all equal
    int32_t sum = 0;
    for (int32_t& start : starts[byte]) {
      const int32_t size = start;
      start = sum;
      sum += size;
    }
    for (int64_t i = 0; i < count; ++i) other[starts[byte][words[i] >> shift & 0xff]++] = words[i];
    uint64_t* sorted = other;
    other = words;
    words = sorted;
  }
  return words;
}

// Writes the survivors of the last stage in the order (score descending, slot ascending), padded with (-1, -inf).
void write_result(const Survivors& s, const cpr_cascade_args& a, int64_t row, int64_t b, int32_t* const scratch[2]) {
  const int64_t width = a.keep[a.n - 1];
  const int32_t* keys = s.keys + row * s.stride;
  uint64_t* words = reinterpret_cast<uint64_t*>(scratch[0]);
  for (int64_t i = 0; i < s.count; ++i) {
    const uint32_t descending = ~(static_cast<uint32_t>(keys[i]) ^ 0x80000000u);
    words[i] = static_cast<uint64_t>(descending) << 32 | static_cast<uint32_t>(s.slots[i]);
  }
  // Survivors are in slot order, so a stable sort by key keeps equal keys in slot order.
  const auto sort = s.count > kMostMerged ? radix_sort : merge_sort;
  words = sort(words, reinterpret_cast<uint64_t*>(scratch[1]), s.count);
  for (int64_t i = 0; i < width; ++i) {
    const bool filled = i < s.count;
    const uint32_t ascending = filled ? ~static_cast<uint32_t>(words[i] >> 32) ^ 0x80000000u : 0;
    a.indices[b * width + i] = filled ? static_cast<int64_t>(words[i] & 0xffffffffu) : -1;
    a.scores[b * width + i] = filled ? score_of(static_cast<int32_t>(ascending)) : -__builtin_inff();
  }
}

}  // namespace
}  // namespace cpr::CPR_VARIANT
