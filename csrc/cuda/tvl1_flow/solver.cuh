// Solves one frame pair, from the pyramid to the flow, with a team of blocks: the counterpart of Solver in
// csrc/cpu/tvl1_flow/tvl1_flow.cpp.
#pragma once

#include "cpr_fast.h"
#include "cuda/tvl1_flow/pixels.cuh"
#include "cuda/tvl1_flow/plan.cuh"
#include "cuda/tvl1_flow/team.cuh"
#include "cuda/tvl1_flow/tile.cuh"

namespace cpr::tvl1 {

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

struct Pixel {
  int y, x;
};

// Returns where pixel i of rows of `width` pixels is.
__device__ __forceinline__ Pixel pixel_at(unsigned i, int width) {
  const auto across = static_cast<unsigned>(width);
  return {static_cast<int>(i / across), static_cast<int>(i % across)};
}

// How far a block is with its pair: the same in all blocks of a team, except for the rank. It is in shared memory,
// because the pixels of a thread fill its registers, and one thread changes it, because double precision is slow on
// many devices.
struct Progress {
  int team, rank;  // of the block
  int64_t memory;  // offset in bytes of the part of the workspace that the team has
  int64_t pair;    // -1: none is left
  int64_t pixel_iterations;
  Step step;
  Level level;
  int u, p;              // which of the two arrays of the flow and of the duals are the current ones
  int turn;              // which of the two arrays of partial errors is written
  int count;             // inner iterations of the next block of iterations; 0: the inner iterations have ended
  int remaining;         // inner iterations, at most
  double threshold;      // of the stop test
  double error;          // the squared change in the last inner iteration
  double previous;       // in the one before
  double errors[kHalo];  // in each iteration of a block of iterations

  __device__ void start_warp(const cpr_tvl1_args& a) {
    previous = 0, error = kNoError;
    threshold = stop_threshold(a.epsilon, level.size);
  }

  // Starts the inner iterations of an outer one, with the filtered flow if there is a filter.
  __device__ void start_inner(const cpr_tvl1_args& a) {
    if (a.median > 1) u ^= 1;
    remaining = a.inner_iterations;
    plan_iterations();
  }

  // Ends a block of iterations. If the stop test held within it, fewer run from the same start again.
  __device__ void advance() {
    turn ^= 1;
    int stop = 0;
    while (stop < count && errors[stop] > threshold) ++stop;
    if (stop + 1 < count) {
      count = stop + 1;
      return;
    }
    u ^= 1, p ^= 1;
    remaining -= count;
    pixel_iterations += int64_t{count} * level.size.height * level.size.width;
    previous = count > 1 ? errors[count - 2] : error;
    error = errors[count - 1];
    plan_iterations();
  }

  __device__ void plan_iterations() {
    const bool more = error > threshold && remaining > 0;
    count = more ? block_length(previous, error, threshold, remaining < kHalo ? remaining : kHalo) : 0;
  }
};

// In dynamic shared memory. Functions find it through shared_memory<Shared>(): a reference that is a member would lose
// its address space, and every access through it would be one of generic memory.
struct Shared {
  TileMemory tile;
  Progress progress;
};

// One block's view of the pair of its team. All threads of all blocks of the team call the methods together. A method
// whose results other blocks read ends with the barrier of the team.
class Solver {
 public:
  __device__ Solver(const cpr_tvl1_args& a, const Plan& plan, TeamSync* syncs, char* memory)
      : a_(a), plan_(plan), syncs_(syncs), memory_(memory) {
    const int block = static_cast<int>(blockIdx.x);
    change([&](Progress& now) {
      now.team = block / plan.size, now.rank = block % plan.size;
      now.memory = now.team * plan.layout.bytes;
      now.step = {static_cast<float>(a.lambda * a.theta), static_cast<float>(a.theta),
                  static_cast<float>(a.tau / a.theta)};
    });
  }

  // Returns whether a pair is left.
  __device__ bool next_pair(unsigned* queue) const {
    const Team team = own_team();
    TeamSync* const sync = own_sync();
    team.wait();  // the team has finished the previous pair and no longer reads `sync`
    if (team.rank == 0 && threadIdx.x == 0) {
      const int64_t pairs = a_.N * (a_.T - 1), pair = atomicAdd(queue, 1u);
      sync->not_finite = 0;
      sync->pair = pair < pairs ? pair : -1;
    }
    team.wait();
    change([&](Progress& now) {
      now.pair = *static_cast<volatile long long*>(&sync->pair);
      now.pixel_iterations = 0, now.level = {};
      now.u = now.p = now.turn = 0;
    });
    return progress().pair >= 0;
  }

