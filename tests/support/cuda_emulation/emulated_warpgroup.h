// csrc/cuda/common/warpgroup.cuh for the emulated device. A product is executed only when it is waited for, so that a
// missing wait or commit is noticed: until then its sums are NaN. Its factors must be then what they were when it was
// started, so that whatever is overwritten too early is noticed, too. The rule on fences is stricter than that of PTX:
// the first product after each commit and wait needs one, whether or not registers have been written.
#pragma once

#include "cuda_runtime.h"
#include "emulated_tensor_core.h"

namespace emulation {

uint32_t shared_address(const void* shared);
void publish_to_products();
void fence_registers();
void commit_products();
void wait_for_products();

struct Started {
  float* sum;  // [columns / 8][4]
  int columns;
  const uint32_t* factor;  // of 16 x 16 elements a warp
  uint64_t other;          // the descriptor of the factor in shared memory
  bool transposed, accumulates;
  Element element;
};
void start_product(const Started& product, Site site);

}  // namespace emulation

namespace cpr {

EMULATED_INLINE uint32_t shared_address(const void* shared) { return emulation::shared_address(shared); }
EMULATED_INLINE void publish_to_products() { emulation::publish_to_products(); }
template <typename Registers>
EMULATED_INLINE void pin_registers(Registers&) {}  // the host knows of the accesses of products
EMULATED_INLINE void fence_registers() { emulation::fence_registers(); }
EMULATED_INLINE void commit_products() { emulation::commit_products(); }
EMULATED_INLINE void wait_for_products() { emulation::wait_for_products(); }

template <typename T, bool kAccumulates>
EMULATED_INLINE void start_product(float (&sum)[8][4], const uint32_t (&a)[4], uint64_t b, EMULATED_SITE) {
  emulation::start_product({&sum[0][0], 64, a, b, false, kAccumulates, emulation::element_of(T())}, {file, line});
}

template <typename T>
EMULATED_INLINE void start_transposed_product(float (&sum)[16][4], const uint32_t (&a)[4], uint64_t b, EMULATED_SITE) {
  emulation::start_product({&sum[0][0], 128, a, b, true, true, emulation::element_of(T())}, {file, line});
}

}  // namespace cpr
