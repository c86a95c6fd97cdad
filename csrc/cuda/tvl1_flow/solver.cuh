// Solves one frame pair, from the pyramid to the flow, with a team of blocks: the counterpart of Solver in
// csrc/cpu/tvl1_flow/tvl1_flow.cpp.
#pragma once

#include "cpr_fast.h"
#include "cuda/tvl1_flow/pixels.cuh"
#include "cuda/tvl1_flow/team.cuh"
#include "cuda/tvl1_flow/tile.cuh"

namespace cpr::tvl1 {

// The part of the workspace that a team has. Every array is 256-byte aligned and sized for the finest level.
struct Buffers {
  float* pyramid[2];  // [pyramid_pixels], finest level first
  float4* gradient;   // [H + 2 kBorder][W + 2 kBorder] (I1, dI1/dx, dI1/dy, 0), border 0
  float4* constants;  // [H][W]
  State state[2];     // the current one and the next
  float* partial[2];  // [tiles][kHalo], used in turn: a block may still read the previous one
};

__host__ __device__ inline int64_t aligned(int64_t bytes) { return round_up(bytes, 256); }

// Assigns the arrays one after another, from `base`; returns their size in bytes. With a null base it only
// computes the size.
__host__ __device__ inline int64_t lay_out(const cpr_tvl1_args& a, int64_t pyramid_pixels, char* base, Buffers* out) {
  const Size finest = {static_cast<int>(a.H), static_cast<int>(a.W)};
  const int64_t pixels = a.H * a.W, bordered = (a.H + 2 * kBorder) * (a.W + 2 * kBorder);
  int64_t offset = 0;
  const auto take = [&](int64_t bytes) {
    char* const part = base + offset;
    offset += aligned(bytes);
    return part;
  };
  for (float*& frame : out->pyramid) frame = reinterpret_cast<float*>(take(pyramid_pixels * sizeof(float)));
  out->gradient = reinterpret_cast<float4*>(take(bordered * sizeof(float4)));
  out->constants = reinterpret_cast<float4*>(take(pixels * sizeof(float4)));
  for (State& state : out->state) {
    state.u = reinterpret_cast<float2*>(take(pixels * sizeof(float2)));
    state.p = reinterpret_cast<float4*>(take(pixels * sizeof(float4)));
  }
  for (float*& partial : out->partial) {
    partial = reinterpret_cast<float*>(take(int64_t{count_tiles(finest)} * kHalo * sizeof(float)));
  }
  return offset;
}

// In dynamic shared memory. Methods find it through shared_memory<Shared>(): a reference that is a member would lose
// its address space, and every access through it would be one of generic memory.
struct Shared {
  TileMemory tile;
  double errors[kHalo];
};

// One level of the pyramids.
struct Level {
  Size size;
  int64_t offset;  // of its first pixel in a pyramid
};

__device__ inline Level level_at(const cpr_tvl1_args& a, int scale) {
  Level level = {{static_cast<int>(a.H), static_cast<int>(a.W)}, 0};
  for (; scale > 0; --scale) {
    level.offset += int64_t{level.size.height} * level.size.width;
    level.size = coarser(level.size, a.scale_step);
  }
  return level;
}

// One block's view of the pair of its team. All threads of all blocks of the team call the methods together. A method
// whose results other blocks read ends with the barrier of the team. The steps are not inlined, because together they
// spill.
class Solver {
 public:
  __device__ Solver(const cpr_tvl1_args& a, const Team& team, const Buffers& buffers)
      : a_(a), team_(team), b_(buffers) {}

  // flow: out [2, H, W]. Returns the pixel-iterations done.
  __device__ int64_t solve(int levels, float* flow) {
    int64_t pixel_iterations = 0;
    for (int scale = levels - 1; scale >= 0; --scale) {
      start_level(scale, scale == levels - 1);
      const Size size = problem_.size;
      for (int warp = 0; warp < a_.warps; ++warp) {
        warp_images(scale);
        pixel_iterations += iterate_to_convergence() * size.height * size.width;
      }
    }
    store_flow(flow);
    return pixel_iterations;
  }