  // Computes the pyramids of both frames. Returns whether all pixels are finite.
  __device__ bool build_pyramids() const {
    // Both are less than 2^31 (check_cuda); a division of 64 bits is a function call.
    const int pair = static_cast<int>(progress().pair), clip_pairs = static_cast<int>(a_.T - 1);
    const int64_t pixels = a_.H * a_.W, first_frame = pair / clip_pairs * a_.T + pair % clip_pairs;
    unsigned* const not_finite = &own_sync()->not_finite;
    for (int frame = 0; frame < 2; ++frame) {
      const int64_t start = (first_frame + frame) * pixels;
      float* target = pyramid(frame);
      each_pixel(pixels, [&](unsigned i) {
        const float value = a_.frames_are_uint8 ? static_cast<const unsigned char*>(a_.frames)[start + i]
                                                : static_cast<const float*>(a_.frames)[start + i] * 255.0f;
        if (!(fabsf(value) <= 3.402823466e38f)) atomicOr(not_finite, 1u);
        target[i] = value;
      });
    }
    own_team().wait();
    for (int scale = 1; scale < plan_.levels; ++scale) {
      const Level finer = level_at(a_, scale - 1), level = level_at(a_, scale);
      for (int frame = 0; frame < 2; ++frame) {
        const float* source = pyramid(frame) + finer.offset;
        float* target = pyramid(frame) + level.offset;
        resize(finer.size, level.size, 1 / a_.scale_step, 1 / a_.scale_step,
               [&](unsigned i, const Tap& y, const Tap& x) {
                 target[i] =
                     interpolate(y, x, [&](int row, int column) { return source[row * finer.size.width + column]; });
               });
      }
      own_team().wait();
    }
    return *static_cast<volatile unsigned*>(not_finite) == 0;
  }

  // Computes the flow from the pyramids.
  __device__ void solve() const {
    for (int scale = plan_.levels - 1; scale >= 0; --scale) {
      start_level(scale, scale == plan_.levels - 1);
      for (int warp = 0; warp < a_.warps; ++warp) {
        warp_images();
        iterate_to_convergence();
      }
    }
    store_flow([&](unsigned i) { return flow(progress().u)[i]; });
  }

  // flow_at(i): both components at pixel i.
  template <typename FlowAt>
  __device__ void store_flow(FlowAt flow_at) const {
    const int64_t pixels = a_.H * a_.W, pair = progress().pair;
    float* flow = a_.flow + pair * 2 * a_.H * a_.W;
    each_pixel(pixels, [&](unsigned i) {
      const float2 u = flow_at(i);
      flow[i] = u.x, flow[pixels + i] = u.y;
    });
    if (a_.pixel_iterations && progress().rank == 0 && threadIdx.x == 0) {
      a_.pixel_iterations[pair] = progress().pixel_iterations;
    }
  }

 private:
  __device__ static Progress& progress() { return shared_memory<Shared>().progress; }

  // Lets one thread change the progress when all threads have read it.
  template <typename Change>
  __device__ static void change(Change body) {
    __syncthreads();
    if (threadIdx.x == 0) body(progress());
    __syncthreads();
  }

  __device__ TeamSync* own_sync() const { return &syncs_[progress().team]; }
  __device__ Team own_team() const { return {progress().rank, plan_.size, &own_sync()->barrier}; }

  // Returns an array of the team.
  template <typename T>
  __device__ T* array(int64_t offset) const {
    return reinterpret_cast<T*>(memory_ + progress().memory + offset);
  }
  template <typename T>
  __device__ T* array(const int64_t (&offsets)[2], int which) const {
    return array<T>(which == 0 ? offsets[0] : offsets[1]);
  }
  __device__ float* pyramid(int frame) const { return array<float>(plan_.layout.pyramid, frame); }
  __device__ float4* gradient() const { return array<float4>(plan_.layout.gradient); }
  __device__ float4* constants() const { return array<float4>(plan_.layout.constants); }
  __device__ float2* flow(int which) const { return array<float2>(plan_.layout.u, which); }
  __device__ float4* duals(int which) const { return array<float4>(plan_.layout.p, which); }

  // count: less than 2^31 (check_cuda), so that `i` does not overflow.
  template <typename Body>
  __device__ void each_pixel(unsigned count, Body body) const {
    const unsigned first = progress().rank * kThreads + recomputed(threadIdx.x), step = plan_.size * kThreads;
    for (unsigned i = first; i < count; i += step) body(i);
  }

  template <typename Body>
  __device__ void resize(Size source, Size target, double scale_y, double scale_x, Body body) const {
    each_pixel(target.height * target.width, [&](unsigned i) {
      const auto [y, x] = pixel_at(i, target.width);
      body(i, make_tap(y, source.height, scale_y), make_tap(x, source.width, scale_x));
    });
  }

  // Starts a level: zeroes the duals, takes u from the coarser level (zero at the coarsest), computes the gradient of
  // I1.
  __device__ void start_level(int scale, bool coarsest) const {
    const Level level = level_at(a_, scale);
    const Size size = level.size, source_size = progress().level.size;
    const float2* source = flow(progress().u);
    float2* u = flow(progress().u ^ 1);
    float4* p = duals(progress().p ^ 1);
    each_pixel(size.height * size.width, [&](unsigned i) {
      p[i] = {0, 0, 0, 0};
      if (coarsest) u[i] = {0, 0};
    });
    if (!coarsest) {
      const float gain = static_cast<float>(1 / a_.scale_step);
      const double scale_y = static_cast<double>(source_size.height) / size.height;
      const double scale_x = static_cast<double>(source_size.width) / size.width;
      resize(source_size, size, scale_y, scale_x, [&](unsigned i, const Tap& y, const Tap& x) {
        const auto at = [&](int row, int column) { return source[row * source_size.width + column]; };
        u[i] = {interpolate(y, x, [&](int row, int column) { return at(row, column).x; }) * gain,
                interpolate(y, x, [&](int row, int column) { return at(row, column).y; }) * gain};
      });
    }
    interleave_gradient(pyramid(1) + level.offset, size);
    change([&](Progress& now) {
      now.level = level;
      now.u ^= 1, now.p ^= 1;
    });
    own_team().wait();
  }

