#include "resize.h"

#include <algorithm>
#include <cmath>

namespace cpr {
namespace {

double bilinear(double x) { return std::max(0.0, 1 - std::abs(x)); }

double bicubic(double x) {  // cubic convolution [Keys 1981] with a = -1/2
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a;
  return 0;
}

// The pixels that one output pixel is a sum of.
struct Window {
  int64_t begin;
  std::vector<double> weights;
};

Window window_of(int64_t at, int64_t in, double scale, Filter filter) {
  const double support = (filter == Filter::kBicubic ? 2 : 1) * std::max(scale, 1.0);
  const double center = scale * (at + 0.5), shrink = scale >= 1 ? 1 / scale : 1.0;
  const int64_t begin = std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
  const int64_t end = std::min<int64_t>(static_cast<int64_t>(center + support + 0.5), in);
  Window window{begin, std::vector<double>(end - begin)};
  double total = 0;
  for (int64_t j = 0; j < end - begin; ++j) {
    const double x = (j + (begin - center) + 0.5) * shrink;
    window.weights[j] = filter == Filter::kBicubic ? bicubic(x) : bilinear(x);
    total += window.weights[j];
  }
  for (double& weight : window.weights) weight /= total;
  return window;
}

// The most bits after the point with which the largest weight is an int16.
int precision_of(double largest) {
  int bits = 0;
  while (bits < 22 && static_cast<int>(0.5 + largest * (1 << (bits + 1))) < (1 << 15)) ++bits;
  return bits;
}

}  // namespace

AxisWeights::AxisWeights(int64_t in, int64_t out, Filter filter) : in_(in), out_(out), pairs_(0) {
  std::vector<Window> windows;
  double largest = 0;
  for (int64_t at = 0; at < out; ++at) {
    windows.push_back(window_of(at, in, static_cast<double>(in) / out, filter));
    const Window& window = windows.back();
    for (double weight : window.weights) largest = std::max(largest, weight);
    const int64_t end = window.begin + static_cast<int64_t>(window.weights.size());
    pairs_ = std::max<int>(pairs_, static_cast<int>((end + 1) / 2 - window.begin / 2));
  }
  precision_ = precision_of(largest);
  const int64_t padded = (out + 3) / 4 * 4, most = (in + 1) / 2 - pairs_;
  first_.resize(padded);
  weights_.resize(padded * pairs_);
  for (int64_t at = 0; at < out; ++at) {
    const Window& window = windows[at];
    first_[at] = static_cast<int32_t>(std::min(window.begin / 2, most));
    for (size_t j = 0; j < window.weights.size(); ++j) {
      const double scaled = window.weights[j] * (1 << precision_);
      const int weight = static_cast<int>(scaled < 0 ? scaled - 0.5 : scaled + 0.5);
      const int64_t pixel = window.begin + static_cast<int64_t>(j) - 2 * first_[at];
      weights_[at * pairs_ + pixel / 2] |= static_cast<int32_t>((weight & 0xffffu) << (16 * (pixel % 2)));
    }
  }
}

}  // namespace cpr
