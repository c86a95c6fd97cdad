// The inner iterations of TV-L1 flow on one tile: up to kHalo iterations between reading and writing global memory.
//
// Each iteration depends on pixels one further away. A tile is therefore computed together with kHalo pixels around it;
// each iteration invalidates one ring of them, and they are not written. Each thread keeps its pixels in registers, and
// shared memory holds what their neighbours need. Operations and rounding are those of csrc/cpu/tvl1_flow/rows.cpp.
#pragma once

#include "cpu/tvl1_flow/levels.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"

namespace cpr::tvl1 {

constexpr int kThreads = 512;
constexpr int kHalo = 4;  // the most inner iterations in one visit of a tile
constexpr int kTileWidth = 64, kTileHeight = 32;
constexpr int kRegionWidth = kTileWidth + 2 * kHalo, kRegion = kRegionWidth * (kTileHeight + 2 * kHalo);
constexpr int kPitch = kRegionWidth + 2;  // one pixel of margin on each side is read, but never used
constexpr int kCells = kPitch * (kTileHeight + 2 * kHalo + 2);
constexpr int kOwn = (kRegion + kThreads - 1) / kThreads;  // pixels of a thread

struct Step {
  float l_t;  // lambda * theta
  float theta;
  float taut;  // tau / theta
};

// The unknowns, [height][width]: the flow, and the dual variables of its components, (p11, p21) along x and (p12, p22)
// along y.
struct State {
  float2* u;
  float4* p;  // (p11, p21, p12, p22)
};

// What a block of iterations reads and writes at one level.
struct Arrays {
  Size size;
  const float4* constants;  // [height][width] (dI1w/dx, dI1w/dy, their squared norm, I1w - grad I1w . u0 - I0)
  State source, target;     // different memory
  float* partial;           // [tiles][kHalo], the squared change in each iteration
};

struct TileMemory {
  float2 u[kCells], p_x[kCells], p_y[kCells];
  float warp_change[kHalo][kThreads / kWarp];
};

// Bits that describe the place of a pixel.
enum Place { kInImage = 1, kInTile = 2, kFirstColumn = 4, kLastColumn = 8, kFirstRow = 16, kLastRow = 32 };

// A pixel of a thread: its index in TileMemory and its Place bits, in one register, because the six pixels of a thread
// fill its registers. 0: no pixel.
struct Own {
  int bits;
  static constexpr int kCellBits = 16;
  static_assert(kCells <= 1 << kCellBits);

