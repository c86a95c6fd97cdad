// SIMD building blocks of cascade_select and mil_nce beyond vec16.h: doubles, masks, sortable keys, compaction and the
// matrix tile. Each has the same result on every instruction set, so all CPU variants return the same bits.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "cpr_fast.h"
#include "cpu/common/scratch.h"
#include "cpu/common/vec16.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cpr {
namespace {

typedef uint16_t Mask16;  // bit i = lane i
constexpr Mask16 kAllLanes = 0xffff;
inline Mask16 first_lanes(int64_t count) { return count >= 16 ? kAllLanes : static_cast<Mask16>((1u << count) - 1); }
inline int count_lanes(Mask16 mask) { return __builtin_popcount(mask); }

// Sixteen doubles. mil_nce in float64 exists for gradcheck and is not optimised.
struct Double16 {
  double v[16];
};
#define CPR_EACH(expression)                          \
  do {                                                \
    Double16 r;                                       \
    for (int i = 0; i < 16; ++i) r.v[i] = expression; \
    return r;                                         \
  } while (0)
inline Double16 load(const double* p) { CPR_EACH(p[i]); }
inline void store(double* p, Double16 a) {
  for (int i = 0; i < 16; ++i) p[i] = a.v[i];
}
inline Double16 broadcast(double x) { CPR_EACH(x); }
inline Double16 operator+(Double16 a, Double16 b) { CPR_EACH(a.v[i] + b.v[i]); }
inline Double16 operator-(Double16 a, Double16 b) { CPR_EACH(a.v[i] - b.v[i]); }
inline Double16 operator*(Double16 a, Double16 b) { CPR_EACH(a.v[i] * b.v[i]); }
inline Double16 max(Double16 a, Double16 b) { CPR_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline Double16 fma(Double16 a, Double16 b, Double16 c) { CPR_EACH(__builtin_fma(a.v[i], b.v[i], c.v[i])); }
inline Double16 keep_lanes(Mask16 mask, Double16 a) { CPR_EACH(mask >> i & 1 ? a.v[i] : 0.0); }
inline Double16 select(Mask16 mask, Double16 a, Double16 b) { CPR_EACH(mask >> i & 1 ? a.v[i] : b.v[i]); }
inline Mask16 less(Double16 a, Double16 b) {
  Mask16 mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<Mask16>((a.v[i] < b.v[i]) << i);
  return mask;
}
inline Double16 exp(Double16 a) { CPR_EACH(__builtin_exp(a.v[i])); }
#undef CPR_EACH

// Sixteen int32 keys. `key_of` maps scores to integers that order in the same way: -0 equals +0, and NaN becomes
// kNoKey, which is below the key of -inf.
constexpr int32_t kNoKey = INT32_MIN;

#if defined(__AVX512F__)

struct Key16 {
  __m512i v;
};
inline Mask16 less(Vec16 a, Vec16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline Vec16 keep_lanes(Mask16 mask, Vec16 a) { return {_mm512_maskz_mov_ps(mask, a.v)}; }
inline Vec16 select(Mask16 mask, Vec16 a, Vec16 b) { return {_mm512_mask_mov_ps(b.v, mask, a.v)}; }
// Returns x * 2^n for the integer n in the low bits of `shifted`.
inline Vec16 scale_exponent(Vec16 x, Vec16 shifted) {
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(x.v), exponent))};
}
inline Key16 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store(int32_t* p, Key16 a) { _mm512_storeu_si512(p, a.v); }
inline Key16 broadcast(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Key16 add(Key16 a, Key16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Mask16 greater(Key16 a, Key16 b) { return _mm512_cmpgt_epi32_mask(a.v, b.v); }
inline Mask16 equal(Key16 a, Key16 b) { return _mm512_cmpeq_epi32_mask(a.v, b.v); }
// Adds 1 to `sum` in the lanes where a > b.
inline Key16 add_greater(Key16 sum, Key16 a, Key16 b) {
  return {_mm512_mask_add_epi32(sum.v, _mm512_cmpgt_epi32_mask(a.v, b.v), sum.v, _mm512_set1_epi32(1))};
}
inline Key16 select(Mask16 mask, Key16 a, Key16 b) { return {_mm512_mask_mov_epi32(b.v, mask, a.v)}; }
inline Key16 min(Key16 a, Key16 b) { return {_mm512_min_epi32(a.v, b.v)}; }
inline int32_t least(Key16 a) { return _mm512_reduce_min_epi32(a.v); }
inline Key16 key_of(Vec16 score) {
  const __m512 x = _mm512_add_ps(score.v, _mm512_setzero_ps());
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i key = _mm512_xor_si512(bits, _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1));
  return {_mm512_mask_mov_epi32(key, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(kNoKey))};
}
using Compaction = Mask16;  // the lanes that `compress` selects; made of a mask once for several calls
// Writes the selected lanes contiguously at p and returns their number. The rest of p[0..15] is undefined.
inline int compress(int32_t* p, Mask16 mask, Key16 a) {
  store(p, Key16{_mm512_maskz_compress_epi32(
               mask, a.v)});  // the compress-store instruction is microcoded, hence slow, on Zen 4
  return count_lanes(mask);
}
inline Mask16 equal_ids(const int64_t* ids, int64_t id) {
  const __m512i wanted = _mm512_set1_epi64(id);
  return static_cast<Mask16>(_mm512_cmpeq_epi64_mask(_mm512_loadu_si512(ids), wanted) |
                             _mm512_cmpeq_epi64_mask(_mm512_loadu_si512(ids + 8), wanted) << 8);
}
// Transposes 16 x 16 scores: rows[q][k] becomes the key of tile[k][q].
inline void transpose_keys(const float* tile, int64_t tile_stride, int32_t* rows, int64_t rows_stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = key_of(load(tile + i * tile_stride)).v;
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // a[i + j]: column j of each 4-lane group, of rows i..i+3
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(a[j], a[j + 4], 0x88), high = _mm512_shuffle_i32x4(a[j], a[j + 4], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0xdd);
    _mm512_storeu_si512(rows + j * rows_stride, _mm512_shuffle_i32x4(low, low2, 0x88));
    _mm512_storeu_si512(rows + (j + 4) * rows_stride, _mm512_shuffle_i32x4(high, high2, 0x88));
    _mm512_storeu_si512(rows + (j + 8) * rows_stride, _mm512_shuffle_i32x4(low, low2, 0xdd));
    _mm512_storeu_si512(rows + (j + 12) * rows_stride, _mm512_shuffle_i32x4(high, high2, 0xdd));
  }
}

