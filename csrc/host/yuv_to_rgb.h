#pragma once

#include "cpu/yuv_to_rgb/yuv_to_rgb.h"

namespace cpr {

// The factors of the conversion with which luma is red * R + (1 - red - blue) * G + blue * B (K_R and K_B of ITU-T
// H.273), rounded as swscale rounds them. The range of the levels is 0..255, or else 16..235 and for chroma 16..240.
yuv_to_rgb::Factors factors_of(double red, double blue, bool full_range);

}  // namespace cpr
