// The interface of the SIMD loops of TV-L1 flow, which rows.cpp implements for each CPU variant.
#pragma once

#include <cstdint>

namespace cpr::tvl1 {

constexpr int kLanes = 16;
constexpr int kMaxBlock = 8;  // the most inner iterations in one pass over the rows

// A level of the pyramid. A row of a field is `kLanes` floats of left margin, then the pixels, padded to whole vectors;
// the margin of the next row is also the right margin. The fields of one image row are adjacent, so a pass over the
// rows touches one contiguous window: state [height][kStateFields][stride], constants
// [height][kConstantFields][stride].
struct Level {
  int height, width;
  int vectors;  // ceil(width / kLanes)
  int stride;   // (vectors + 1) * kLanes
};
enum StateField { kU1, kU2, kP11, kP12, kP21, kP22, kStateFields };
enum ConstantField { kI1wx, kI1wy, kSquaredGrad, kRhoC, kConstantFields };

struct Step {
  float l_t;  // lambda * theta
  float theta;
  float taut;  // tau / theta
};

struct Rows {
  // Runs `count` <= kMaxBlock inner iterations from state `source` into `target` (another buffer; `source` is kept, so
  // the caller can repeat fewer of them). squared_change[k] = sum over pixels of |u_k - u_{k-1}|^2.
  void (*iterate)(const Level&, const Step&, const float* constants, const float* source, float* target, int count,
                  double* squared_change);
  // constants from I0 [height, width] and the interleaved I1 (I1, dI1/dx, dI1/dy, 0) bordered by kBorder zero pixels,
  // sampled bicubically at (x + u1, y + u2).
  void (*warp)(const Level&, const float* i0, const float* i1, const float* state, float* constants);
  // Median of each (size x size) neighbourhood of u1 and u2, in place, edge pixels repeated. size 3 or 5;
  // ring: scratch of 5 * (stride + 2 * kLanes) * 2 floats.
  void (*median)(const Level&, int size, float* state, float* ring);
};

}  // namespace cpr::tvl1

// One table per CPU variant, named as in dispatch.h.
namespace cpr {
namespace portable {
extern const tvl1::Rows tvl1_rows;
}
namespace avx2 {
extern const tvl1::Rows tvl1_rows;
}
namespace avx512 {
extern const tvl1::Rows tvl1_rows;
}
}  // namespace cpr
