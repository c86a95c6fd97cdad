// How a launch divides its pairs among teams of blocks, and where the arrays of a team are. The kernel has both as a
// parameter: its threads need no registers for them, and compute addresses of global memory from them.
#pragma once

#include "cpr_fast.h"
#include "cpu/tvl1_flow/levels.h"
#include "cuda/tvl1_flow/team.cuh"
#include "cuda/tvl1_flow/tile.cuh"

namespace cpr::tvl1 {

// Offsets in bytes of the arrays of a team in its part of the workspace. Every array is 256-byte aligned and sized for
// the finest level.
struct Layout {
  int64_t pyramid[2];  // float [pyramid pixels], finest level first
  int64_t gradient;    // float4 [H + 2 kBorder][W + 2 kBorder], (I1, dI1/dx, dI1/dy, 0), border 0
  int64_t constants;   // float4 [H][W]
  int64_t u[2], p[2];  // float2 and float4 [H][W], the arrays of State: the current ones and the next
  int64_t partial[2];  // float [tiles][kHalo], used in turn: a block may still read the previous one
  int64_t bytes;       // of all arrays
};

// Zeroed before the launch.
struct TeamSync {
  TeamBarrier barrier;
  unsigned not_finite;  // a frame of the current pair has a NaN or infinite pixel
  unsigned unused;
  long long pair;  // the pair that the team works on, -1: none is left
};

struct Plan {
  int levels, teams, size;  // levels = 0: the device cannot run the kernel
  const char* error;        // or null: why it cannot
  Layout layout;
};

inline int64_t aligned(int64_t bytes) { return round_up(bytes, 256); }

// levels: of the pyramids.
inline Layout lay_out(const cpr_tvl1_args& a, int levels) {
  const Size finest = {static_cast<int>(a.H), static_cast<int>(a.W)};
  const int64_t pixels = a.H * a.W, bordered = (a.H + 2 * kBorder) * (a.W + 2 * kBorder);
  int64_t pyramid_pixels = 0;
  Size level = finest;
  for (int scale = 0; scale < levels; ++scale, level = coarser(level, a.scale_step)) {
    pyramid_pixels += int64_t{level.height} * level.width;
  }
  Layout layout = {};
  const auto take = [&](int64_t count, size_t size) {
    const int64_t offset = layout.bytes;
    layout.bytes += aligned(count * static_cast<int64_t>(size));
    return offset;
  };
  for (int64_t& frame : layout.pyramid) frame = take(pyramid_pixels, sizeof(float));
  layout.gradient = take(bordered, sizeof(float4));
  layout.constants = take(pixels, sizeof(float4));
  for (int64_t& u : layout.u) u = take(pixels, sizeof(float2));
  for (int64_t& p : layout.p) p = take(pixels, sizeof(float4));
  for (int64_t& partial : layout.partial) partial = take(int64_t{count_tiles(finest)} * kHalo, sizeof(float));
  return layout;
}

}  // namespace cpr::tvl1
