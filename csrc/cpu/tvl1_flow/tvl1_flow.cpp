// TV-L1 optical flow on the CPU: pyramid, warps and stop test. The SIMD loops are in rows.cpp.
//
// Zach, Pock, Bischof, "A duality based approach for realtime TV-L1 optical flow", 2007, with the choices of OpenCV's
// DualTVL1OpticalFlow: gray values 0..255, bilinear pyramid that ends before a side falls below 16 pixels, bicubic
// warps with a border of 0, a median filter before every outer iteration, and a stop once the mean squared change of
// an inner iteration is at most epsilon^2.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <utility>
#include <vector>

#include "cpr_fast.h"
#include "cpu/common/dispatch.h"
#include "cpu/tvl1_flow/levels.h"
#include "cpu/tvl1_flow/pair_queue.h"
#include "cpu/tvl1_flow/rows.h"
#include "cpu/tvl1_flow/stop.h"

namespace cpr::tvl1 {
namespace {

// Whether all calls are to end. A pair of 1920x1080 pixels takes seconds, so it is read before every outer iteration.
std::atomic<bool> stopping{false};

bool stops() { return stopping.load(std::memory_order_relaxed); }

Level make_level(int height, int width) {
  const int vectors = (width + kLanes - 1) / kLanes;
  return {height, width, vectors, (vectors + 1) * kLanes};
}

std::vector<Level> make_levels(const cpr_tvl1_args& a) {
  std::vector<Level> levels;
  Size size = {static_cast<int>(a.H), static_cast<int>(a.W)};
  for (int left = count_levels(a); left > 0; --left, size = coarser(size, a.scale_step)) {
    levels.push_back(make_level(size.height, size.width));
  }
  return levels;
}

// Zeroed floats, aligned to a cache line: a vector across two lines costs two accesses.
class Buffer {
 public:
  explicit Buffer(size_t floats) : lines_((floats + kLanes - 1) / kLanes) {}
  float* data() { return lines_.data()->lanes; }
  void zero(size_t floats) { std::fill_n(data(), floats, 0.0f); }
  void swap(Buffer& other) { lines_.swap(other.lines_); }

 private:
  struct alignas(64) Line {
    float lanes[kLanes];
  };
  std::vector<Line> lines_;
};

// One channel of pixels whose rows start `pitch` floats apart.
template <class Float>
struct Image {
  Float* data;
  int height, width;
  ptrdiff_t pitch;
  Float* row(int y) const { return data + y * pitch; }
};

// Where bilinear interpolation reads along one axis: between source[first] and source[second], at fraction t. Pixel
// centres are aligned.
struct Taps {
  std::vector<int> first, second;
  std::vector<float> t;

  Taps(int source, int target, double scale) : first(target), second(target), t(target) {
    for (int i = 0; i < target; ++i) {
      const double position = std::clamp((i + 0.5) * scale - 0.5, 0.0, source - 1.0);
      // As OpenCV at the far edge: shrinking reaches the last pixel at fraction 1 from its neighbour,
      // enlarging reads it directly. The results differ by rounding.
      first[i] = std::min(static_cast<int>(position), scale > 1 ? std::max(source - 2, 0) : source - 1);
      second[i] = std::min(first[i] + 1, source - 1);
      t[i] = static_cast<float>(position - first[i]);
    }
  }
};

// Returns a + (b - a) t with one rounding after the difference, as a fused multiply-add: the product is exact in
// double.
inline float lerp(float a, float b, float t) {
  return static_cast<float>(static_cast<double>(b - a) * static_cast<double>(t) + static_cast<double>(a));
}

// Computes target = gain * source, resized; scale_y and scale_x are source pixels per target pixel.
void resize(Image<const float> source, Image<float> target, double scale_y, double scale_x, float gain) {
  const Taps column(source.width, target.width, scale_x), row(source.height, target.height, scale_y);
  std::vector<float> wide(static_cast<size_t>(source.height) * target.width);
  for (int y = 0; y < source.height; ++y) {
    const float* in = source.row(y);
    float* out = wide.data() + static_cast<size_t>(y) * target.width;
    for (int x = 0; x < target.width; ++x) {
      out[x] = lerp(in[column.first[x]], in[column.second[x]], column.t[x]);
    }
  }
  for (int y = 0; y < target.height; ++y) {
    const float* above = wide.data() + static_cast<size_t>(row.first[y]) * target.width;
    const float* below = wide.data() + static_cast<size_t>(row.second[y]) * target.width;
    const float t = row.t[y];
    float* out = target.row(y);
    for (int x = 0; x < target.width; ++x) out[x] = lerp(above[x], below[x], t) * gain;
  }
}

// The grey pyramid of one frame, finest level first, with rows padded to whole vectors.
class Pyramid {
 public:
  explicit Pyramid(const std::vector<Level>& levels) : levels_(&levels) {
    for (const Level& level : levels) pixels_.emplace_back(static_cast<size_t>(level.height) * level.vectors * kLanes);
  }

