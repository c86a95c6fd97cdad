// Builds handlers from functions of one lane: `each<T, F>` executes T F::operator()(T...) for the active lanes.
//
// Float results that are NaN get the bits of the device, 0x7fffffff. `Flushed` replaces subnormal inputs and results by
// zeros of their sign, and `Rounded` computes in another rounding mode.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <limits>
#include <type_traits>

#include "machine.h"

namespace ptx {

// Reads and writes a lane of a row. 16-bit values are kept zero-extended in 32 bits.
template <typename T>
inline T get(const uint8_t* row, int lane) {
  if constexpr (sizeof(T) < 4)
    return static_cast<T>(reinterpret_cast<const uint32_t*>(row)[lane]);
  else
    return reinterpret_cast<const T*>(row)[lane];
}

template <typename T>
inline void put(uint8_t* row, int lane, T value) {
  if constexpr (sizeof(T) < 4)
    reinterpret_cast<uint32_t*>(row)[lane] = static_cast<std::make_unsigned_t<T>>(value);
  else
    reinterpret_cast<T*>(row)[lane] = value;
}

template <typename T>
inline T canonical(T value) {
  if constexpr (std::is_same_v<T, float>) {
    const uint32_t bits = 0x7fffffffu;
    float nan;
    memcpy(&nan, &bits, sizeof nan);
    return value != value ? nan : value;
  } else {
    return value;
  }
}

// Handlers of one, two and three sources of type T; R is the type of the result.
template <typename R, typename T, typename F>
void each1(Warp& w, const Instruction& in, uint32_t lanes) {
  uint8_t* out = w.rows + in.at[0];
  const uint8_t* a = w.rows + in.at[1];
  for_lanes(lanes, [&](int i) { put<R>(out, i, canonical<R>(F()(get<T>(a, i)))); });
}

template <typename R, typename T, typename F>
void each2(Warp& w, const Instruction& in, uint32_t lanes) {
  uint8_t* out = w.rows + in.at[0];
  const uint8_t *a = w.rows + in.at[1], *b = w.rows + in.at[2];
  for_lanes(lanes, [&](int i) { put<R>(out, i, canonical<R>(F()(get<T>(a, i), get<T>(b, i)))); });
}

template <typename R, typename T, typename F>
void each3(Warp& w, const Instruction& in, uint32_t lanes) {
  uint8_t* out = w.rows + in.at[0];
  const uint8_t *a = w.rows + in.at[1], *b = w.rows + in.at[2], *c = w.rows + in.at[3];
  for_lanes(lanes, [&](int i) { put<R>(out, i, canonical<R>(F()(get<T>(a, i), get<T>(b, i), get<R>(c, i)))); });
}

// A comparison: the destination is a predicate, a mask of the lanes.
template <typename T, typename F>
void compare(Warp& w, const Instruction& in, uint32_t lanes) {
  const uint8_t *a = w.rows + in.at[1], *b = w.rows + in.at[2];
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(F()(get<T>(a, i), get<T>(b, i))) << i;
  uint32_t& out = *w.row<uint32_t>(in.at[0]);
  out = (out & ~lanes) | (bits & lanes);
}

inline float flushed(float value) {
  return std::fabs(value) < std::numeric_limits<float>::min() ? value * 0.0f : value;
}

template <typename F>
struct Flushed {
  template <typename... T>
  auto operator()(T... values) const {
    const auto result = F()(flushed(values)...);
    if constexpr (std::is_same_v<decltype(result), const float>)
      return flushed(result);
    else
      return result;
  }
};

struct Saturate {
  float operator()(float a) const { return a > 0 ? (a < 1 ? a : 1.0f) : 0.0f; }  // of NaN: 0
};

template <typename F>
struct Saturated {
  template <typename... T>
  float operator()(T... values) const {
    return Saturate()(F()(values...));
  }
};

// Runs a handler in a rounding mode of the processor (_MM_ROUND_DOWN and so on).
template <unsigned kMode, Handler kHandler>
void rounded(Warp& w, const Instruction& in, uint32_t lanes) {
  const unsigned before = _mm_getcsr();
  _mm_setcsr((before & ~static_cast<unsigned>(_MM_ROUND_MASK)) | kMode);
  asm volatile("" ::: "memory");
  kHandler(w, in, lanes);
  asm volatile("" ::: "memory");
  _mm_setcsr(before);
}

}  // namespace ptx
