// What the CPU's and the CUDA kernel of TV-L1 flow share, so that both walk the same pyramid and stop alike: argument
// checks, level sizes, median networks, how far to run before the next stop test.
#pragma once

#include <cmath>
#include <limits>

#include "cpr_fast.h"

#ifdef __CUDACC__
#define CPR_HOST_DEVICE __host__ __device__
#else
#define CPR_HOST_DEVICE
#endif

namespace cpr::tvl1 {

constexpr int kMinSide = 16;  // pixels; no coarser level has a shorter side
constexpr int kBorder = 4;    // zero pixels around a warped image: a tap outside reads the constant border 0
constexpr float kA = -0.75f;  // OpenCV's cubic convolution coefficient

inline const char* check(const cpr_tvl1_args& a) {
  constexpr int64_t kMaxSide = 1 << 20;
  if (a.T < 2) return "frames: at least 2 per clip are needed";
  if (a.H < 1 || a.W < 1 || a.H > kMaxSide || a.W > kMaxSide) return "frames: height and width must be 1..2^20";
  if (!(a.tau > 0 && a.lambda > 0 && a.theta > 0)) return "tau, lambda and theta must be positive";
  if (!(a.epsilon >= 0)) return "epsilon must not be negative";
  if (!(a.scale_step > 0 && a.scale_step < 1)) return "scale_step must lie between 0 and 1";
  if (a.scales < 1 || a.warps < 1 || a.inner_iterations < 1 || a.outer_iterations < 1) {
    return "scales, warps, inner_iterations and outer_iterations must be at least 1";
  }
  if (a.median != 0 && a.median != 1 && a.median != 3 && a.median != 5) return "median must be 0 or 1 (none), 3 or 5";
  return nullptr;
}

struct Size {
  int height, width;
};

// The next coarser level; there is none if a side of it falls below kMinSide.
CPR_HOST_DEVICE inline Size coarser(Size level, double scale_step) {
  return {static_cast<int>(rint(level.height * scale_step)), static_cast<int>(rint(level.width * scale_step))};
}

// Pyramid levels of an H x W image, at most `scales`.
inline int count_levels(const cpr_tvl1_args& a) {
  Size level = {static_cast<int>(a.H), static_cast<int>(a.W)};
  int count = 1;
  for (; count < a.scales; ++count) {
    level = coarser(level, a.scale_step);
    if (level.height < kMinSide || level.width < kMinSide) break;
  }
  return count;
}

// The stop test of an inner iteration: the sum over pixels of the squared change.
CPR_HOST_DEVICE inline double stop_threshold(double epsilon, Size level) {
  return static_cast<float>(epsilon * epsilon * level.height * level.width);
}

constexpr double kNoError = std::numeric_limits<double>::max();  // before the first iteration

// How many inner iterations, `most` at most, to run before looking at their errors. The error falls about
// geometrically, ever slower, so extrapolating its last ratio seldom overshoots the stop; an overshoot costs time
// (8-11 % of the iterations, measured on real clips), never the result.
CPR_HOST_DEVICE inline int block_length(double previous, double error, double threshold, int most) {
  double length = 2;
  if (error == kNoError) {
    length = 3;
  } else if (error < previous) {
    length = ceil(log(threshold / error) / log(error / previous));
  }
  return length < 1 ? 1 : length < most ? static_cast<int>(length) : most;
}

// A compare-exchange network is a list of wire pairs; the lesser value goes to the first.
using Wire = unsigned char;
constexpr Wire kSort3[][2] = {{0, 1}, {1, 2}, {0, 1}};
constexpr Wire kSort5[][2] = {{0, 1}, {3, 4}, {2, 4}, {2, 3}, {0, 3}, {0, 2}, {1, 4}, {1, 3}, {1, 2}};
// Wires 3 r + c, columns sorted: the median is the median of (largest of row 0, median of row 1, least of row 2).
constexpr Wire kMedian9[][2] = {{0, 1}, {1, 2}, {3, 4}, {4, 5}, {3, 4}, {7, 8}, {6, 7}, {2, 4}, {4, 6}, {2, 4}};
constexpr int kMedian9Wire = 4;
// Wires 5 r + c, columns sorted: pruned from row sorts and a median of the 13 wires that can hold it, so that all
// 6^5 sorted-column 0-1 inputs still give the median (the 0-1 principle). 88 min/max operations remain.
constexpr Wire kMedian25[][2] = {{0, 1},   {3, 4},   {2, 3},   {0, 3},   {1, 4},   {1, 3},   {5, 6},   {8, 9},
                                 {7, 9},   {5, 8},   {6, 9},   {6, 8},   {6, 7},   {10, 11}, {13, 14}, {12, 14},
                                 {12, 13}, {10, 12}, {11, 14}, {11, 12}, {15, 16}, {17, 19}, {17, 18}, {15, 18},
                                 {15, 17}, {16, 19}, {16, 18}, {23, 24}, {22, 24}, {22, 23}, {20, 23}, {20, 22},
                                 {21, 22}, {11, 13}, {15, 11}, {12, 13}, {13, 17}, {11, 7},  {13, 9},  {7, 16},
                                 {8, 13},  {7, 8},   {12, 13}, {13, 16}, {8, 3},   {20, 12}, {8, 20},  {12, 13},
                                 {13, 3},  {20, 4},  {12, 13}, {20, 12}, {13, 4},  {12, 21}, {12, 13}, {13, 21}};
constexpr int kMedian25Wire = 13;

}  // namespace cpr::tvl1
