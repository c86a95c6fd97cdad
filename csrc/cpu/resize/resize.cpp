// The resize of resize.h. With AVX2, eight rows are handled at once: they are transposed, so that a vector holds a pair
// of pixels of each, and one multiplication of pairs (`madd`) serves two pixels of eight rows. The result is stored as
// pairs of rows, which the second pass multiplies in the same way.
#include "cpu/resize/resize.h"

#include <string.h>

#include "cpu/common/dispatch.h"
#include "cpu/common/scratch.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace cpr::CPR_VARIANT {
namespace {

using resize::Axis;
using resize::Job;

inline int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Makes a row of a picture (128, v, u) of (u, v).
inline void flow_row(const uint8_t* uv, int64_t width, uint8_t* picture) {
  int64_t x = 0;
#if defined(__AVX2__)
  const __m128i order = _mm_setr_epi8(-1, 1, 0, -1, 3, 2, -1, 5, 4, -1, 7, 6, -1, -1, -1, -1);
  const __m128i neutral = _mm_setr_epi8(-128, 0, 0, -128, 0, 0, -128, 0, 0, -128, 0, 0, 0, 0, 0, 0);
  for (; x + 6 <= width; x += 4) {  // writes 16 bytes, of which the next four pixels, or the lines below, replace four
    const __m128i four = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(uv + 2 * x));
    const __m128i bytes = _mm_or_si128(_mm_shuffle_epi8(four, order), neutral);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(picture + 3 * x), bytes);
  }
#endif
  for (; x < width; ++x) {
    picture[3 * x] = 128;
    picture[3 * x + 1] = uv[2 * x + 1];
    picture[3 * x + 2] = uv[2 * x];
  }
}

#if defined(__AVX2__)

constexpr int64_t kRows = 8;   // handled at once
constexpr int64_t kGroup = 8;  // pixels of a row that are transposed at once

// The order of the bytes of a group as pairs, int16: element q = pair * C + channel. Four elements come from one load.
template <int C>
struct Order;
template <>
struct Order<3> {
  static constexpr int kOffset[3] = {0, 6, 8};
  static constexpr int8_t kFirst[3][4] = {{0, 1, 2, 6}, {1, 2, 6, 7}, {6, 10, 11, 12}};
};
template <>
struct Order<2> {
  static constexpr int kOffset[2] = {0, 0};
  static constexpr int8_t kFirst[2][4] = {{0, 1, 4, 5}, {8, 9, 12, 13}};
};

template <int C>
inline __m256i order_of(int part) {
  const int8_t* first = Order<C>::kFirst[part];
  alignas(16) int8_t bytes[16];
  for (int i = 0; i < 4; ++i) {
    bytes[4 * i] = first[i];
    bytes[4 * i + 2] = static_cast<int8_t>(first[i] + C);
    bytes[4 * i + 1] = bytes[4 * i + 3] = -1;
  }
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
}

// Transposes `groups` groups of eight rows: packed[pair * C + channel] holds that pair of each row.
template <int C>
void pack(const uint8_t* const* rows, int64_t groups, __m256i* packed) {
  __m256i order[C];
  for (int part = 0; part < C; ++part) order[part] = order_of<C>(part);
  for (int64_t g = 0; g < groups; ++g) {
    for (int part = 0; part < C; ++part, packed += 4) {
      const int64_t place = g * kGroup * C + Order<C>::kOffset[part];
      __m256i row[4];
      for (int r = 0; r < 4; ++r) {
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r] + place));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[r + 4] + place));
        row[r] = _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1), order[part]);
      }
      const __m256i a = _mm256_unpacklo_epi32(row[0], row[1]), b = _mm256_unpacklo_epi32(row[2], row[3]);
      const __m256i c = _mm256_unpackhi_epi32(row[0], row[1]), d = _mm256_unpackhi_epi32(row[2], row[3]);
      _mm256_store_si256(packed, _mm256_unpacklo_epi64(a, b));
      _mm256_store_si256(packed + 1, _mm256_unpackhi_epi64(a, b));
      _mm256_store_si256(packed + 2, _mm256_unpacklo_epi64(c, d));
      _mm256_store_si256(packed + 3, _mm256_unpackhi_epi64(c, d));
    }
  }
}