  // Computes the pyramids of both frames. Returns whether all pixels are finite.
  __device__ bool build_pyramids(int levels, int64_t first_frame, unsigned* not_finite) {
    const int64_t pixels = a_.H * a_.W;
    for (int frame = 0; frame < 2; ++frame) {
      const int64_t start = (first_frame + frame) * pixels;
      each_pixel(pixels, [&](int64_t i) {
        const float value = a_.frames_are_uint8 ? static_cast<const unsigned char*>(a_.frames)[start + i]
                                                : static_cast<const float*>(a_.frames)[start + i] * 255.0f;
        if (!(fabsf(value) <= 3.402823466e38f)) atomicOr(not_finite, 1u);
        b_.pyramid[frame][i] = value;
      });
    }
    team_.wait();
    for (int scale = 1; scale < levels; ++scale) {
      const Level finer = level_at(a_, scale - 1), level = level_at(a_, scale);
      for (int frame = 0; frame < 2; ++frame) {
        const float* source = b_.pyramid[frame] + finer.offset;
        float* target = b_.pyramid[frame] + level.offset;
        resize(finer.size, level.size, 1 / a_.scale_step, 1 / a_.scale_step,
               [&](int64_t i, const Tap& y, const Tap& x) {
                 target[i] =
                     interpolate(y, x, [&](int row, int column) { return source[row * finer.size.width + column]; });
               });
      }
      team_.wait();
    }
    return *static_cast<volatile unsigned*>(not_finite) == 0;
  }

  template <typename Body>
  __device__ void each_pixel(int64_t count, Body body) const {
    for (int64_t i = int64_t{team_.rank} * kThreads + threadIdx.x; i < count; i += int64_t{team_.size} * kThreads) {
      body(i);
    }
  }

 private:
  template <typename Body>
  __device__ void resize(Size source, Size target, double scale_y, double scale_x, Body body) const {
    each_pixel(int64_t{target.height} * target.width, [&](int64_t i) {
      const int y = static_cast<int>(i / target.width), x = static_cast<int>(i % target.width);
      body(i, make_tap(y, source.height, scale_y), make_tap(x, source.width, scale_x));
    });
  }

  // Starts a level: zeroes the duals, takes u from the coarser level (zero at the coarsest), computes the gradient of
  // I1.
  __device__ __noinline__ void start_level(int scale, bool coarsest) {
    const Level level = level_at(a_, scale);
    const Size size = level.size, source_size = problem_.size;
    const float2* source = b_.state[current_].u;
    State target = b_.state[current_ ^ 1];
    each_pixel(int64_t{size.height} * size.width, [&](int64_t i) {
      target.p[i] = {0, 0, 0, 0};
      if (coarsest) target.u[i] = {0, 0};
    });
    if (!coarsest) {
      const float gain = static_cast<float>(1 / a_.scale_step);
      const double scale_y = static_cast<double>(source_size.height) / size.height;
      const double scale_x = static_cast<double>(source_size.width) / size.width;
      resize(source_size, size, scale_y, scale_x, [&](int64_t i, const Tap& y, const Tap& x) {
        const auto at = [&](int row, int column) { return source[row * source_size.width + column]; };
        target.u[i] = {interpolate(y, x, [&](int row, int column) { return at(row, column).x; }) * gain,
                       interpolate(y, x, [&](int row, int column) { return at(row, column).y; }) * gain};
      });
    }
    interleave_gradient(b_.pyramid[1] + level.offset, size);
    problem_ = {
        size,
        {static_cast<float>(a_.lambda * a_.theta), static_cast<float>(a_.theta), static_cast<float>(a_.tau / a_.theta)},
        b_.constants};
    current_ ^= 1;
    team_.wait();
  }

  // Central differences; at the edges one-sided, still divided by 2.
  __device__ void interleave_gradient(const float* image, Size size) const {
    const int pitch = size.width + 2 * kBorder;
    each_pixel(int64_t{size.height + 2 * kBorder} * pitch, [&](int64_t i) {
      const int y = static_cast<int>(i / pitch) - kBorder, x = static_cast<int>(i % pitch) - kBorder;
      float4 pixel = {0, 0, 0, 0};
      if (x >= 0 && y >= 0 && x < size.width && y < size.height) {
        const float* row = image + y * size.width;
        const int above = y > 0 ? -size.width : 0, below = y < size.height - 1 ? size.width : 0;
        pixel.x = row[x];
        pixel.y = 0.5f * (row[x < size.width - 1 ? x + 1 : x] - row[x > 0 ? x - 1 : x]);
        pixel.z = 0.5f * (row[x + below] - row[x + above]);
      }
      b_.gradient[i] = pixel;
    });
  }

