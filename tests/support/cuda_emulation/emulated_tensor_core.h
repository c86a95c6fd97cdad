// csrc/cuda/common/tensor_core.cuh for the emulated device. An asynchronous copy is executed only when it is waited
// for, so that a missing wait is noticed. Instructions of a warp exchange values through the scheduler.
#pragma once

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace emulation {

void start_copy(void* to, const void* from, int bytes, bool valid);
void commit_copies();
void wait_for_copies(unsigned pending);  // until all but the last `pending` commits of the thread are complete
void load_matrices(uint32_t (&out)[4], const void* row, bool transposed, Site site);

// The element type of a product: the value of its bits, and the exponent of its subnormal numbers.
struct Element {
  double (*widen)(uint16_t bits);
  int least_exponent;
};
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Element element, Site site);

inline Element element_of(__nv_bfloat16) {
  return {[](uint16_t bits) -> double { return __bfloat162float({bits}); }, -126};
}
inline Element element_of(__half) {
  return {[](uint16_t bits) -> double { return __half2float({bits}); }, -14};
}

}  // namespace emulation

namespace cpr {

template <int kBytes>
EMULATED_INLINE void copy_async(void* shared, const void* global, bool valid) {
  static_assert(kBytes == 8 || kBytes == 16);
  emulation::start_copy(shared, global, kBytes, valid);
}

inline float reciprocal(float x) { return 1 / (fabsf(x) < 0x1p-126f ? 0 * x : x); }

// Returns a b + c rounded to bfloat16. Rounded to float with the last bit set if anything is lost, so that the second
// rounding is right.
inline uint32_t multiply_add_bfloat16(uint32_t a, uint32_t b, uint32_t c) {
  const auto widen = [](uint32_t bits) -> double { return __uint_as_float(bits << 16); };
  const double sum = fma(widen(a), widen(b), widen(c));
  float rounded = static_cast<float>(sum);
  if (fabs(static_cast<double>(rounded)) > fabs(sum)) rounded = nextafterf(rounded, 0);
  if (rounded != sum && rounded == rounded) rounded = __uint_as_float(__float_as_uint(rounded) | 1);
  return __float2bfloat16(rounded).bits;
}

inline uint32_t multiply_add_pair(uint32_t a, uint32_t b, uint32_t c) {
  return multiply_add_bfloat16(a & 0xffff, b & 0xffff, c & 0xffff) | multiply_add_bfloat16(a >> 16, b >> 16, c >> 16)
                                                                         << 16;
}

inline uint32_t signs_of_pairs(uint32_t a, uint32_t b) {
  const auto spread = [](uint32_t bits, int sign) { return bits >> sign & 1 ? 0xffu : 0u; };
  return spread(a, 15) | spread(a, 31) << 8 | spread(b, 15) << 16 | spread(b, 31) << 24;
}

EMULATED_INLINE void commit_copies() { emulation::commit_copies(); }

template <int kPending>
EMULATED_INLINE void wait_for_copies() {
  emulation::wait_for_copies(kPending);
}

EMULATED_INLINE void load_matrices(uint32_t (&out)[4], const void* row, EMULATED_SITE) {
  emulation::load_matrices(out, row, false, {file, line});
}

EMULATED_INLINE void load_matrices_transposed(uint32_t (&out)[4], const void* row, EMULATED_SITE) {
  emulation::load_matrices(out, row, true, {file, line});
}

template <typename T>
EMULATED_INLINE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, EMULATED_SITE) {
  emulation::multiply_add(sum, a, b0, b1, emulation::element_of(T()), {file, line});
}

}  // namespace cpr
