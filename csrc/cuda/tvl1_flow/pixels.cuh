// The operations of TV-L1 flow on single pixels: resizing, bicubic warping and the median. Every operation is rounded
// as in csrc/cpu/tvl1_flow, so that both kernels give the same bits.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "cpu/tvl1_flow/levels.h"
#include "cpu/tvl1_flow/median_networks.h"

namespace cpr::tvl1 {

// ---- bilinear resize ------------------------------------------------------------

// Where bilinear interpolation reads along one axis: between source[first] and source[second], at fraction t.
struct Tap {
  int first, second;
  float t;
};

// scale: source pixels per target pixel. Pixel centres are aligned.
__device__ __forceinline__ Tap make_tap(int target, int source, double scale) {
  const double position = fmin(fmax((target + 0.5) * scale - 0.5, 0.0), source - 1.0);
  // As OpenCV at the far edge: shrinking reaches the last pixel at fraction 1 from its neighbour, enlarging reads it
  // directly. The results differ by rounding.
  const int last = scale > 1 ? (source >= 2 ? source - 2 : 0) : source - 1;
  const int first = static_cast<int>(position) < last ? static_cast<int>(position) : last;
  return {first, first + 1 < source ? first + 1 : source - 1, static_cast<float>(position - first)};
}

// Returns a + (b - a) t with one rounding after the difference: the product is exact in double.
__device__ __forceinline__ float lerp(float a, float b, float t) {
  return static_cast<float>(static_cast<double>(b - a) * static_cast<double>(t) + static_cast<double>(a));
}

// load(y, x) returns a pixel of the source.
template <typename Load>
__device__ __forceinline__ float interpolate(const Tap& row, const Tap& column, Load load) {
  const float above = lerp(load(row.first, column.first), load(row.first, column.second), column.t);
  const float below = lerp(load(row.second, column.first), load(row.second, column.second), column.t);
  return lerp(above, below, row.t);
}

// ---- bicubic warp ------------------------------------------------------------

// Computes the weights of the taps at offsets -1..2 for a position t in [0, 1) between taps 0 and 1, rounded as in
// OpenCV.
__device__ __forceinline__ void cubic_weights(float t, float (&w)[4]) {
  const float r = 1.0f - t;
  w[0] = kA * ((r * r) * t);
  w[1] = __fmaf_rn(__fmaf_rn(kA + 2, t, -(kA + 3)), t * t, 1.0f);
  w[3] = kA * ((t * t) * r);
  w[2] = 1.0f - w[0] - w[1] - w[3];
}

__device__ __forceinline__ float3 multiply_add(float4 value, float weight, float3 sum) {
  return {__fmaf_rn(value.x, weight, sum.x), __fmaf_rn(value.y, weight, sum.y), __fmaf_rn(value.z, weight, sum.z)};
}

__device__ __forceinline__ float3 multiply_add(float3 value, float weight, float3 sum) {
  return {__fmaf_rn(value.x, weight, sum.x), __fmaf_rn(value.y, weight, sum.y), __fmaf_rn(value.z, weight, sum.z)};
}

// Returns (I, dI/dx, dI/dy) at (fx, fy) of an image [height + 2 kBorder][width + 2 kBorder] with a border of zeros.
__device__ __forceinline__ float3 sample(const float4* image, Size size, float fx, float fy) {
  // Outside these limits all taps are in the zero border. NaN becomes the lower limit.
  fx = fminf(fmaxf(fx, 1.0f - kBorder), size.width + 1.0f);
  fy = fminf(fmaxf(fy, 1.0f - kBorder), size.height + 1.0f);
  const float column = floorf(fx), row = floorf(fy);
  float wx[4], wy[4];
  cubic_weights(fx - column, wx);
  cubic_weights(fy - row, wy);
  const int pitch = size.width + 2 * kBorder;
  const float4* taps = image + (static_cast<int>(row) + kBorder - 1) * pitch + static_cast<int>(column) + kBorder - 1;
  float3 sum = {0, 0, 0};
#pragma unroll
  for (int y = 0; y < 4; ++y, taps += pitch) {
    float3 along_x = {0, 0, 0};  // fma(v, w, 0) is the product, rounded once
#pragma unroll
    for (int x = 0; x < 4; ++x) along_x = multiply_add(taps[x], wx[x], along_x);
    sum = multiply_add(along_x, wy[y], sum);
  }
  return sum;
}

// ---- median ------------------------------------------------------------

template <int kA, int kB>
__device__ __forceinline__ void exchange(float2* wires) {
  const float2 a = wires[kA], b = wires[kB];
  wires[kA] = {fminf(a.x, b.x), fminf(a.y, b.y)};
  wires[kB] = {fmaxf(a.x, b.x), fmaxf(a.y, b.y)};
}

// Applies the network to wires scale * w + offset. It is unrolled at compile time, which removes unused halves of
// exchanges.
template <const auto& kNetwork, int kScale, int kOffset, size_t... kIndex>
__device__ __forceinline__ void exchange_each(float2* wires, std::index_sequence<kIndex...>) {
  (exchange<kScale * kNetwork[kIndex][0] + kOffset, kScale * kNetwork[kIndex][1] + kOffset>(wires), ...);
}

template <const auto& kNetwork, int kScale = 1, int kOffset = 0>
__device__ __forceinline__ void apply(float2* wires) {
  constexpr size_t kCount = sizeof(kNetwork) / sizeof(kNetwork[0]);
  exchange_each<kNetwork, kScale, kOffset>(wires, std::make_index_sequence<kCount>{});
}

template <const auto& kNetwork, int kSize, size_t... kColumn>
__device__ __forceinline__ void sort_columns(float2* wires, std::index_sequence<kColumn...>) {
  (apply<kNetwork, kSize, static_cast<int>(kColumn)>(wires), ...);
}

// Returns the median of both components over the kSize x kSize neighbourhood of (y, x). Edge pixels are repeated.
template <int kSize, const auto& kSortColumn, const auto& kMedianNetwork, int kWire>
__device__ __forceinline__ float2 median_at(const float2* u, Size size, int y, int x) {
  float2 wires[kSize * kSize];
#pragma unroll
  for (int i = 0; i < kSize * kSize; ++i) {
    const int row = y + i / kSize - kSize / 2, column = x + i % kSize - kSize / 2;
    const int inside_row = row < 0 ? 0 : row < size.height ? row : size.height - 1;
    const int inside_column = column < 0 ? 0 : column < size.width ? column : size.width - 1;
    wires[i] = u[inside_row * size.width + inside_column];
  }
  sort_columns<kSortColumn, kSize>(wires, std::make_index_sequence<kSize>{});
  apply<kMedianNetwork>(wires);
  return wires[kWire];
}

}  // namespace cpr::tvl1
