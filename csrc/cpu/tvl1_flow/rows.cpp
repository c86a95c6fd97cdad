// The inner loops of TV-L1 flow (Zach, Pock, Bischof 2007, in the form of OpenCV's DualTVL1OpticalFlow).
//
// Compiled once per CPU variant. Order and rounding of every operation are those of OpenCV, because the median filter
// and the stop test amplify a difference in the last bit to pixels. All variants give the same bits.
#include "cpu/tvl1_flow/rows.h"

#include <cstddef>
#include <iterator>
#include <utility>

#include "cpu/common/vec16.h"
#include "cpu/tvl1_flow/levels.h"
#include "cpu/tvl1_flow/median_networks.h"

namespace cpr::tvl1 {
namespace {

// Returns 1 in the lanes below `count` of the last vector of a row, 0 in the others.
inline Vec16 first_lanes(int count) {
  alignas(64) static const float steps[2 * kLanes] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
  return load(steps + kLanes - count);
}

// ---- one inner iteration ---------------------------------------------------------------------------

// Returns sqrt(x^2 + y^2) with a single rounding, as hypotf: one Newton step corrects the rounding of the squares,
// their sum and the root.
inline Unit hypot(Unit x, Unit y) {
  const Unit zero = unit_broadcast(0.0f);
  const Unit xx = x * x, yy = y * y;
  const Unit greater = max(xx, yy), lesser = min(xx, yy), sum = greater + lesser;
  const Unit lost_by_squares = fma(x, x, zero - xx) + fma(y, y, zero - yy);
  const Unit lost_by_sum = lesser - (sum - greater);
  const Unit root = sqrt(sum);
  const Unit residual = fnma(root, root, sum) + (lost_by_squares + lost_by_sum);
  return root + residual / max(root + root, unit_broadcast(1e-30f));
}

// Row y of an inner iteration. The source and the target may be the same buffer.
struct RowOfStep {
  const float* constants;
  const float* source;
  const float* source_above;  // row y-1 (zeros above the image)
  float* target;
};

// Updates u. The dual step has a loop of its own: in a common loop the operations of a vector are too long a chain for
// a processor to begin the next one meanwhile. Apart, an iteration on Zen 5 takes 3.2 instead of 5.4 cycles of the time
// stamp counter per pixel with AVX2, and 1.7 instead of 2.05 with AVX-512.
void primal_row(const Level& level, const Step& step, const RowOfStep& r, float* change16) {
  const int S = level.stride, last = (level.vectors - 1) * kLanes;
  const Vec16 l_t = broadcast(step.l_t), theta = broadcast(step.theta);
  const Vec16 all = broadcast(1.0f), tail = first_lanes(level.width - last);
  Vec16 change = load(change16);
  for (int x = 0; x <= last; x += kLanes) {
    const Vec16 old1 = load(r.source + kU1 * S + x), old2 = load(r.source + kU2 * S + x);
    const Vec16 wx = load(r.constants + kI1wx * S + x), wy = load(r.constants + kI1wy * S + x);
    const Vec16 rho = load(r.constants + kRhoC * S + x) + (wx * old1 + wy * old2);
    // The three cases of the thresholding step are one clamp. For a zero gradient the quotient is infinite or NaN; min
    // turns it into l_t, which is then multiplied by the gradient of 0.
    const Vec16 scale = max(min(rho / load(r.constants + kSquaredGrad * S + x), l_t), broadcast(0.0f) - l_t);
    const Vec16 p11 = load(r.source + kP11 * S + x), p12 = load(r.source + kP12 * S + x);
    const Vec16 p21 = load(r.source + kP21 * S + x), p22 = load(r.source + kP22 * S + x);
    const Vec16 p12_above = load(r.source_above + kP12 * S + x), p22_above = load(r.source_above + kP22 * S + x);
    Vec16 div1 = (p11 - load(r.source + kP11 * S + x - 1)) + (p12 - p12_above);
    Vec16 div2 = (p21 - load(r.source + kP21 * S + x - 1)) + (p22 - p22_above);
    if (x == 0) {  // in the first column OpenCV adds in another order
      div1 = first_lane((p11 + p12) - p12_above, div1);
      div2 = first_lane((p21 + p22) - p22_above, div2);
    }
    const Vec16 u1 = (old1 - scale * wx) + theta * div1;
    const Vec16 u2 = (old2 - scale * wy) + theta * div2;
    store(r.target + kU1 * S + x, u1);
    store(r.target + kU2 * S + x, u2);
    const Vec16 valid = x < last ? all : tail;
    const Vec16 d1 = (u1 - old1) * valid, d2 = (u2 - old2) * valid;
    change = change + (d1 * d1 + d2 * d2);
  }
  store(change16, change);
  for (int field : {kU1, kU2}) {  // makes the forward difference of the last column 0
    r.target[field * S + level.width] = r.target[field * S + level.width - 1];
  }
}

// Updates p of one flow component: ((pa, pb) + tau/theta grad u) / (1 + tau/theta |grad u|).
//
// u, u_below: the new u of this row and of the row below, for the last row the same.
// source, target: pa, and pb one stride after it.
void dual_row(const Level& level, const Step& step, const float* u, const float* u_below, const float* source,
              float* target) {
  const int S = level.stride;
  const Unit taut = unit_broadcast(step.taut), one = unit_broadcast(1.0f);
  for (int x = 0; x < level.vectors * kLanes; x += kUnitLanes) {
    const Unit here = unit_load(u + x), ux = unit_load(u + x + 1) - here, uy = unit_load(u_below + x) - here;
    const Unit norm = one + taut * hypot(ux, uy);
    store(target + x, (unit_load(source + x) + taut * ux) / norm);
    store(target + S + x, (unit_load(source + S + x) + taut * uy) / norm);
  }
}

// Iteration k works one row behind iteration k-1, because its row y needs only rows y-1 and y of the duals of iteration
// k-1. Every array thus passes through the cache once per block of iterations instead of once per iteration.
void iterate(const Level& level, const Step& step, const float* constants, const float* source, float* target,
             int count, double* squared_change) {
  const int S = level.stride;
  const ptrdiff_t state_pitch = ptrdiff_t{kStateFields} * S, constant_pitch = ptrdiff_t{kConstantFields} * S;
  alignas(64) float change[kMaxBlock][kLanes] = {};
  for (int front = 0; front < level.height + count; ++front) {
    for (int k = 0; k < count; ++k) {
      const int y = front - k;
      if (y < 0 || y > level.height) continue;
      const float* from = (k == 0 ? source : target) + y * state_pitch;
      float* to = target + y * state_pitch;
      if (y < level.height) {  // row -1 of both buffers is zeros
        primal_row(level, step, {constants + y * constant_pitch, from, from - state_pitch, to}, change[k]);
      }
      if (y == 0) continue;
      const float* above = from - state_pitch;
      float* to_above = to - state_pitch;
      for (auto [u, p] : {std::pair{kU1, kP11}, std::pair{kU2, kP21}}) {
        const float* below = (y < level.height ? to : to_above) + u * S;
        dual_row(level, step, to_above + u * S, below, above + p * S, to_above + p * S);
      }
    }
  }
  for (int k = 0; k < count; ++k) {
    squared_change[k] = 0;
    for (int lane = 0; lane < kLanes; ++lane) squared_change[k] += change[k][lane];
  }
}

// ---- warping ---------------------------------------------------------------------------------------

// Computes the weights of the taps at offsets -1..2 for a position t in [0, 1) between taps 0 and 1, rounded as in
// OpenCV.
inline void cubic_weights(Vec16 t, Vec16 w[4]) {
  const Vec16 one = broadcast(1.0f), a = broadcast(kA);
  const Vec16 r = one - t;
  w[0] = a * ((r * r) * t);
  w[1] = fma(fma(broadcast(kA + 2), t, broadcast(-(kA + 3))), t * t, one);
  w[3] = a * ((t * t) * r);
  w[2] = one - w[0] - w[1] - w[3];
}

// Computes sixteen neighbouring pixels (x.., y) of the three warped images I1w, I1wx, I1wy.
inline void warp_vector(const Level& level, const float* i1, Vec16 fx, Vec16 fy, Vec16 warped[3]) {
  const ptrdiff_t pitch = level.width + 2 * kBorder;
  // Outside these limits every tap is in the zero border. NaN becomes the lower limit.
  fx = min(max(fx, broadcast(1 - kBorder)), broadcast(level.width + 1));
  fy = min(max(fy, broadcast(1 - kBorder)), broadcast(level.height + 1));
  const Vec16 floor_x = floor(fx), floor_y = floor(fy);
  Vec16 weights_x[4], weights_y[4];
  cubic_weights(fx - floor_x, weights_x);
  cubic_weights(fy - floor_y, weights_y);
  alignas(64) float column[kLanes], row[kLanes], wx[4][kLanes], wy[4][kLanes], pixel[kLanes][4];
  store(column, floor_x);
  store(row, floor_y);
  for (int tap = 0; tap < 4; ++tap) {
    store(wx[tap], weights_x[tap]);
    store(wy[tap], weights_y[tap]);
  }
  for (int i = 0; i < kLanes; ++i) {
    const float* taps =
        i1 + 4 * ((static_cast<int>(row[i]) + kBorder - 1) * pitch + static_cast<int>(column[i]) + kBorder - 1);
    Vec4 along_x[4];
    for (int y = 0; y < 4; ++y, taps += 4 * pitch) {
      along_x[y] = load4(taps) * wx[0][i];
      for (int x = 1; x < 4; ++x) along_x[y] = fma(load4(taps + 4 * x), wx[x][i], along_x[y]);
    }
    Vec4 sum = along_x[0] * wy[0][i];
    for (int y = 1; y < 4; ++y) sum = fma(along_x[y], wy[y][i], sum);
    store(pixel[i], sum);
  }
  alignas(64) float channel[kLanes];
  for (int c = 0; c < 3; ++c) {
    for (int i = 0; i < kLanes; ++i) channel[i] = pixel[i][c];
    warped[c] = load(channel);
  }
}

void warp(const Level& level, const float* i0, const float* i1, const float* state, float* constants) {
  alignas(64) static const float iota[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int S = level.stride;
  for (int y = 0; y < level.height; ++y, state += kStateFields * S, constants += kConstantFields * S) {
    for (int x = 0; x < level.vectors * kLanes; x += kLanes) {
      const Vec16 u1 = load(state + kU1 * S + x), u2 = load(state + kU2 * S + x);
      Vec16 warped[3];
      warp_vector(level, i1, load(iota) + broadcast(x) + u1, broadcast(y) + u2, warped);
      const Vec16 wx = warped[1], wy = warped[2];
      store(constants + kI1wx * S + x, wx);
      store(constants + kI1wy * S + x, wy);
      store(constants + kSquaredGrad * S + x, wx * wx + wy * wy);
      store(constants + kRhoC * S + x,
            warped[0] - wx * u1 - wy * u2 - load(i0 + ptrdiff_t{y} * level.vectors * kLanes + x));
    }
  }
}

// ---- median filter ---------------------------------------------------------------------------------

inline void exchange(Unit& a, Unit& b) {
  const Unit low = min(a, b);
  b = max(a, b);
  a = low;
}

template <const auto& kNetwork, size_t... kIndex>
inline void exchange_each(Unit* wires, std::index_sequence<kIndex...>) {
  (exchange(wires[kNetwork[kIndex][0]], wires[kNetwork[kIndex][1]]), ...);
}
template <const auto& kNetwork>
inline void apply(Unit* wires) {  // unrolled at compile time, which removes unused halves of exchanges
  exchange_each<kNetwork>(wires, std::make_index_sequence<std::size(kNetwork)>{});
}

// Loads wires kSize r + c from the rows that begin `stride` floats apart. Unrolled at compile time: in a loop, the
// wires would be an array in memory.
template <int kSize, int... kIndex>
inline void load_window(const float* first, ptrdiff_t stride, Unit* wires, std::integer_sequence<int, kIndex...>) {
  ((wires[kIndex] = unit_load(first + kIndex / kSize * stride + kIndex % kSize)), ...);
}

// Copies row y of one field with its edge pixels repeated `kLanes` times on both sides.
void copy_bordered(const Level& level, const float* row, float* out) {
  for (int x = 0; x < level.vectors * kLanes; x += kLanes) store(out + kLanes + x, load(row + x));
  for (int x = 0; x < kLanes; ++x) {
    out[x] = row[0];
    out[kLanes + level.width + x] = row[level.width - 1];
  }
}

template <int kSize, const auto& kSortColumn, const auto& kMedianNetwork, int kWire>
void median_field(const Level& level, float* field, float* ring) {
  constexpr int kRadius = kSize / 2;
  const ptrdiff_t pitch = ptrdiff_t{kStateFields} * level.stride;
  const ptrdiff_t S = ptrdiff_t{level.stride} + 2 * kLanes;
  float* sorted = ring + kSize * S;
  for (int y = 0; y <= kRadius && y < level.height; ++y) copy_bordered(level, field + y * pitch, ring + y % kSize * S);
  for (int y = 0; y < level.height; ++y) {
    const float* rows[kSize];
    for (int i = 0; i < kSize; ++i) {
      const int row = y + i - kRadius;
      rows[i] = ring + (row < 0 ? 0 : row >= level.height ? level.height - 1 : row) % kSize * S;
    }
    Unit wires[kSize * kSize];
    for (int x = 0; x < (level.vectors + 2) * kLanes; x += kUnitLanes) {
      for (int i = 0; i < kSize; ++i) wires[i] = unit_load(rows[i] + x);
      apply<kSortColumn>(wires);
      for (int i = 0; i < kSize; ++i) store(sorted + i * S + x, wires[i]);
    }
    for (int x = 0; x < level.vectors * kLanes; x += kUnitLanes) {
      load_window<kSize>(sorted + kLanes + x - kRadius, S, wires, std::make_integer_sequence<int, kSize * kSize>{});
      apply<kMedianNetwork>(wires);
      store(field + y * pitch + x, wires[kWire]);
    }
    const int next = y + kRadius + 1;
    if (next < level.height) copy_bordered(level, field + next * pitch, ring + next % kSize * S);
  }
}

void median(const Level& level, int size, float* state, float* ring) {
  for (int field : {kU1, kU2}) {
    float* first = state + ptrdiff_t{field} * level.stride;
    if (size == 3) {
      median_field<3, kSort3, kMedian9, kMedian9Wire>(level, first, ring);
    } else {
      median_field<5, kSort5, kMedian25, kMedian25Wire>(level, first, ring);
    }
  }
}

}  // namespace

}  // namespace cpr::tvl1

namespace cpr::CPR_VARIANT {
const tvl1::Rows tvl1_rows = {tvl1::iterate, tvl1::warp, tvl1::median};
}  // namespace cpr::CPR_VARIANT
