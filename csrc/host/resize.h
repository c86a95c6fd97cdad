#pragma once

#include <cstdint>
#include <vector>

#include "cpu/resize/resize.h"

namespace cpr {

enum class Filter { kBilinear, kBicubic };

// The weights of one axis, from `in` to `out` pixels, as torch's `interpolate(antialias=True)` rounds them.
class AxisWeights {
 public:
  AxisWeights(int64_t in, int64_t out, Filter filter);
  resize::Axis view() const { return {in_, out_, pairs_, precision_, first_.data(), weights_.data()}; }

 private:
  int64_t in_, out_;
  int pairs_, precision_;
  std::vector<int32_t> first_, weights_;
};

}  // namespace cpr