  // Computes the constants of the linearisation around the current u.
  __device__ __noinline__ void warp_images(int scale) {
    const Level level = level_at(a_, scale);
    const float* i0 = b_.pyramid[0] + level.offset;
    const float2* u = b_.state[current_].u;
    each_pixel(int64_t{level.size.height} * level.size.width, [&](int64_t i) {
      const int y = static_cast<int>(i / level.size.width), x = static_cast<int>(i % level.size.width);
      const float3 warped = sample(b_.gradient, level.size, x + u[i].x, y + u[i].y);
      b_.constants[i] = {warped.y, warped.z, warped.y * warped.y + warped.z * warped.z,
                         warped.x - warped.y * u[i].x - warped.z * u[i].y - i0[i]};
    });
    team_.wait();
  }

  // Runs the outer and inner iterations of one warp. Returns the number of inner iterations.
  __device__ int64_t iterate_to_convergence() {
    const double threshold = stop_threshold(a_.epsilon, problem_.size);
    double previous = 0, error = kNoError;
    int64_t iterations = 0;
    for (int outer = 0; outer < a_.outer_iterations && error > threshold; ++outer) {
      if (a_.median > 1) filter_flow();
      for (int inner = 0; inner < a_.inner_iterations && error > threshold;) {
        const int done = iterate_block(threshold, a_.inner_iterations - inner, previous, error);
        inner += done;
        iterations += done;
      }
    }
    return iterations;
  }

  // Runs a block of inner iterations. If the stop test holds within it, runs fewer from the same start again.
  __device__ int iterate_block(double threshold, int remaining, double& previous, double& error) {
    int count = block_length(previous, error, threshold, remaining < kHalo ? remaining : kHalo);
    iterate(count);
    const Shared& shared = shared_memory<Shared>();
    int stop = 0;
    while (stop < count && shared.errors[stop] > threshold) ++stop;
    if (stop + 1 < count) iterate(count = stop + 1);
    current_ ^= 1;
    previous = count > 1 ? shared.errors[count - 2] : error;
    error = shared.errors[count - 1];
    return count;
  }

  // Runs `count` inner iterations from the current state into the other one. Computes their errors.
  __device__ __noinline__ void iterate(int count) {
    Shared& shared = shared_memory<Shared>();
    const int tiles = count_tiles(problem_.size);
    float* partial = b_.partial[turn_ ^= 1];
    for (int tile = team_.rank; tile < tiles; tile += team_.size) {
      iterate_tile(problem_, tile, count, b_.state[current_], b_.state[current_ ^ 1], shared.tile,
                   partial + tile * kHalo);
    }
    team_.wait();
    const int k = threadIdx.x / kWarp;
    if (k < count) {  // warp k sums the changes of iteration k
      double sum = 0;
      for (int tile = threadIdx.x % kWarp; tile < tiles; tile += kWarp) sum += partial[tile * kHalo + k];
      sum = warp_reduce(sum, Sum());
      if (threadIdx.x % kWarp == 0) shared.errors[k] = sum;
    }
    __syncthreads();
  }

  __device__ __noinline__ void filter_flow() {
    const Size size = problem_.size;
    const float2* u = b_.state[current_].u;
    float2* filtered = b_.state[current_ ^ 1].u;
    each_pixel(int64_t{size.height} * size.width, [&](int64_t i) {
      const int y = static_cast<int>(i / size.width), x = static_cast<int>(i % size.width);
      filtered[i] = a_.median == 3 ? median_at<3, kSort3, kMedian9, kMedian9Wire>(u, size, y, x)
                                   : median_at<5, kSort5, kMedian25, kMedian25Wire>(u, size, y, x);
    });
    State& now = b_.state[current_];
    State& next = b_.state[current_ ^ 1];
    float2* const unfiltered = now.u;
    now.u = next.u, next.u = unfiltered;
    team_.wait();
  }

  __device__ void store_flow(float* flow) const {
    const int64_t pixels = a_.H * a_.W;
    each_pixel(pixels, [&](int64_t i) {
      const float2 u = b_.state[current_].u[i];
      flow[i] = u.x, flow[pixels + i] = u.y;
    });
  }

  const cpr_tvl1_args& a_;
  const Team& team_;
  Buffers b_;
  Problem problem_ = {};  // of the current level
  int current_ = 0;       // of the two states
  int turn_ = 0;          // of the two arrays of partial errors
};

}  // namespace cpr::tvl1