  // Central differences; at the edges one-sided, still divided by 2.
  __device__ void interleave_gradient(const float* image, Size size) const {
    const int pitch = size.width + 2 * kBorder;
    float4* target = gradient();
    each_pixel((size.height + 2 * kBorder) * pitch, [&](unsigned i) {
      const Pixel bordered = pixel_at(i, pitch);
      const int y = bordered.y - kBorder, x = bordered.x - kBorder;
      float4 pixel = {0, 0, 0, 0};
      if (x >= 0 && y >= 0 && x < size.width && y < size.height) {
        const float* row = image + y * size.width;
        const int above = y > 0 ? -size.width : 0, below = y < size.height - 1 ? size.width : 0;
        pixel.x = row[x];
        pixel.y = 0.5f * (row[x < size.width - 1 ? x + 1 : x] - row[x > 0 ? x - 1 : x]);
        pixel.z = 0.5f * (row[x + below] - row[x + above]);
      }
      target[i] = pixel;
    });
  }

  // Computes the constants of the linearisation around the current u.
  __device__ void warp_images() const {
    const Level level = progress().level;
    const float* i0 = pyramid(0) + level.offset;
    const float2* u = flow(progress().u);
    const float4* image = gradient();
    float4* target = constants();
    each_pixel(level.size.height * level.size.width, [&](unsigned i) {
      const auto [y, x] = pixel_at(i, level.size.width);
      const float3 warped = sample(image, level.size, x + u[i].x, y + u[i].y);
      target[i] = {warped.y, warped.z, warped.y * warped.y + warped.z * warped.z,
                   warped.x - warped.y * u[i].x - warped.z * u[i].y - i0[i]};
    });
    own_team().wait();
  }

  // Runs the outer and inner iterations of one warp.
  __device__ void iterate_to_convergence() const {
    change([&](Progress& now) { now.start_warp(a_); });
    for (int outer = 0; outer < a_.outer_iterations && progress().error > progress().threshold; ++outer) {
      if (a_.median > 1) filter_flow();
      change([&](Progress& now) { now.start_inner(a_); });
      while (progress().count > 0) iterate();
    }
  }

  // Runs a block of inner iterations from the current state into the other one.
  __device__ void iterate() const {
    iterate_tiles();
    own_team().wait();
    sum_errors();
    change([](Progress& now) { now.advance(); });
  }

  __device__ void iterate_tiles() const {
    const auto get_arrays = [&] {
      const Progress& now = progress();
      const State source = {flow(now.u), duals(now.p)}, target = {flow(now.u ^ 1), duals(now.p ^ 1)};
      return Arrays{now.level.size, constants(), source, target, array<float>(plan_.layout.partial, now.turn)};
    };
    const Step step = progress().step;
    for (int tile = progress().rank; tile < count_tiles(progress().level.size); tile += plan_.size) {
      iterate_tile(get_arrays, step, tile, progress().count, shared_memory<Shared>().tile);
    }
  }

  // Computes the errors of a block of iterations from those of the tiles; warp k that of iteration k.
  __device__ void sum_errors() const {
    Progress& now = progress();
    const int thread = recomputed(threadIdx.x), k = thread / kWarp, lane = thread % kWarp;
    if (!in_all_lanes(k < now.count)) return;
    const float* partial = array<float>(plan_.layout.partial, now.turn);
    const int tiles = count_tiles(now.level.size);
    double sum = 0;
    for (int tile = lane; tile < tiles; tile += kWarp) sum += partial[tile * kHalo + k];
    sum = warp_reduce(sum, Sum());
    if (lane == 0) now.errors[k] = sum;
  }

  // Writes the filtered flow where the next one will be.
  __device__ void filter_flow() const {
    const Size size = progress().level.size;
    const float2* u = flow(progress().u);
    float2* filtered = flow(progress().u ^ 1);
    each_pixel(size.height * size.width, [&](unsigned i) {
      const auto [y, x] = pixel_at(i, size.width);
      filtered[i] = a_.median == 3 ? median_at<3, kSort3, kMedian9, kMedian9Wire>(u, size, y, x)
                                   : median_at<5, kSort5, kMedian25, kMedian25Wire>(u, size, y, x);
    });
    own_team().wait();
  }

  const cpr_tvl1_args& a_;
  const Plan& plan_;
  TeamSync* syncs_;
  char* memory_;
};

}  // namespace cpr::tvl1