  Own() = default;
  __device__ __forceinline__ Own(int cell, int place) : bits(place << kCellBits | cell) {}
  __device__ __forceinline__ int cell() const { return bits & ((1 << kCellBits) - 1); }
  __device__ __forceinline__ int place() const { return bits >> kCellBits; }
};

__host__ __device__ inline int tiles_across(Size size) { return (size.width + kTileWidth - 1) / kTileWidth; }
__host__ __device__ inline int count_tiles(Size size) {
  return tiles_across(size) * ((size.height + kTileHeight - 1) / kTileHeight);
}

// Returns a value that the compiler cannot know before: what depends on it is computed where it is used, not before the
// loops around it, during which it would take registers.
__device__ __forceinline__ int recomputed(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// The first pixel of a tile.
struct Corner {
  int y, x;
};

__device__ __forceinline__ Corner corner_of(Size size, int tile) {
  const int across = tiles_across(size);
  return {tile / across * kTileHeight, tile % across * kTileWidth};
}

// Finds pixel `i` of the region around a tile. pixel: its index in the image, 0 outside of it.
__device__ __forceinline__ Own place_pixel(Size size, Corner corner, int i, int* pixel) {
  const int column = i % kRegionWidth, row = i / kRegionWidth;
  const int x = corner.x - kHalo + column, y = corner.y - kHalo + row;
  const bool in_image = i < kRegion && x >= 0 && y >= 0 && x < size.width && y < size.height;
  *pixel = in_image ? y * size.width + x : 0;
  if (!in_image) return Own(0, 0);
  const bool in_tile = column >= kHalo && column < kHalo + kTileWidth && row >= kHalo && row < kHalo + kTileHeight;
  const int place = kInImage | (in_tile ? kInTile : 0) | (x == 0 ? kFirstColumn : 0) |
                    (x == size.width - 1 ? kLastColumn : 0) | (y == 0 ? kFirstRow : 0) |
                    (y == size.height - 1 ? kLastRow : 0);
  return Own((row + 1) * kPitch + column + 1, place);
}

// Returns sqrt(x^2 + y^2) with a single rounding, as hypotf: one Newton step corrects the rounding of the squares,
// their sum and the root.
__device__ __forceinline__ float rounded_hypot(float x, float y) {
  const float xx = x * x, yy = y * y;
  const float greater = fmaxf(xx, yy), lesser = fminf(xx, yy), sum = greater + lesser;
  const float lost_by_squares = __fmaf_rn(x, x, -xx) + __fmaf_rn(y, y, -yy);
  const float lost_by_sum = lesser - (sum - greater);
  const float root = sqrtf(sum);
  const float residual = __fmaf_rn(-root, root, sum) + (lost_by_squares + lost_by_sum);
  return root + residual / fmaxf(root + root, 1e-30f);
}

// Returns the divergence of the dual of one component. In the first column OpenCV adds in another order.
__device__ __forceinline__ float divergence(float p_x, float p_y, float left, float above, bool first_column) {
  return first_column ? (p_x + p_y) - above : (p_x - left) + (p_y - above);
}

// Computes the thresholding step and the primal update. Returns the new u and its squared change.
__device__ __forceinline__ float2 primal(const Step& step, float4 c, float2 u, float2 p_x, float2 p_y, float2 left,
                                         float2 above, bool first_column, float* change) {
  const float rho = c.w + (c.x * u.x + c.y * u.y);
  // The three cases of the thresholding step are one clamp. For a zero gradient the quotient is infinite or NaN; fminf
  // turns it into l_t, which is then multiplied by the gradient of 0.
  const float scale = fmaxf(fminf(rho / c.z, step.l_t), 0.0f - step.l_t);
  const float2 next = {(u.x - scale * c.x) + step.theta * divergence(p_x.x, p_y.x, left.x, above.x, first_column),
                       (u.y - scale * c.y) + step.theta * divergence(p_x.y, p_y.y, left.y, above.y, first_column)};
  const float dx = next.x - u.x, dy = next.y - u.y;
  *change = dx * dx + dy * dy;
  return next;
}

// Updates the dual of one flow component: ((p_x, p_y) + tau/theta grad u) / (1 + tau/theta |grad u|).
__device__ __forceinline__ void dual(float taut, float u_x, float u_y, float& p_x, float& p_y) {
  const float norm = 1.0f + taut * rounded_hypot(u_x, u_y);
  p_x = (p_x + taut * u_x) / norm;
  p_y = (p_y + taut * u_y) / norm;
}

// Returns the squared change of iteration k, summed over the tile.
__device__ __forceinline__ float sum_of_changes(const TileMemory& memory, unsigned k) {
  float sum = 0;
  for (const float change : memory.warp_change[k]) sum += change;
  return sum;
}

// The pixels of a thread, in its registers.
struct Pixels {
  Own own[kOwn];
  float2 u[kOwn], p_x[kOwn], p_y[kOwn];
  float4 constants[kOwn];
};

__device__ __forceinline__ void load_pixels(const Arrays& arrays, Corner corner, TileMemory& memory, Pixels& pixels) {
  auto& [own, u, p_x, p_y, constants] = pixels;
  const int thread = recomputed(threadIdx.x);
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    int pixel;
    own[j] = place_pixel(arrays.size, corner, thread + j * kThreads, &pixel);
    // Outside the image pixel 0 is read: registers that only some threads set would be taken from the start of the
    // kernel.
    u[j] = arrays.source.u[pixel];
    const float4 p = arrays.source.p[pixel];
    p_x[j] = {p.x, p.y}, p_y[j] = {p.z, p.w};
    constants[j] = arrays.constants[pixel];
    if (!own[j].place()) continue;
    memory.p_x[own[j].cell()] = p_x[j], memory.p_y[own[j].cell()] = p_y[j];
  }
}

__device__ __forceinline__ void store_pixels(const Arrays& arrays, Corner corner, const Pixels& pixels) {
  const auto& [own, u, p_x, p_y, constants] = pixels;
  const int thread = recomputed(threadIdx.x);
#pragma unroll
  for (int j = 0; j < kOwn; ++j) {
    int pixel;
    place_pixel(arrays.size, corner, thread + j * kThreads, &pixel);
    if (!(own[j].place() & kInTile)) continue;
    arrays.target.u[pixel] = u[j];
    arrays.target.p[pixel] = {p_x[j].x, p_x[j].y, p_y[j].x, p_y[j].y};
  }
}

// Runs `count` <= kHalo inner iterations on one tile. get_arrays() returns the Arrays. It is called before and after
// the iterations, so that what is needed only there takes no registers during them.
template <typename GetArrays>
__device__ inline void iterate_tile(GetArrays get_arrays, const Step& step, int tile, int count, TileMemory& memory) {
  Pixels pixels;
  auto& [own, u, p_x, p_y, constants] = pixels;
  __syncthreads();  // all threads have read the previous tile
  const Corner corner = corner_of(get_arrays().size, tile);
  load_pixels(get_arrays(), corner, memory, pixels);
  for (int k = 0; k < count; ++k) {
    __syncthreads();
    float change = 0;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      if (!own[j].place()) continue;
      const bool first_column = own[j].place() & kFirstColumn;
      const float2 zero = {0, 0}, above = own[j].place() & kFirstRow ? zero : memory.p_y[own[j].cell() - kPitch];
      float own_change;
      u[j] = primal(step, constants[j], u[j], p_x[j], p_y[j], memory.p_x[own[j].cell() - 1], above, first_column,
                    &own_change);
      if (own[j].place() & kInTile) change += own_change;
      memory.u[own[j].cell()] = u[j];
    }
    change = warp_reduce(change, Sum());
    if (threadIdx.x % kWarp == 0) memory.warp_change[k][threadIdx.x / kWarp] = change;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      if (!own[j].place()) continue;
      // The forward difference of the last column and row is 0.
      const float2 right = own[j].place() & kLastColumn ? u[j] : memory.u[own[j].cell() + 1];
      const float2 below = own[j].place() & kLastRow ? u[j] : memory.u[own[j].cell() + kPitch];
      dual(step.taut, right.x - u[j].x, below.x - u[j].x, p_x[j].x, p_y[j].x);
      dual(step.taut, right.y - u[j].y, below.y - u[j].y, p_x[j].y, p_y[j].y);
      memory.p_x[own[j].cell()] = p_x[j], memory.p_y[own[j].cell()] = p_y[j];
    }
  }
  const Arrays arrays = get_arrays();
  store_pixels(arrays, corner, pixels);
  const int k = static_cast<int>(threadIdx.x);
  if (k < count) arrays.partial[tile * kHalo + k] = sum_of_changes(memory, k);
}

}  // namespace cpr::tvl1
