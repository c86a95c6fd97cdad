#include "yuv_to_rgb.h"

#include <cmath>

namespace cpr {
namespace {

constexpr int64_t kOne = 1 << 16;

// swscale's tables hold the factors of chroma of the range 16..240, times 65536.
int64_t of_chroma(double factor, bool full_range) {
  const int64_t limited = std::llround(factor * kOne * 255 / 224);
  return full_range ? limited * 224 / 255 : limited;
}

// A factor for levels that are multiplied by 8 and then divided by 65536.
int16_t of_products(int64_t factor) { return static_cast<int16_t>((factor * 8192 + (1 << 15)) >> 16); }

}  // namespace

yuv_to_rgb::Factors factors_of(double red, double blue, bool full_range) {
  const double green = 1 - red - blue;
  const auto chroma = [&](double factor) { return of_chroma(factor, full_range); };
  return {of_products(full_range ? kOne : kOne * 255 / 219),
          static_cast<int16_t>(full_range ? 0 : 16 * 8),
          of_products(-chroma(2 * (1 - blue) * blue / green)),
          of_products(chroma(2 * (1 - blue))),
          of_products(chroma(2 * (1 - red))),
          of_products(-chroma(2 * (1 - red) * red / green))};
}

}  // namespace cpr
