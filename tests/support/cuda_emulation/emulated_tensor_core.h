// csrc/cuda/common/tensor_core.cuh for the emulated device. An asynchronous copy is executed only when it is waited
// for, so that a missing wait is noticed. Instructions of a warp exchange values through the scheduler.
#pragma once

#include <deque>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace emulation {

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
};

struct Copies {
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
};

extern unsigned long products;  // matrix products of all warps: tests check that a call used tensor cores

Copies& copies();  // of the running thread; all must be complete when it ends

inline float widen_bits(uint16_t bits, __nv_bfloat16) { return __bfloat162float({bits}); }
inline float widen_bits(uint16_t bits, __half) { return __half2float({bits}); }

// Returns the elements that lane l holds of the four matrices whose rows the lanes point to.
inline void load_matrices(uint32_t (&out)[4], const void* row, bool transposed) {
  const void** rows = exchange(0xffffffffu, row);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t packed = 0;
    for (int half = 0; half < 2; ++half) {
      const int along = lane / 4, across = lane % 4 * 2 + half;
      const int r = transposed ? across : along, c = transposed ? along : across;
      const void* source = rows[matrix * 8 + r];
      if (reinterpret_cast<uintptr_t>(source) % 16 != 0) __builtin_trap();  // the row of a matrix is not aligned
      packed |= static_cast<uint32_t>(static_cast<const uint16_t*>(source)[c]) << (16 * half);
    }
    out[matrix] = packed;
  }
}
}  // namespace emulation

namespace cpr {

template <int kBytes>
void copy_async(void* shared, const void* global, bool valid) {
  static_assert(kBytes == 8 || kBytes == 16);
  if (reinterpret_cast<uintptr_t>(shared) % kBytes != 0 || reinterpret_cast<uintptr_t>(global) % kBytes != 0) {
    __builtin_trap();
  }
  emulation::copies().open.push_back({shared, global, kBytes, valid});
}

inline void commit_copies() {
  emulation::Copies& own = emulation::copies();
  own.committed.push_back(std::move(own.open));
  own.open.clear();
}

template <int kPending>
void wait_for_copies() {
  auto& committed = emulation::copies().committed;
  for (; committed.size() > kPending; committed.pop_front()) {
    for (const emulation::Copy& copy : committed.front()) {
      if (copy.valid) memcpy(copy.to, copy.from, copy.bytes);
      if (!copy.valid) memset(copy.to, 0, copy.bytes);
    }
  }
}

inline void load_matrices(uint32_t (&out)[4], const void* row) { emulation::load_matrices(out, row, false); }
inline void load_matrices_transposed(uint32_t (&out)[4], const void* row) { emulation::load_matrices(out, row, true); }

// Sums 17 addends as tensor cores do, or less exactly: each is truncated to 24 bits relative to the greatest.
inline float truncated_sum(const double (&addends)[17]) {
  double greatest = 0, total = 0;
  for (const double addend : addends) greatest = fabs(addend) > greatest ? fabs(addend) : greatest;
  const double unit = greatest > 0 && greatest < HUGE_VAL ? ldexp(1.0, ilogb(greatest) - 23) : 0;
  for (const double addend : addends) total += unit > 0 ? trunc(addend / unit) * unit : addend;
  const float rounded = static_cast<float>(total);
  return fabs(rounded) > fabs(total) ? nextafterf(rounded, 0.0f) : rounded;
}

template <typename T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands* lanes = emulation::exchange(0xffffffffu, Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = static_cast<int>(threadIdx.x) % emulation::kWarp;
  emulation::products += lane == 0;
  for (int at = 0; at < 4; ++at) {
    const int row = lane / 4 + at / 2 * 8, column = lane % 4 * 2 + at % 2;
    double addends[17];
    for (int k = 0; k < 16; ++k) {
      const Operands& of_row = lanes[row % 8 * 4 + k % 8 / 2];
      const Operands& of_column = lanes[column * 4 + k % 8 / 2];
      const uint32_t x = of_row.a[row / 8 + k / 8 * 2], y = of_column.b[k / 8];
      addends[k] = static_cast<double>(emulation::widen_bits(static_cast<uint16_t>(x >> k % 2 * 16), T())) *
                   emulation::widen_bits(static_cast<uint16_t>(y >> k % 2 * 16), T());
    }
    addends[16] = sum[at];
    sum[at] = truncated_sum(addends);
  }
}

}  // namespace cpr
