// The SIMD loops of TV-L1 flow: what tvl1_flow.cpp asks of each CPU variant of rows.cpp.
#pragma once

#include <cstdint>

namespace cpr::tvl1 {

constexpr int kLanes = 16;
constexpr int kMaxBlock = 8;  // inner iterations run over the rows in one wave

// One pyramid level. A field row is `kLanes` floats of left margin, then the pixels rounded up to whole vectors; the
// margin of the next row doubles as right margin. The fields of one image row lie side by side, so a wave over the
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
  // `count` <= kMaxBlock inner iterations from state `source` into `target` (another buffer; `source` stays whole, so
  // the caller can take fewer back). squared_change[k] = sum over pixels of |u_k - u_{k-1}|^2.
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