#elif defined(__AVX2__)

inline Mask16 less(Vec16 a, Vec16 b) {
  return static_cast<Mask16>(_mm256_movemask_ps(_mm256_cmp_ps(a.lo.v, b.lo.v, _CMP_LT_OQ)) |
                             _mm256_movemask_ps(_mm256_cmp_ps(a.hi.v, b.hi.v, _CMP_LT_OQ)) << 8);
}
inline Vec16 scale_exponent(Vec16 x, Vec16 shifted) {
  const auto scaled = [](Vec8 value, Vec8 shift) -> Vec8 {
    return {_mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(value.v), _mm256_slli_epi32(_mm256_castps_si256(shift.v), 23)))};
  };
  return {scaled(x.lo, shifted.lo), scaled(x.hi, shifted.hi)};
}
#include "cpu/common/key16_avx2.h"
inline Vec16 keep_lanes(Mask16 mask, Vec16 a) { return mask == kAllLanes ? a : select(mask, a, broadcast(0.0f)); }

#else

struct Key16 {
  int32_t v[16];
};
inline Mask16 less(Vec16 a, Vec16 b) {
  Mask16 mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<Mask16>((a.v[i] < b.v[i]) << i);
  return mask;
}
inline Vec16 scale_exponent(Vec16 x, Vec16 shifted) {
  return each_lane([&](int i) {
    return __builtin_bit_cast(
        float, __builtin_bit_cast(uint32_t, x.v[i]) + (__builtin_bit_cast(uint32_t, shifted.v[i]) << 23));
  });
}
inline Vec16 select(Mask16 mask, Vec16 a, Vec16 b) {
  return each_lane([&](int i) { return mask >> i & 1 ? a.v[i] : b.v[i]; });
}
inline Vec16 keep_lanes(Mask16 mask, Vec16 a) { return mask == kAllLanes ? a : select(mask, a, broadcast(0.0f)); }
inline Key16 load(const int32_t* p) {
  Key16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = p[i];
  return r;
}
inline void store(int32_t* p, Key16 a) {
  for (int i = 0; i < 16; ++i) p[i] = a.v[i];
}
inline Key16 broadcast(int32_t x) {
  Key16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = x;
  return r;
}
inline Key16 add(Key16 a, Key16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
inline Mask16 greater(Key16 a, Key16 b) {
  Mask16 mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<Mask16>((a.v[i] > b.v[i]) << i);
  return mask;
}
inline Mask16 equal(Key16 a, Key16 b) { return static_cast<Mask16>(~(greater(a, b) | greater(b, a))); }
inline Key16 add_greater(Key16 sum, Key16 a, Key16 b) {
  for (int i = 0; i < 16; ++i) sum.v[i] += a.v[i] > b.v[i];
  return sum;
}
inline Key16 select(Mask16 mask, Key16 a, Key16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] = mask >> i & 1 ? a.v[i] : b.v[i];
  return a;
}
inline Key16 min(Key16 a, Key16 b) {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline int32_t least(Key16 a) {
  int32_t found = a.v[0];
  for (int i = 1; i < 16; ++i) found = a.v[i] < found ? a.v[i] : found;
  return found;
}
inline Key16 key_of(Vec16 score) {
  float x[16];
  store(x, score + broadcast(0.0f));
  Key16 r;
  for (int i = 0; i < 16; ++i) {
    const int32_t bits = __builtin_bit_cast(int32_t, x[i]);
    r.v[i] = x[i] != x[i] ? kNoKey : bits ^ (bits >> 31 & INT32_MAX);
  }
  return r;
}
using Compaction = Mask16;
inline int compress(int32_t* p, Mask16 mask, Key16 a) {
  int count = 0;
  for (; mask; mask &= static_cast<Mask16>(mask - 1)) p[count++] = a.v[__builtin_ctz(mask)];
  return count;
}
inline Mask16 equal_ids(const int64_t* ids, int64_t id) {
  Mask16 mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<Mask16>((ids[i] == id) << i);
  return mask;
}
inline void transpose_keys(const float* tile, int64_t tile_stride, int32_t* rows, int64_t rows_stride) {
  for (int k = 0; k < 16; ++k) {
    const Key16 keys = key_of(load(tile + k * tile_stride));
    for (int q = 0; q < 16; ++q) rows[q * rows_stride + k] = keys.v[q];
  }
}

#endif

inline float score_of(int32_t key) { return __builtin_bit_cast(float, key ^ (key >> 31 & INT32_MAX)); }

// Returns e^x for x <= 0 within 2 ulp: exactly 1 for 0, e^-87 for everything below -87, NaN for NaN. Range reduction to
// |r| <= ln 2 / 2, then the Taylor polynomial of degree 7.
inline Vec16 exp(Vec16 x) {
  x = max(broadcast(-87.0f), x);
  const Vec16 shift = broadcast(12582912.0f);  // 1.5 * 2^23: adding it moves the integer part to the low bits
  const Vec16 shifted = fma(x, broadcast(1.44269504f), shift);
  const Vec16 n = shifted - shift;
  const Vec16 r = fma(n, broadcast(-1.42860677e-6f), fma(n, broadcast(-0.693145752f), x));
  Vec16 p = broadcast(1.98412698e-4f);
  p = fma(p, r, broadcast(1.38888889e-3f));
  p = fma(p, r, broadcast(8.33333333e-3f));
  p = fma(p, r, broadcast(4.16666667e-2f));
  p = fma(p, r, broadcast(1.66666667e-1f));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  return scale_exponent(p, shifted) + (x - x);
}
template <class T>
inline T exp_scalar(T x) {
  T lanes[16];
  store(lanes, exp(broadcast(x)));
  return lanes[0];
}

// ---- the one matrix tile -----------------------------------------------------------------------------
// Matrix product of one tile: out[r][lane] (+)= sum over t of rows[r * row_stride + t * step] *
// panel[t * panel_stride + lane], for R rows and N x 16 lanes. Each sum is one chain of fused multiply-adds in the
// order of t. The row-major operand is broadcast, so a memory [K, D] is read in place and need not be repacked.
template <class T>
constexpr int kUnit = sizeof(T) == 4 ? kUnitLanes : 16;
inline Double16 unit_load(const double* p) { return load(p); }
inline Double16 unit_broadcast(double x) { return broadcast(x); }
template <class T>
struct Operand {
  const T* data;
  int64_t row_stride, step;
};
template <int R, int N, bool kAccumulate, class T>
inline void tile(Operand<T> rows, const T* panel, int64_t panel_stride, int64_t depth, T* out, int64_t out_stride) {
  constexpr int U = N * 16 / kUnit<T>;
  decltype(unit_load(panel)) acc[R][U];
  for (int r = 0; r < R; ++r) {
    for (int u = 0; u < U; ++u) {
      acc[r][u] = kAccumulate ? unit_load(out + r * out_stride + u * kUnit<T>) : unit_broadcast(T(0));
    }
  }
  const T* row = rows.data;
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t t = 0; t < depth; ++t, row += rows.step, panel += panel_stride) {
    // Rows of a memory: the hardware prefetcher does not follow eight short streams, so the rows of the next tile are
    // prefetched here.
    if (!kAccumulate && t % kLine == 0) {
      for (int r = 0; r < R; ++r) __builtin_prefetch(row + (R + r) * rows.row_stride);
    }
    decltype(unit_load(panel)) lanes[U];
    for (int u = 0; u < U; ++u) lanes[u] = unit_load(panel + u * kUnit<T>);
    for (int r = 0; r < R; ++r) {
      const auto x = unit_broadcast(row[r * rows.row_stride]);
      for (int u = 0; u < U; ++u) acc[r][u] = fma(x, lanes[u], acc[r][u]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int u = 0; u < U; ++u) store(out + r * out_stride + u * kUnit<T>, acc[r][u]);
  }
}
// Rows of a tile with kTileVectors vectors: R x N accumulators fill the registers and hide the latency of multiply-add.
// With AVX2, six rows are 12 accumulators of 16 registers; four rows would hide the latency only if every multiply-add
// began at the earliest cycle, and take 1.12 to 1.14 times as long on Zen 5.
#if defined(__AVX512F__)
constexpr int kTileRows = 8, kTileVectors = 2;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileVectors = 1;
#else
constexpr int kTileRows = 2, kTileVectors = 1;
#endif
template <int N, bool kAccumulate, class T>
inline void tiles(int64_t count, Operand<T> rows, const T* panel, int64_t panel_stride, int64_t depth, T* out,
                  int64_t out_stride) {
  constexpr int kRows = kTileRows * kTileVectors / N;
  int64_t r = 0;
  const auto whole_tiles = [&]<int R>(int64_t end) {
    for (; r + R <= end; r += R, rows.data += R * rows.row_stride) {
      tile<R, N, kAccumulate>(rows, panel, panel_stride, depth, out + r * out_stride, out_stride);
    }
  };
  if constexpr (kRows == 6) {
    // Chunks of 64 entries and widths such as 128 are not multiples of 6: a rest of two rows is computed with the six
    // before it in two tiles of four, because a tile of one row waits for the latency of its few multiply-adds.
    whole_tiles.template operator()<kRows>(count % kRows == 2 && count > kRows ? count - 8 : count);
    whole_tiles.template operator()<4>(count);
  } else {
    whole_tiles.template operator()<kRows>(count);
  }
  whole_tiles.template operator()<1>(count);
}

// ---- inputs ----------------------------------------------------------------------------------------------
inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, magnitude = half & 0x7fff;
  if (magnitude < 0x400) {  // zero and subnormal: magnitude * 2^-24, exactly
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t exponent =
      magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u;  // infinity and NaN keep an exponent of all ones
  return __builtin_bit_cast(float, sign | ((magnitude << 13) + exponent));
}
inline size_t element_size(int dtype) { return dtype == CPR_F64 ? 8 : dtype == CPR_F32 ? 4 : 2; }
// Converts elements [begin, begin + count) of a tensor exactly to the wider type.
inline void widen(const void* data, int dtype, int64_t begin, int64_t count, float* out) {
  const uint16_t* halves = static_cast<const uint16_t*>(data) + begin;
  if (dtype == CPR_F32) {
    __builtin_memcpy(out, static_cast<const float*>(data) + begin, count * sizeof(float));
  } else if (dtype == CPR_BF16) {
    for (int64_t i = 0; i < count; ++i) out[i] = __builtin_bit_cast(float, static_cast<uint32_t>(halves[i]) << 16);
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = half_to_float(halves[i]);
  }
}
inline void widen(const void* data, int, int64_t begin, int64_t count, double* out) {
  __builtin_memcpy(out, static_cast<const double*>(data) + begin, count * sizeof(double));
}
// Transposes rows [begin, begin + count) of [B, D] to panel[d][lane]; lanes beyond B are zero.
template <class T>
inline void pack_panel(const void* data, int dtype, int64_t begin, int64_t count, int64_t B, int64_t D, T* row,
                       T* panel) {
  for (int64_t lane = 0; lane < count; ++lane) {
    if (begin + lane < B) widen(data, dtype, (begin + lane) * D, D, row);
    for (int64_t d = 0; d < D; ++d) panel[d * count + lane] = begin + lane < B ? row[d] : T(0);
  }
}

// ---- scratch and floating-point mode -----------------------------------------------------------------------
// Uninitialised scratch memory of `count` elements plus one vector, aligned to a cache line; null if out of memory.
template <class T>
struct Scratch {
  explicit Scratch(int64_t count)
      : block(acquire_scratch(count * sizeof(T) + 16 * sizeof(T))), data(static_cast<T*>(block.memory)) {}
  ~Scratch() { release_scratch(block); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  const ScratchBlock block;
  T* const data;
};

// During its lifetime, rounds to nearest and keeps subnormal numbers, regardless of torch.set_flush_denormal.
struct ExactArithmetic {
#if defined(__x86_64__)
  ExactArithmetic() : saved(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~ExactArithmetic() { _mm_setcsr(saved); }
  unsigned saved;
#endif
};

inline int64_t ceil_div(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

}  // namespace
}  // namespace cpr
