// The rows [R, C] of a batch, N*T*H*W rows of C channels, and how they are divided into segments, blocks and parts.
//
// Letters in shapes: R rows, C channels, L floats in a segment.
#pragma once

#include "cpu/common/lanes.h"

namespace cpr::CPR_VARIANT {
namespace {

constexpr int64_t kLeastSegment = 64;   // floats; fewer would leave SIMD lanes idle
constexpr int64_t kBlockFloats = 4096;  // 16 KiB: a block stays in the first-level cache while it is read twice
constexpr int64_t kLeastSegments = 32;  // in a block; fewer would spend the time on the sums in double
constexpr int64_t kMaxParts = 64;
constexpr const char* kNoMemory = "batch_norm: out of memory";

// A segment is the least number of whole rows that fills the SIMD lanes, so that sums over rows add whole segments, for
// any C. A block is a run of segments whose sums are taken in float, and a part is a run of blocks whose sums are added
// in double. They depend on R and C only, and parts are merged in order: results do not depend on the threads.
struct Rows {
  int64_t R, C;
  int64_t segment;  // L = C times the rows in a segment
  int64_t block;    // floats in a block, but for the last
  int64_t blocks, blocks_per_part, parts;

  Rows(int64_t R, int64_t C) : R(R), C(C) {
    segment = C * ceil_div(kLeastSegment, C);
    const int64_t fours = kBlockFloats / (4 * segment);  // sums add four segments at a time
    const int64_t segments = 4 * fours > kLeastSegments ? 4 * fours : kLeastSegments;
    block = segments * segment;
    blocks = ceil_div(R * C, block);
    blocks_per_part = ceil_div(blocks, kMaxParts);
    parts = ceil_div(blocks, blocks_per_part);
  }
  int64_t begin(int64_t index) const { return index * block; }
  int64_t floats(int64_t index) const { return R * C - begin(index) < block ? R * C - begin(index) : block; }
};

// Sets sums[0, L) and sums[L, 2L) to the sums of term(i).first and term(i).second over the elements i of a block that
// have the same position in their segment. Four segments are added at a time: partial sums are short and accurate.
struct Terms {
  float first, second;
};
template <class Term>
inline void sum_segments(int64_t floats, int64_t L, float* sums, Term term) {
  float* __restrict first = sums;
  float* __restrict second = sums + L;
  for (int64_t l = 0; l < 2 * L; ++l) sums[l] = 0;
  int64_t i = 0;
  for (; i + 4 * L <= floats; i += 4 * L) {
#pragma GCC ivdep
    for (int64_t l = 0; l < L; ++l) {
      const Terms a = term(i + l, l), b = term(i + L + l, l), c = term(i + 2 * L + l, l), d = term(i + 3 * L + l, l);
      first[l] += (a.first + b.first) + (c.first + d.first);
      second[l] += (a.second + b.second) + (c.second + d.second);
    }
  }
  for (; i < floats; i += L) {
    const int64_t count = floats - i < L ? floats - i : L;
    for (int64_t l = 0; l < count; ++l) {
      const Terms a = term(i + l, l);
      first[l] += a.first;
      second[l] += a.second;
    }
  }
}

// Sums the positions of a segment that belong to one channel: [L] -> [C].
inline void fold_segment(const float* sums, const Rows& rows, double* out) {
  for (int64_t c = 0; c < rows.C; ++c) out[c] = sums[c];
  for (int64_t l = rows.C; l < rows.segment; l += rows.C) {
    for (int64_t c = 0; c < rows.C; ++c) out[c] += sums[l + c];
  }
}

// Repeats the values of the channels over a segment: fills [L] from its first C floats.
inline void repeat_channels(const Rows& rows, float* values) {
  for (int64_t l = rows.C; l < rows.segment; ++l) values[l] = values[l - rows.C];
}

// Calls body(i, l) for every element i of a block, with its position l in its segment.
template <class Body>
inline void each_element(int64_t floats, int64_t L, Body body) {
  for (int64_t i = 0; i < floats; i += L) {
    const int64_t count = floats - i < L ? floats - i : L;
#pragma GCC ivdep
    for (int64_t l = 0; l < count; ++l) body(i + l, l);
  }
}

// The normalisation y = (x - shift) * scale + offset of each channel. The mean is rounded to float in `shift`, and the
// rest of it is in `offset`: a mean far from 0 costs no digits.
struct Affine {
  float* shift;   // [L]
  float* scale;   // [L]
  float* offset;  // [L]

  Affine(const Rows& rows, float* data) : shift(data), scale(data + rows.segment), offset(data + 2 * rows.segment) {}

  void set(const cpr_batch_norm_args& a, const Rows& rows, const double* mean, const double* variance) {
    for (int64_t c = 0; c < rows.C; ++c) {
      const double exact = (a.weight ? a.weight[c] : 1) / __builtin_sqrt(variance[c] + a.eps);
      shift[c] = static_cast<float>(mean[c]);
      scale[c] = static_cast<float>(exact);
      offset[c] = static_cast<float>((a.bias ? a.bias[c] : 0) - (mean[c] - shift[c]) * exact);
    }
    repeat_channels(rows, shift);
    repeat_channels(rows, scale);
    repeat_channels(rows, offset);
  }
};

}  // namespace
}  // namespace cpr::CPR_VARIANT
