// Resizes pictures of bytes with an antialiased filter, in the fixed-point arithmetic of torch's `interpolate`: the
// result is the same, bit for bit. First along the rows, then along the columns, each rounded to bytes.
#pragma once

#include <stdint.h>

namespace cpr::resize {

// One axis, as the kernels read it. A pair is two neighbouring pixels, 2p and 2p + 1. Every output pixel is a sum over
// `pairs` pairs from `first` on; a weight holds those of both pixels of a pair, two int16, the first in the low half.
struct Axis {
  int64_t in, out;
  int pairs;               // at most ceil(in / 2), so that every sum stays within the picture
  int precision;           // a weight of 1 is 2^precision
  const int32_t* first;    // [out rounded up to a multiple of 4]
  const int32_t* weights;  // [the same, pairs]
};

// Frames [count, rows.in, columns.in, channels] in, pictures [count, rows.out, columns.out, 3] out. With two channels
// (u, v), the pictures are (128, v, u).
struct Job {
  const uint8_t* frames;
  int64_t count, frame_stride, row_stride;  // bytes; the pixels of a row are adjacent
  int channels;                             // 2 or 3
  Axis rows, columns;
  uint8_t* out;
};

}  // namespace cpr::resize

// One function per CPU variant, named as in dispatch.h. Returns null, or an error message.
namespace cpr {
namespace portable {
const char* resize_frames(const resize::Job&);
}
namespace avx2 {
const char* resize_frames(const resize::Job&);
}
namespace avx512 {
const char* resize_frames(const resize::Job&);
}
}  // namespace cpr
