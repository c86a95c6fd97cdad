// Sixteen floats as one value, on AVX-512 (one register), AVX2 (two) or plain C++ (an array).
//
// Every operation is the IEEE one, lane by lane, and no multiply-add is fused, so a loop written over Vec16 gives
// the same bits on every instruction set.
#pragma once

#if defined(__AVX2__) || defined(__AVX512F__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own headers: _mm512_undefined_ps
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace cpr {
namespace {  // compiled once per instruction set: internal linkage keeps the copies apart

#if defined(__AVX512F__)

struct Vec16 {
  __m512 v;
};
inline Vec16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec16 a) { _mm512_storeu_ps(p, a.v); }
inline Vec16 broadcast(float x) { return {_mm512_set1_ps(x)}; }
// {p[0] x 4, p[1] x 4, p[2] x 4, p[3] x 4}
inline Vec16 repeat_each_4(const float* p) {
  const __m512i lane = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  return {_mm512_permutexvar_ps(lane, _mm512_castps128_ps512(_mm_loadu_ps(p)))};
}
inline Vec16 operator+(Vec16 a, Vec16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec16 operator-(Vec16 a, Vec16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec16 operator*(Vec16 a, Vec16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec16 operator/(Vec16 a, Vec16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec16 min(Vec16 a, Vec16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec16 max(Vec16 a, Vec16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec16 sqrt(Vec16 a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vec16 floor(Vec16 a) { return {_mm512_floor_ps(a.v)}; }
// Four floats: quarters (0 + 2) + (1 + 3).
inline void store_sum_of_quarters(float* p, Vec16 a) {
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

#elif defined(__AVX2__)

struct Vec16 {
  __m256 lo, hi;
};
inline Vec16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Vec16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
inline Vec16 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec16 repeat_each_4(const float* p) {
  return {_mm256_set_m128(_mm_set1_ps(p[1]), _mm_set1_ps(p[0])), _mm256_set_m128(_mm_set1_ps(p[3]), _mm_set1_ps(p[2]))};
}
inline Vec16 operator+(Vec16 a, Vec16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec16 operator-(Vec16 a, Vec16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec16 operator*(Vec16 a, Vec16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec16 operator/(Vec16 a, Vec16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec16 min(Vec16 a, Vec16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline Vec16 max(Vec16 a, Vec16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Vec16 sqrt(Vec16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
inline Vec16 floor(Vec16 a) { return {_mm256_floor_ps(a.lo), _mm256_floor_ps(a.hi)}; }
inline void store_sum_of_quarters(float* p, Vec16 a) {
  const __m256 half = _mm256_add_ps(a.lo, a.hi);
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

#else

struct Vec16 {
  float v[16];
};
template <class Operation>
inline Vec16 each_lane(Operation operation) {
  Vec16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = operation(i);
  return r;
}
inline Vec16 load(const float* p) {
  return each_lane([&](int i) { return p[i]; });
}
inline void store(float* p, Vec16 a) {
  for (int i = 0; i < 16; ++i) p[i] = a.v[i];
}
inline Vec16 broadcast(float x) {
  return each_lane([&](int) { return x; });
}
inline Vec16 repeat_each_4(const float* p) {
  return each_lane([&](int i) { return p[i / 4]; });
}
inline Vec16 operator+(Vec16 a, Vec16 b) {
  return each_lane([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec16 operator-(Vec16 a, Vec16 b) {
  return each_lane([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec16 operator*(Vec16 a, Vec16 b) {
  return each_lane([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec16 operator/(Vec16 a, Vec16 b) {
  return each_lane([&](int i) { return a.v[i] / b.v[i]; });
}
// The second operand where either is NaN, as x86's instructions.
inline Vec16 min(Vec16 a, Vec16 b) {
  return each_lane([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec16 max(Vec16 a, Vec16 b) {
  return each_lane([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec16 sqrt(Vec16 a) {
  return each_lane([&](int i) { return __builtin_sqrtf(a.v[i]); });
}
inline Vec16 floor(Vec16 a) {
  return each_lane([&](int i) { return __builtin_floorf(a.v[i]); });
}
inline void store_sum_of_quarters(float* p, Vec16 a) {
  for (int i = 0; i < 4; ++i) p[i] = (a.v[i] + a.v[i + 8]) + (a.v[i + 4] + a.v[i + 12]);
}

#endif

}  // namespace
}  // namespace cpr