// The sums of an output pixel over its pairs, for N vectors that are side by side; the next pair is `step` vectors on.
// K is the number of pairs, or 0 if it is axis.pairs.
template <int N, int K>
inline void weighted(const Axis& axis, const int32_t* weights, const __m256i* pairs, int64_t step, __m256i* sums) {
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) sums[n] = _mm256_set1_epi32(1 << (axis.precision - 1));
#pragma GCC unroll 8
  for (int k = 0; k < (K ? K : axis.pairs); ++k) {
    const __m256i weight = _mm256_set1_epi32(weights[k]);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      sums[n] = _mm256_add_epi32(sums[n], _mm256_madd_epi16(_mm256_loadu_si256(pairs + k * step + n), weight));
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) sums[n] = _mm256_sra_epi32(sums[n], _mm_cvtsi32_si128(axis.precision));
}

inline __m256i bytes_of(__m256i a, __m256i b) {  // as int16
  const __m256i both = _mm256_packs_epi32(a, b);
  return _mm256_min_epi16(_mm256_max_epi16(both, _mm256_setzero_si256()), _mm256_set1_epi16(255));
}

// The first pass of eight rows. Writes four pairs of rows, int32 [4, stride], whose columns are pixels times channels.
template <int C, int K>
void along_rows(const Axis& axis, const __m256i* packed, int32_t* pairs, int64_t stride) {
  const int count = K ? K : axis.pairs;
  for (int64_t x = 0; x < axis.out; x += 4) {
    __m256i sums[4 * C];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      weighted<C, K>(axis, axis.weights + (x + i) * count, packed + axis.first[x + i] * C, C, sums + i * C);
    }
#pragma GCC unroll 4
    for (int part = 0; part < C; ++part) {
      const __m256 a = _mm256_castsi256_ps(bytes_of(sums[4 * part], sums[4 * part + 1]));
      const __m256 b = _mm256_castsi256_ps(bytes_of(sums[4 * part + 2], sums[4 * part + 3]));
      const __m256i even = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
      const __m256i odd = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd));
      __m128i* target = reinterpret_cast<__m128i*>(pairs + x * C + 4 * part);
      _mm_storeu_si128(target, _mm256_castsi256_si128(even));
      _mm_storeu_si128(target + stride / 4, _mm256_castsi256_si128(odd));
      _mm_storeu_si128(target + stride / 2, _mm256_extracti128_si256(even, 1));
      _mm_storeu_si128(target + 3 * stride / 4, _mm256_extracti128_si256(odd, 1));
    }
  }
}

// The second pass of one output row. Writes the bytes of `stride` columns.
template <int K>
void along_columns(const Axis& axis, int64_t y, const int32_t* pairs, int64_t stride, uint8_t* line) {
  const int32_t* weights = axis.weights + y * (K ? K : axis.pairs);
  const __m256i* source = reinterpret_cast<const __m256i*>(pairs + axis.first[y] * stride);
  for (int64_t j = 0; j < stride; j += 16, source += 2) {
    __m256i sums[2];
    weighted<2, K>(axis, weights, source, stride / 8, sums);
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(sums[0], sums[1]), 0xd8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(line + j), bytes);
  }
}

// Calls run<K>() for the number of pairs; the usual ones are unrolled.
template <class Run>
inline void with_pairs(int pairs, Run run) {
  switch (pairs) {
    case 2:
      return run.template operator()<2>();
    case 3:
      return run.template operator()<3>();
    case 4:
      return run.template operator()<4>();
    case 5:
      return run.template operator()<5>();
    case 6:
      return run.template operator()<6>();
    default:
      return run.template operator()<0>();
  }
}

// Scratch of one call.
struct Buffers {
  int64_t groups;   // of a row, the last one padded
  int64_t stride;   // of a pair of rows after the first pass, int32
  __m256i* packed;  // [groups, 4 C]
  int32_t* pairs;   // [rows / 2, stride]
  uint8_t* line;    // [stride]
};

template <int C>
void first_pass(const Job& job, const uint8_t* frame, const Buffers& buffers) {
  const int64_t whole = job.columns.in / kGroup, rest = (job.columns.in - whole * kGroup) * C;
  uint8_t tail[kRows][kGroup * C + 16] = {};
  for (int64_t begin = 0; begin < job.rows.in; begin += kRows) {
    const uint8_t *rows[kRows], *tails[kRows];
    for (int64_t r = 0; r < kRows; ++r) {  // rows beyond the last have weights of 0
      rows[r] = frame + (begin + r < job.rows.in ? begin + r : job.rows.in - 1) * job.row_stride;
      tails[r] = tail[r];
      if (rest) memcpy(tail[r], rows[r] + whole * kGroup * C, rest);
    }
    pack<C>(rows, whole, buffers.packed);
    if (rest) pack<C>(tails, 1, buffers.packed + 4 * C * whole);
    int32_t* target = buffers.pairs + begin / 2 * buffers.stride;
    with_pairs(job.columns.pairs,
               [&]<int K>() { along_rows<C, K>(job.columns, buffers.packed, target, buffers.stride); });
  }
}