  Image<float> image(size_t scale) {
    const Level& level = (*levels_)[scale];
    return {pixels_[scale].data(), level.height, level.width, ptrdiff_t{level.vectors} * kLanes};
  }

  bool finite() const { return finite_; }

  // frame: [H, W] of uint8 0..255 or float 0..1
  void build(const cpr_tvl1_args& a, int64_t frame) {
    const Image<float> finest = image(0);
    finite_ = true;
    const size_t offset = static_cast<size_t>(frame) * a.H * a.W;
    for (int y = 0; y < finest.height; ++y) {
      const size_t start = offset + static_cast<size_t>(y) * a.W;
      for (int x = 0; x < finest.width; ++x) {
        finest.row(y)[x] = a.frames_are_uint8 ? static_cast<const uint8_t*>(a.frames)[start + x]
                                              : static_cast<const float*>(a.frames)[start + x] * 255.0f;
        finite_ &= std::isfinite(finest.row(y)[x]);
      }
    }
    for (size_t scale = 1; scale < levels_->size(); ++scale) {
      const Image<float> finer = image(scale - 1);
      resize({finer.data, finer.height, finer.width, finer.pitch}, image(scale), 1 / a.scale_step, 1 / a.scale_step,
             1.0f);
    }
  }

 private:
  const std::vector<Level>* levels_;  // a pointer, so that pyramids can be swapped
  std::vector<Buffer> pixels_;
  bool finite_ = true;
};

// out: [height + 2 kBorder][width + 2 kBorder][4] = (I, dI/dx, dI/dy, 0), border 0; central differences, one-sided
// (and still halved) at the edges.
void interleave_gradient(Image<const float> image, float* out) {
  const ptrdiff_t pitch = 4 * (ptrdiff_t{image.width} + 2 * kBorder);
  std::fill(out, out + (image.height + 2 * kBorder) * pitch, 0.0f);
  for (int y = 0; y < image.height; ++y) {
    const float* here = image.row(y);
    const float* above = image.row(std::max(y - 1, 0));
    const float* below = image.row(std::min(y + 1, image.height - 1));
    float* pixel = out + (y + kBorder) * pitch + 4 * kBorder;
    for (int x = 0; x < image.width; ++x, pixel += 4) {
      pixel[0] = here[x];
      pixel[1] = 0.5f * (here[std::min(x + 1, image.width - 1)] - here[std::max(x - 1, 0)]);
      pixel[2] = 0.5f * (below[x] - above[x]);
    }
  }
}

// Solves frame pairs one after the other. Owns all buffers, sized for the finest level.
class Solver {
 public:
  Solver(const cpr_tvl1_args& a, const std::vector<Level>& levels, const Rows& rows)
      : a_(a),
        levels_(levels),
        rows_(rows),
        step_{static_cast<float>(a.lambda * a.theta), static_cast<float>(a.theta), static_cast<float>(a.tau / a.theta)},
        state_(state_size(levels[0])),
        next_(state_size(levels[0])),
        constants_(static_cast<size_t>(levels[0].height) * kConstantFields * levels[0].stride + kLanes),
        interleaved_((static_cast<size_t>(a.H) + 2 * kBorder) * (a.W + 2 * kBorder) * 4),
        ring_(10 * (static_cast<size_t>(levels[0].stride) + 2 * kLanes)),
        coarse_(2 * static_cast<size_t>(a.H) * a.W) {}

