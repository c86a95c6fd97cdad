// The conversion of yuv_to_rgb.h. With AVX2 a vector holds 32 pixels of a row, the even ones and the odd ones apart, so
// that the terms of the chroma are computed once for both, and for both rows that share them.
#include "cpu/yuv_to_rgb/yuv_to_rgb.h"

#include "cpu/common/dispatch.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace cpr::CPR_VARIANT {
namespace {

using yuv_to_rgb::Factors;
using yuv_to_rgb::Job;

constexpr int kNeutral = 128 << 3;

inline int upper(int level, int16_t factor) { return (level * factor) >> 16; }
inline uint8_t clipped(int level) { return static_cast<uint8_t>(level < 0 ? 0 : level > 255 ? 255 : level); }

// Two pixels of each of two rows, which share a chroma sample.
struct Rows {
  const uint8_t *y[2], *u, *v;
  uint8_t* out[2];
};

inline void convert_block(const Rows& rows, int64_t x, const Factors& factors) {
  const int u = (rows.u[x / 2] << 3) - kNeutral, v = (rows.v[x / 2] << 3) - kNeutral;
  const int red = upper(v, factors.v_to_red), blue = upper(u, factors.u_to_blue);
  const int green = upper(u, factors.u_to_green) + upper(v, factors.v_to_green);
  for (int row = 0; row < 2; ++row) {
    for (int64_t at = x; at < x + 2; ++at) {
      const int luma = upper((rows.y[row][at] << 3) - factors.offset, factors.luma);
      uint8_t* pixel = rows.out[row] + 3 * at;
      pixel[0] = clipped(luma + red);
      pixel[1] = clipped(luma + green);
      pixel[2] = clipped(luma + blue);
    }
  }
}

#if defined(__AVX2__)

constexpr int64_t kPixels = 32;  // of a row, in a vector

// Byte i of third t of 16 pixels RGB belongs to channel (t + i) % 3. So each channel has one byte in every place i, in
// one of the thirds, and one shuffle of a channel serves all of them: a third takes its places from the three.
struct Order {
  alignas(16) int8_t from[3][16];   // [channel]: in a vector that holds the even pixels and then the odd ones
  alignas(16) int8_t place[3][16];  // [place % 3]: -1 in these places, else 0
};
constexpr Order order() {
  Order order{};
  for (int channel = 0; channel < 3; ++channel) {
    for (int i = 0; i < 16; ++i) {
      const int third = (channel + 2 * i) % 3, pixel = (16 * third + i) / 3;
      order.from[channel][i] = static_cast<int8_t>(pixel / 2 + 8 * (pixel % 2));
      order.place[channel][i] = static_cast<int8_t>(i % 3 == channel ? -1 : 0);
    }
  }
  return order;
}
constexpr Order kOrder = order();

struct Vectors {
  __m256i luma, offset, from[3], second, third, u_to_green, u_to_blue, v_to_red, v_to_green;

  explicit Vectors(const Factors& factors)
      : luma(_mm256_set1_epi16(factors.luma)),
        offset(_mm256_set1_epi16(factors.offset)),
        from{both_halves(kOrder.from[0]), both_halves(kOrder.from[1]), both_halves(kOrder.from[2])},
        second(both_halves(kOrder.place[1])),
        third(both_halves(kOrder.place[2])),
        u_to_green(_mm256_set1_epi16(factors.u_to_green)),
        u_to_blue(_mm256_set1_epi16(factors.u_to_blue)),
        v_to_red(_mm256_set1_epi16(factors.v_to_red)),
        v_to_green(_mm256_set1_epi16(factors.v_to_green)) {}

  static __m256i both_halves(const int8_t* bytes) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
};

// Returns (level - 128) * 8 of 16 levels.
inline __m256i centred(const uint8_t* chroma) {
  const __m256i levels = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(chroma)));
  return _mm256_sub_epi16(_mm256_slli_epi16(levels, 3), _mm256_set1_epi16(kNeutral));
}

// Returns the bytes of one channel in the places where the thirds need them.
inline __m256i channel_of(__m256i even, __m256i odd, __m256i chroma, __m256i from) {
  const __m256i levels = _mm256_packus_epi16(_mm256_add_epi16(even, chroma), _mm256_add_epi16(odd, chroma));
  return _mm256_shuffle_epi8(levels, from);
}

inline void convert_vector(const Rows& rows, int64_t x, const Vectors& use) {
  const __m256i u = centred(rows.u + x / 2), v = centred(rows.v + x / 2);
  const __m256i to_red = _mm256_mulhi_epi16(v, use.v_to_red), to_blue = _mm256_mulhi_epi16(u, use.u_to_blue);
  const __m256i to_green =
      _mm256_add_epi16(_mm256_mulhi_epi16(u, use.u_to_green), _mm256_mulhi_epi16(v, use.v_to_green));
  for (int row = 0; row < 2; ++row) {
    const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows.y[row] + x));
    __m256i even = _mm256_maddubs_epi16(y, _mm256_set1_epi16(8));  // times 8 and 0
    __m256i odd = _mm256_maddubs_epi16(y, _mm256_set1_epi16(8 << 8));
    even = _mm256_mulhi_epi16(_mm256_sub_epi16(even, use.offset), use.luma);
    odd = _mm256_mulhi_epi16(_mm256_sub_epi16(odd, use.offset), use.luma);
    const __m256i of[3] = {channel_of(even, odd, to_red, use.from[0]), channel_of(even, odd, to_green, use.from[1]),
                           channel_of(even, odd, to_blue, use.from[2])};
    for (int third = 0; third < 3; ++third) {
      const __m256i two = _mm256_blendv_epi8(of[third], of[(third + 1) % 3], use.second);
      const __m256i bytes = _mm256_blendv_epi8(two, of[(third + 2) % 3], use.third);
      uint8_t* out = rows.out[row] + 3 * x + 16 * third;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(bytes));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 48), _mm256_extracti128_si256(bytes, 1));
    }
  }
}

#endif

}  // namespace

void convert_yuv420(const Job& job) {
#if defined(__AVX2__)
  const Vectors vectors(job.factors);
#endif
  for (int64_t row = 0; row < job.height; row += 2) {
    const uint8_t* y = job.y.levels + row * job.y.stride;
    uint8_t* out = job.out + row * job.out_stride;
    const Rows rows{{y, y + job.y.stride},
                    job.u.levels + row / 2 * job.u.stride,
                    job.v.levels + row / 2 * job.v.stride,
                    {out, out + job.out_stride}};
    int64_t x = 0;
#if defined(__AVX2__)
    if (job.width >= kPixels) {
      for (; x + kPixels <= job.width; x += kPixels) convert_vector(rows, x, vectors);
      if (x < job.width) convert_vector(rows, job.width - kPixels, vectors);  // again some pixels of the last vector
      continue;
    }
#endif
    for (; x < job.width; x += 2) convert_block(rows, x, job.factors);
  }
}

}  // namespace cpr::CPR_VARIANT