template <int C>
void second_pass(const Job& job, const Buffers& buffers, uint8_t* out) {
  for (int64_t y = 0; y < job.rows.out; ++y, out += 3 * job.columns.out) {
    with_pairs(job.rows.pairs,
               [&]<int K>() { along_columns<K>(job.rows, y, buffers.pairs, buffers.stride, buffers.line); });
    if (C == 3) {
      memcpy(out, buffers.line, 3 * job.columns.out);
    } else {
      flow_row(buffers.line, job.columns.out, out);
    }
  }
}

template <int C>
const char* run(const Job& job) {
  Buffers buffers;
  buffers.groups = rounded_up(job.columns.in, kGroup) / kGroup;
  buffers.stride = rounded_up(rounded_up(job.columns.out, 4) * C, 16);
  const int64_t packed = 4 * C * buffers.groups * sizeof(__m256i);
  const int64_t pairs = rounded_up(job.rows.in, kRows) / 2 * buffers.stride * sizeof(int32_t);
  const ScratchBlock scratch = acquire_scratch(packed + pairs + buffers.stride);
  if (scratch.memory == nullptr) return "resize: out of memory";
  buffers.packed = static_cast<__m256i*>(scratch.memory);
  buffers.pairs = reinterpret_cast<int32_t*>(static_cast<uint8_t*>(scratch.memory) + packed);
  buffers.line = static_cast<uint8_t*>(scratch.memory) + packed + pairs;
  for (int64_t f = 0; f < job.count; ++f) {
    first_pass<C>(job, job.frames + f * job.frame_stride, buffers);
    second_pass<C>(job, buffers, job.out + f * job.rows.out * job.columns.out * 3);
  }
  release_scratch(scratch);
  return nullptr;
}

#else

inline uint8_t rounded(const Axis& axis, int32_t sum) {
  const int32_t level = sum >> axis.precision;
  return static_cast<uint8_t>(level < 0 ? 0 : level > 255 ? 255 : level);
}

// The sum of one output pixel, whose source pixels are `step` bytes apart; `left` of them follow the first.
inline uint8_t weighted(const Axis& axis, int64_t at, const uint8_t* line, int64_t step) {
  int32_t sum = 1 << (axis.precision - 1);
  for (int k = 0; k < axis.pairs; ++k) {
    const int32_t both = axis.weights[at * axis.pairs + k];
    const int64_t pixel = 2 * (axis.first[at] + k);
    sum += line[pixel * step] * static_cast<int16_t>(both & 0xffff);
    if (pixel + 1 < axis.in) sum += line[(pixel + 1) * step] * static_cast<int16_t>(both >> 16);
  }
  return rounded(axis, sum);
}

template <int C>
const char* run(const Job& job) {
  const int64_t stride = job.columns.out * C;
  const ScratchBlock scratch = acquire_scratch((job.rows.in + 1) * stride);
  if (scratch.memory == nullptr) return "resize: out of memory";
  uint8_t* narrow = static_cast<uint8_t*>(scratch.memory);
  uint8_t* line = narrow + job.rows.in * stride;
  uint8_t* out = job.out;
  for (int64_t f = 0; f < job.count; ++f) {
    for (int64_t row = 0; row < job.rows.in; ++row) {
      const uint8_t* source = job.frames + f * job.frame_stride + row * job.row_stride;
      for (int64_t j = 0; j < stride; ++j) narrow[row * stride + j] = weighted(job.columns, j / C, source + j % C, C);
    }
    for (int64_t y = 0; y < job.rows.out; ++y, out += 3 * job.columns.out) {
      uint8_t* target = C == 3 ? out : line;
      for (int64_t j = 0; j < stride; ++j) target[j] = weighted(job.rows, y, narrow + j, stride);
      if (C == 2) flow_row(line, job.columns.out, out);
    }
  }
  release_scratch(scratch);
  return nullptr;
}

#endif

}  // namespace

const char* resize_frames(const Job& job) { return job.channels == 2 ? run<2>(job) : run<3>(job); }

}  // namespace cpr::CPR_VARIANT
