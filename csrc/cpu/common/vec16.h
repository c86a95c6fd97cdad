// Sixteen floats as one value, on AVX-512 (one register), AVX2 (two) or plain C++ (an array).
//
// Every operation follows IEEE 754 in each lane, and a multiply-add is fused only where `fma` is written, so a loop
// over Vec16 gives the same bits on every instruction set.
#pragma once

#if defined(__AVX2__) || defined(__AVX512F__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // caused by headers of GCC 12: _mm512_undefined_ps
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace cpr {
namespace {  // compiled once for each instruction set: internal linkage keeps the copies separate

#if defined(__AVX512F__)

struct Vec16 {
  __m512 v;
};
inline Vec16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Vec16 a) { _mm512_storeu_ps(p, a.v); }
inline Vec16 broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec16 operator+(Vec16 a, Vec16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec16 operator-(Vec16 a, Vec16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec16 operator*(Vec16 a, Vec16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec16 operator/(Vec16 a, Vec16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec16 min(Vec16 a, Vec16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec16 max(Vec16 a, Vec16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec16 sqrt(Vec16 a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vec16 floor(Vec16 a) { return {_mm512_floor_ps(a.v)}; }
inline Vec16 fma(Vec16 a, Vec16 b, Vec16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec16 fnma(Vec16 a, Vec16 b, Vec16 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }  // c - a b
// Lane 0 of `first`, the other lanes of `rest`.
inline Vec16 first_lane(Vec16 first, Vec16 rest) { return {_mm512_mask_mov_ps(rest.v, 1, first.v)}; }

#elif defined(__AVX2__)

struct Vec8 {
  __m256 v;
};
inline Vec8 load8(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec8 broadcast8(float x) { return {_mm256_set1_ps(x)}; }
inline void store(float* p, Vec8 a) { _mm256_storeu_ps(p, a.v); }
inline Vec8 operator+(Vec8 a, Vec8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec8 operator-(Vec8 a, Vec8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec8 operator*(Vec8 a, Vec8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec8 operator/(Vec8 a, Vec8 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vec8 min(Vec8 a, Vec8 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec8 max(Vec8 a, Vec8 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec8 sqrt(Vec8 a) { return {_mm256_sqrt_ps(a.v)}; }
inline Vec8 floor(Vec8 a) { return {_mm256_floor_ps(a.v)}; }
inline Vec8 fma(Vec8 a, Vec8 b, Vec8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec8 fnma(Vec8 a, Vec8 b, Vec8 c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }

struct Vec16 {
  Vec8 lo, hi;
};
inline Vec16 load(const float* p) { return {load8(p), load8(p + 8)}; }
inline void store(float* p, Vec16 a) {
  store(p, a.lo);
  store(p + 8, a.hi);
}
inline Vec16 broadcast(float x) { return {broadcast8(x), broadcast8(x)}; }
inline Vec16 operator+(Vec16 a, Vec16 b) { return {a.lo + b.lo, a.hi + b.hi}; }
inline Vec16 operator-(Vec16 a, Vec16 b) { return {a.lo - b.lo, a.hi - b.hi}; }
inline Vec16 operator*(Vec16 a, Vec16 b) { return {a.lo * b.lo, a.hi * b.hi}; }
inline Vec16 operator/(Vec16 a, Vec16 b) { return {a.lo / b.lo, a.hi / b.hi}; }
inline Vec16 min(Vec16 a, Vec16 b) { return {min(a.lo, b.lo), min(a.hi, b.hi)}; }
inline Vec16 max(Vec16 a, Vec16 b) { return {max(a.lo, b.lo), max(a.hi, b.hi)}; }
inline Vec16 sqrt(Vec16 a) { return {sqrt(a.lo), sqrt(a.hi)}; }
inline Vec16 floor(Vec16 a) { return {floor(a.lo), floor(a.hi)}; }
inline Vec16 fma(Vec16 a, Vec16 b, Vec16 c) { return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)}; }
inline Vec16 fnma(Vec16 a, Vec16 b, Vec16 c) { return {fnma(a.lo, b.lo, c.lo), fnma(a.hi, b.hi, c.hi)}; }
inline Vec16 first_lane(Vec16 first, Vec16 rest) { return {{_mm256_blend_ps(rest.lo.v, first.lo.v, 1)}, rest.hi}; }

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
// Returns the second operand where either is NaN, as the x86 instructions do.
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
inline Vec16 fma(Vec16 a, Vec16 b, Vec16 c) {
  return each_lane([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
inline Vec16 fnma(Vec16 a, Vec16 b, Vec16 c) {
  return each_lane([&](int i) { return __builtin_fmaf(-a.v[i], b.v[i], c.v[i]); });
}
inline Vec16 first_lane(Vec16 first, Vec16 rest) {
  rest.v[0] = first.v[0];
  return rest;
}

#endif

// One register of floats, for loops that hold more values than there are registers: GCC keeps arrays of single
// registers in registers, but not arrays of pairs.
#if defined(__AVX2__) && !defined(__AVX512F__)
using Unit = Vec8;
constexpr int kUnitLanes = 8;
inline Vec8 unit_load(const float* p) { return load8(p); }
inline Vec8 unit_broadcast(float x) { return broadcast8(x); }
#else
using Unit = Vec16;
constexpr int kUnitLanes = 16;
inline Vec16 unit_load(const float* p) { return load(p); }
inline Vec16 unit_broadcast(float x) { return broadcast(x); }
#endif

// Four floats as one value, with the operations of bicubic sampling only.
#if defined(__AVX2__)
struct Vec4 {
  __m128 v;
};
inline Vec4 load4(const float* p) { return {_mm_loadu_ps(p)}; }
inline void store(float* p, Vec4 a) { _mm_storeu_ps(p, a.v); }
inline Vec4 operator*(Vec4 a, float x) { return {_mm_mul_ps(a.v, _mm_set1_ps(x))}; }
inline Vec4 fma(Vec4 a, float x, Vec4 c) { return {_mm_fmadd_ps(a.v, _mm_set1_ps(x), c.v)}; }
#else
struct Vec4 {
  float v[4];
};
inline Vec4 load4(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
inline void store(float* p, Vec4 a) {
  for (int i = 0; i < 4; ++i) p[i] = a.v[i];
}
inline Vec4 operator*(Vec4 a, float x) {
  for (float& lane : a.v) lane *= x;
  return a;
}
inline Vec4 fma(Vec4 a, float x, Vec4 c) {
  for (int i = 0; i < 4; ++i) c.v[i] = __builtin_fmaf(a.v[i], x, c.v[i]);
  return c;
}
#endif

}  // namespace
}  // namespace cpr
