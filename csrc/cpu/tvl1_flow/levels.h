// What the CPU's and the CUDA kernel of TV-L1 flow share, so that both walk the same pyramid and stop alike: argument
// checks, level sizes, how far to run before the next stop test.
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

}  // namespace cpr::tvl1
