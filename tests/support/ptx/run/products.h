// Products of 16-bit elements, and their sums in the order of tensor cores.
#pragma once

#include <algorithm>
#include <cmath>

#include "operations.h"

namespace ptx {

struct Bfloat {
  static float widen(uint32_t bits) {
    const uint32_t word = bits << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
  }
};
struct Half {
  static float widen(uint32_t bits) { return _cvtsh_ss(static_cast<uint16_t>(bits)); }
};

constexpr int kZeroExponent = -1000;

inline int exponent_of(float value) { return value == 0 ? kZeroExponent : std::ilogb(value); }

inline float truncated_to_float(double value) {
  const auto rounded = static_cast<float>(value);
  return std::fabs(static_cast<double>(rounded)) > std::fabs(value) ? std::nextafterf(rounded, 0.0f) : rounded;
}

inline double power_of_two(int exponent) {
  const auto bits = static_cast<uint64_t>(1023 + exponent) << 52;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

struct Fragment {
  float value[16];
  int exponent[16];
  bool finite = true;

  void set(int k, float x) {
    value[k] = x;
    exponent[k] = exponent_of(x);
    finite &= std::isfinite(x);
  }
};

// Adds the products of a row and a column to `sum` in the order of the model.
inline float add_products(const ProductModel& model, const Fragment& row, const Fragment& column, float sum) {
  if (!row.finite || !column.finite || !std::isfinite(sum)) {
    double total = sum;
    for (int k = 0; k < 16; ++k) total += static_cast<double>(row.value[k]) * column.value[k];
    return canonical(static_cast<float>(total));
  }
  for (int first = 0; first < 16; first += model.group) {
    int greatest = exponent_of(sum);
    for (int k = first; k < first + model.group; ++k) {
      greatest = std::max(greatest, row.exponent[k] + column.exponent[k]);
    }
    if (greatest < -300) continue;  // all addends are zero
    const int unit = greatest - 23 - model.extra_bits;
    const double scale = power_of_two(-unit);
    double total = std::trunc(sum * scale);
    for (int k = first; k < first + model.group; ++k) {
      total += std::trunc(static_cast<double>(row.value[k]) * column.value[k] * scale);
    }
    sum = truncated_to_float(total * power_of_two(unit));
  }
  return sum;
}

}  // namespace ptx
