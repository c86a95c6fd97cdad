// Converts 4:2:0 pictures to RGB in the 16-bit arithmetic of FFmpeg's swscale on x86: the result is the same, bit for
// bit. Each 2x2 pixels share the nearest chroma sample.
#pragma once

#include <stdint.h>

namespace cpr::yuv_to_rgb {

// A product of such a factor and a level of 8 bits times 8 keeps its upper 16 bits.
struct Factors {
  int16_t luma, offset;  // offset: the level of black, times 8
  int16_t u_to_green, u_to_blue, v_to_red, v_to_green;
};

struct Plane {
  const uint8_t* levels;
  int64_t stride;  // bytes
};

// Planes [height, width] of luma and [height / 2, width / 2] of chroma in, both sides even; out [height, width, 3].
struct Job {
  Plane y, u, v;
  int64_t height, width;
  Factors factors;
  uint8_t* out;
  int64_t out_stride;  // bytes; the pixels of a row are adjacent
};

}  // namespace cpr::yuv_to_rgb

// One function per CPU variant, named as in dispatch.h.
namespace cpr {
namespace portable {
void convert_yuv420(const yuv_to_rgb::Job&);
}
namespace avx2 {
void convert_yuv420(const yuv_to_rgb::Job&);
}
namespace avx512 {
void convert_yuv420(const yuv_to_rgb::Job&);
}
}  // namespace cpr
