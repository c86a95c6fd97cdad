// The conversion of yuv_to_rgb.h. With AVX2 a vector holds 16 pixels of each of the two rows that share their chroma,
// one row in either half, so that the terms of the chroma are computed once for both.
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

constexpr int64_t kPixels = 16;  // of a row, in a vector

// Where the 16 bytes of one third of 16 pixels RGB come from, in a vector that holds the even pixels of a channel and
// then its odd ones; -1 for bytes of other channels.
struct Order {
  alignas(16) int8_t from[3][3][16];  // [third, channel]
};
constexpr Order order() {
  Order order{};
  for (int third = 0; third < 3; ++third) {
    for (int channel = 0; channel < 3; ++channel) {
      for (int i = 0; i < 16; ++i) {
        const int byte = 16 * third + i, pixel = byte / 3;
        order.from[third][channel][i] = static_cast<int8_t>(byte % 3 == channel ? pixel / 2 + 8 * (pixel % 2) : -1);
      }
    }
  }
  return order;
}
constexpr Order kOrder = order();

struct Vectors {
  __m256i luma, offset, from[3][3];
  __m128i neutral, u_to_green, u_to_blue, v_to_red, v_to_green;

  explicit Vectors(const Factors& factors)
      : luma(_mm256_set1_epi16(factors.luma)),
        offset(_mm256_set1_epi16(factors.offset)),
        neutral(_mm_set1_epi16(kNeutral)),
        u_to_green(_mm_set1_epi16(factors.u_to_green)),
        u_to_blue(_mm_set1_epi16(factors.u_to_blue)),
        v_to_red(_mm_set1_epi16(factors.v_to_red)),
        v_to_green(_mm_set1_epi16(factors.v_to_green)) {
    for (int third = 0; third < 3; ++third) {
      for (int channel = 0; channel < 3; ++channel) {
        const auto* bytes = reinterpret_cast<const __m128i*>(kOrder.from[third][channel]);
        from[third][channel] = _mm256_broadcastsi128_si256(_mm_load_si128(bytes));
      }
    }
  }
};

inline __m128i centred(const uint8_t* chroma, __m128i neutral) {
  const __m128i levels = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(chroma)));
  return _mm_sub_epi16(_mm_slli_epi16(levels, 3), neutral);
}

inline __m256i channel_of(__m256i even, __m256i odd, __m128i chroma) {
  const __m256i both = _mm256_broadcastsi128_si256(chroma);
  return _mm256_packus_epi16(_mm256_add_epi16(even, both), _mm256_add_epi16(odd, both));
}

inline void convert_vector(const Rows& rows, int64_t x, const Vectors& use) {
  const __m128i u = centred(rows.u + x / 2, use.neutral), v = centred(rows.v + x / 2, use.neutral);
  const __m128i* upper_row = reinterpret_cast<const __m128i*>(rows.y[0] + x);
  const __m128i* lower_row = reinterpret_cast<const __m128i*>(rows.y[1] + x);
  const __m256i y =
      _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(upper_row)), _mm_loadu_si128(lower_row), 1);
  __m256i even = _mm256_slli_epi16(_mm256_and_si256(y, _mm256_set1_epi16(255)), 3);
  __m256i odd = _mm256_slli_epi16(_mm256_srli_epi16(y, 8), 3);
  even = _mm256_mulhi_epi16(_mm256_sub_epi16(even, use.offset), use.luma);
  odd = _mm256_mulhi_epi16(_mm256_sub_epi16(odd, use.offset), use.luma);
  const __m256i red = channel_of(even, odd, _mm_mulhi_epi16(v, use.v_to_red));
  const __m256i green =
      channel_of(even, odd, _mm_add_epi16(_mm_mulhi_epi16(u, use.u_to_green), _mm_mulhi_epi16(v, use.v_to_green)));
  const __m256i blue = channel_of(even, odd, _mm_mulhi_epi16(u, use.u_to_blue));
  for (int third = 0; third < 3; ++third) {
    const __m256i* from = use.from[third];
    const __m256i two = _mm256_or_si256(_mm256_shuffle_epi8(red, from[0]), _mm256_shuffle_epi8(green, from[1]));
    const __m256i bytes = _mm256_or_si256(two, _mm256_shuffle_epi8(blue, from[2]));
    const int64_t to = 3 * x + 16 * third;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rows.out[0] + to), _mm256_castsi256_si128(bytes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rows.out[1] + to), _mm256_extracti128_si256(bytes, 1));
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
