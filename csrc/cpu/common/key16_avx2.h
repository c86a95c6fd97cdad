// The AVX2 part of lanes.h: sixteen integer keys in two registers. lanes.h includes this file inside its namespace and
// documents the functions.
#pragma once

struct Key16 {
  __m256i lo, hi;
};
// Expands an 8-bit mask to eight lanes of all zeros or all ones.
inline __m256i lanes_of(int mask) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask), bits), bits);
}
inline Mask16 mask_of(__m256i lo, __m256i hi) {
  return static_cast<Mask16>(_mm256_movemask_ps(_mm256_castsi256_ps(lo)) | _mm256_movemask_ps(_mm256_castsi256_ps(hi))
                                                                               << 8);
}
inline Vec16 select(Mask16 mask, Vec16 a, Vec16 b) {
  return {{_mm256_blendv_ps(b.lo.v, a.lo.v, _mm256_castsi256_ps(lanes_of(mask & 0xff)))},
          {_mm256_blendv_ps(b.hi.v, a.hi.v, _mm256_castsi256_ps(lanes_of(mask >> 8)))}};
}
inline Key16 load(const int32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline void store(int32_t* p, Key16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), a.hi);
}
inline Key16 broadcast(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Key16 add(Key16 a, Key16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline Mask16 greater(Key16 a, Key16 b) {
  return mask_of(_mm256_cmpgt_epi32(a.lo, b.lo), _mm256_cmpgt_epi32(a.hi, b.hi));
}
inline Mask16 equal(Key16 a, Key16 b) {
  return mask_of(_mm256_cmpeq_epi32(a.lo, b.lo), _mm256_cmpeq_epi32(a.hi, b.hi));
}
inline Key16 add_greater(Key16 sum, Key16 a, Key16 b) {
  return {_mm256_sub_epi32(sum.lo, _mm256_cmpgt_epi32(a.lo, b.lo)),
          _mm256_sub_epi32(sum.hi, _mm256_cmpgt_epi32(a.hi, b.hi))};
}
inline Key16 select(Mask16 mask, Key16 a, Key16 b) {
  return {_mm256_blendv_epi8(b.lo, a.lo, lanes_of(mask & 0xff)), _mm256_blendv_epi8(b.hi, a.hi, lanes_of(mask >> 8))};
}
inline Key16 min(Key16 a, Key16 b) { return {_mm256_min_epi32(a.lo, b.lo), _mm256_min_epi32(a.hi, b.hi)}; }
inline int32_t least(Key16 a) {
  const __m256i eight = _mm256_min_epi32(a.lo, a.hi);
  __m128i found = _mm_min_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  found = _mm_min_epi32(found, _mm_shuffle_epi32(found, 0x4e));
  return _mm_cvtsi128_si32(_mm_min_epi32(found, _mm_shuffle_epi32(found, 0xb1)));
}
inline __m256i key_of(__m256 score) {
  const __m256 x = _mm256_add_ps(score, _mm256_setzero_ps());  // -0 becomes +0
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i flip = _mm256_and_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(INT32_MAX));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_xor_si256(bits, flip), _mm256_set1_epi32(kNoKey), nan);
}
// For each 8-bit mask, the numbers of its lanes, one per byte and ascending. pdep and pext would compute them without a
// table, but Zen 1 and 2 run these instructions in microcode, for up to hundreds of cycles.
struct LanesOfMask {
  uint64_t bytes[256];
  constexpr LanesOfMask() : bytes() {
    for (unsigned mask = 0; mask < 256; ++mask) {
      int count = 0;
      for (uint64_t lane = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) bytes[mask] |= lane << 8 * count++;
      }
    }
  }
};
alignas(64) constexpr LanesOfMask kLanesOfMask;
// The lanes of an 8-bit mask, as an index that moves them to the front.
inline __m256i lanes_to_front(int mask) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLanesOfMask.bytes + mask)));
}
struct Compaction {
  Compaction(Mask16 mask)
      : lo(lanes_to_front(mask & 0xff)),
        hi(lanes_to_front(mask >> 8)),
        low(__builtin_popcount(mask & 0xff)),
        count(low + __builtin_popcount(mask >> 8)) {}
  __m256i lo, hi;
  int low, count;  // lanes of the lower half and of both
};
inline int compress(int32_t* p, Compaction chosen, Key16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(a.lo, chosen.lo));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + chosen.low), _mm256_permutevar8x32_epi32(a.hi, chosen.hi));
  return chosen.count;
}
inline Mask16 equal_ids(const int64_t* ids, int64_t id) {
  const __m256i wanted = _mm256_set1_epi64x(id);
  int mask = 0;
  for (int i = 0; i < 16; i += 4) {
    const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ids + i));
    mask |= _mm256_movemask_pd(_mm256_castsi256_pd(_mm256_cmpeq_epi64(four, wanted))) << i;
  }
  return static_cast<Mask16>(mask);
}
// rows[q][k] = key of tile[k][q], for 8 x 8 scores.
inline void transpose_keys_8(const float* tile, int64_t tile_stride, int32_t* rows, int64_t rows_stride) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = key_of(_mm256_loadu_ps(tile + i * tile_stride));
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm256_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm256_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    const __m256i low = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
    const __m256i high = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + i * rows_stride), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + (i + 4) * rows_stride), high);
  }
}
inline void transpose_keys(const float* tile, int64_t tile_stride, int32_t* rows, int64_t rows_stride) {
  for (int k = 0; k < 16; k += 8) {
    for (int q = 0; q < 16; q += 8) {
      transpose_keys_8(tile + k * tile_stride + q, tile_stride, rows + q * rows_stride + k, rows_stride);
    }
  }
}
