// float16 for the emulated device: storage, exact widening, rounding to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // inf, NaN
  // The exponent is off by 2^112; multiplying corrects it exactly, subnormals included.
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
}

inline __half __float2half(float x) {
  const uint16_t sign = static_cast<uint16_t>(__float_as_uint(x) >> 16 & 0x8000u);
  const float magnitude = fabsf(x);
  if (x != x) return {0x7fff};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (magnitude < 0x1p-14f) return {static_cast<uint16_t>(sign | static_cast<uint16_t>(rintf(magnitude * 0x1p24f)))};
  const uint32_t bits = __float_as_uint(magnitude) - (112u << 23);
  return {static_cast<uint16_t>(sign | (bits + 0xfffu + (bits >> 13 & 1)) >> 13)};
}

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
