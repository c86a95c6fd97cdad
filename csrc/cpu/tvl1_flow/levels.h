// Shared by the CPU and the CUDA kernel of TV-L1 flow (csrc/cuda/tvl1_flow), so that both use the same pyramid and stop
// at the same iteration: argument checks, sizes of the levels, and the number of iterations before the next stop test.
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

constexpr int kMinSide = 16;  // pixels; no level of the pyramid has a shorter side
constexpr int kBorder = 4;    // zero pixels around a warped image: samples outside the image read them
constexpr float kA = -0.75f;  // the coefficient of cubic convolution in OpenCV

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

// Returns the size of the next coarser level. The pyramid ends if a side of it is below kMinSide.
CPR_HOST_DEVICE inline Size coarser(Size level, double scale_step) {
  return {static_cast<int>(rint(level.height * scale_step)), static_cast<int>(rint(level.width * scale_step))};
}

// Returns the number of pyramid levels of an H x W image, at most `scales`.
inline int count_levels(const cpr_tvl1_args& a) {
  Size level = {static_cast<int>(a.H), static_cast<int>(a.W)};
  int count = 1;
  for (; count < a.scales; ++count) {
    level = coarser(level, a.scale_step);
    if (level.height < kMinSide || level.width < kMinSide) break;
  }
  return count;
}

// Inner iterations stop once the squared change, summed over pixels, is at most this threshold.
CPR_HOST_DEVICE inline double stop_threshold(double epsilon, Size level) {
  return static_cast<float>(epsilon * epsilon * level.height * level.width);
}

constexpr double kNoError = std::numeric_limits<double>::max();  // before the first iteration

// Returns how many inner iterations, at most `most`, to run before the next stop test. The error falls roughly
// geometrically and ever more slowly, so extrapolation of its last ratio seldom goes beyond the stop. If it does,
// the extra iterations are discarded: they cost time (8-11 % of the iterations on real clips) and do not change
// results.
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