  // flow: out [2, H, W]. Returns the number of pixel-iterations.
  int64_t solve(Pyramid& first, Pyramid& second, float* flow) {
    int64_t pixel_iterations = 0;
    for (size_t scale = levels_.size(); scale-- > 0;) {
      const Level& level = levels_[scale];
      start_level(scale);
      const Image<float> i1 = second.image(scale);
      interleave_gradient({i1.data, i1.height, i1.width, i1.pitch}, interleaved_.data());
      for (int warp = 0; warp < a_.warps; ++warp) {
        rows_.warp(level, first.image(scale).data, interleaved_.data(), pixels(state_, level),
                   constants_.data() + kLanes);
        pixel_iterations += iterate_to_convergence(level) * level.height * level.width;
      }
      store_flow(level, scale == 0 ? flow : coarse_.data());
    }
    return pixel_iterations;
  }

 private:
  // One zero row above the image (its divergence reads p of row -1) and one margin after the last row.
  static size_t state_size(const Level& level) {
    return (static_cast<size_t>(level.height) + 1) * kStateFields * level.stride + kLanes;
  }

  // First pixel of row 0 of the first field.
  static float* pixels(Buffer& state, const Level& level) {
    return state.data() + kStateFields * level.stride + kLanes;
  }

  // Starts a level: zeroes duals and margins, and takes u from the coarser level, zero at the coarsest.
  void start_level(size_t scale) {
    const Level& level = levels_[scale];
    state_.zero(state_size(level));
    next_.zero(state_size(level));
    if (scale + 1 == levels_.size()) return;
    const Level& coarser = levels_[scale + 1];
    for (int field : {kU1, kU2}) {
      const size_t offset = static_cast<size_t>(field) * coarser.height * coarser.width;
      resize({coarse_.data() + offset, coarser.height, coarser.width, coarser.width},
             {pixels(state_, level) + field * level.stride, level.height, level.width,
              ptrdiff_t{kStateFields} * level.stride},
             static_cast<double>(coarser.height) / level.height, static_cast<double>(coarser.width) / level.width,
             static_cast<float>(1 / a_.scale_step));
    }
  }

  // out: [2, height, width]
  void store_flow(const Level& level, float* out) {
    for (int field : {kU1, kU2}) {
      const float* row = pixels(state_, level) + field * level.stride;
      for (int y = 0; y < level.height; ++y, row += kStateFields * level.stride) {
        out = std::copy(row, row + level.width, out);
      }
    }
  }

  // Runs the outer and inner iterations of one warp. Returns the number of inner iterations.
  int64_t iterate_to_convergence(const Level& level) {
    const double threshold = stop_threshold(a_.epsilon, {level.height, level.width});
    double previous = 0, error = kNoError;
    int64_t iterations = 0;
    for (int outer = 0; outer < a_.outer_iterations && error > threshold && !stops(); ++outer) {
      if (a_.median > 1) rows_.median(level, a_.median, pixels(state_, level), ring_.data());
      for (int inner = 0; inner < a_.inner_iterations && error > threshold;) {
        const int done = iterate_block(level, threshold, a_.inner_iterations - inner, previous, error);
        inner += done;
        iterations += done;
      }
    }
    return iterations;
  }

  // Runs a block of inner iterations. If the stop test holds within it, runs fewer from the same start again.
  int iterate_block(const Level& level, double threshold, int remaining, double& previous, double& error) {
    int count = block_length(previous, error, threshold, std::min(kMaxBlock, remaining));
    double errors[kMaxBlock];
    const auto run = [&](int length) {
      rows_.iterate(level, step_, constants_.data() + kLanes, pixels(state_, level), pixels(next_, level), length,
                    errors);
    };
    run(count);
    const int stop =
        static_cast<int>(std::find_if(errors, errors + count, [&](double e) { return !(e > threshold); }) - errors);
    if (stop + 1 < count) run(count = stop + 1);
    state_.swap(next_);
    previous = count > 1 ? errors[count - 2] : error;
    error = errors[count - 1];
    return count;
  }

  const cpr_tvl1_args& a_;
  const std::vector<Level>& levels_;
  const Rows& rows_;
  const Step step_;
  Buffer state_, next_, constants_, interleaved_, ring_, coarse_;
};

struct Job {
  const cpr_tvl1_args& args;
  const std::vector<Level>& levels;
  const Rows& rows;
  PairQueue queue;
  std::atomic<bool> out_of_memory{false};
};

// The work of one thread: solves frame pairs, numbered over all clips in order, until none is left. If the
// thread gets two adjacent pairs, the pyramid of their common frame is used for both.
void solve_pairs(Job& job) {
  const cpr_tvl1_args& a = job.args;
  try {
    Solver solver(a, job.levels, job.rows);
    Pyramid first(job.levels), second(job.levels);
    for (int64_t begin, end, last = -1; job.queue.take(begin, end); last = end) {
      for (int64_t pair = begin; pair < end && !stops(); ++pair) {
        const int64_t clip = pair / (a.T - 1), t = pair % (a.T - 1), frame = clip * a.T + t;
        if ((pair == begin && pair != last) || t == 0) {
          first.build(a, frame);
        } else {
          std::swap(first, second);
        }
        second.build(a, frame + 1);
        float* flow = a.flow + pair * 2 * a.H * a.W;
        int64_t pixel_iterations = 0;
        if (first.finite() && second.finite()) {
          pixel_iterations = solver.solve(first, second, flow);
        } else {
          std::fill_n(flow, 2 * a.H * a.W, std::numeric_limits<float>::quiet_NaN());
        }
        if (a.pixel_iterations) a.pixel_iterations[pair] = pixel_iterations;
      }
    }
  } catch (const std::bad_alloc&) {
    job.out_of_memory = true;
  }
}

// Returns the loops of the CPU variant in use.
const Rows& current_rows() {
#if defined(__x86_64__)
  if (std::strcmp(kernels().name, "avx512") == 0) return avx512::tvl1_rows;
  if (std::strcmp(kernels().name, "avx2") == 0) return avx2::tvl1_rows;
#endif
  return portable::tvl1_rows;
}

}  // namespace
}  // namespace cpr::tvl1

const char* cpr_tvl1_flow_cpu(const cpr_tvl1_args* args, int threads) {
  using namespace cpr::tvl1;
  if (const char* error = cpr_cpu_variant_error()) return error;
  if (const char* error = check(*args)) return error;
  const int64_t pairs = args->N * (args->T - 1);
  threads = static_cast<int>(std::clamp<int64_t>(pairs, 1, std::max(threads, 1)));
  try {
    const std::vector<Level> levels = make_levels(*args);
    Job job{*args, levels, current_rows(), PairQueue(pairs, threads)};
    run_in_threads(threads, [&job] { solve_pairs(job); });
    if (stops()) return "tvl1_flow: stopped";
    return job.out_of_memory ? "tvl1_flow: out of memory" : nullptr;
  } catch (const std::bad_alloc&) {
    return "tvl1_flow: out of memory";
  }
}

void cpr_tvl1_flow_stop(int stop) { cpr::tvl1::stopping = stop != 0; }
