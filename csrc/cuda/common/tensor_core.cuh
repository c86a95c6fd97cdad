// Instructions of sm_80 that CUDA C++ has no functions for: asynchronous copies to shared memory, loads of matrices
// from it, and the matrix product of a warp. tests/support/cuda_emulation implements them on the host, for the tests
// that run the kernels without a device.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#ifndef __CUDACC__
#include "emulated_tensor_core.h"
#else

namespace cpr {

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts a copy of kBytes (8 or 16, with that alignment) to shared memory; zeros are written unless `valid`, but
// `global` must be an address within the tensor in either case. The copy is complete when this thread has waited for
// its commit.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  static_assert(kBytes == 8 || kBytes == 16);
  const uint32_t to = shared_address(shared);
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  }
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the last kPending commits of this thread are complete.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Returns about 1 / x; infinity for subnormal x.
__device__ __forceinline__ float reciprocal(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}

// Returns a b + c for two pairs of bfloat16 numbers each, rounded once.
__device__ __forceinline__ uint32_t multiply_add_pair(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

// Returns the signs of four bfloat16 numbers, two of a and two of b, each in all bits of a byte.
__device__ __forceinline__ uint32_t signs_of_pairs(uint32_t a, uint32_t b) {
  uint32_t signs;  // __byte_perm takes no signs
  asm("prmt.b32 %0, %1, %2, 0xfdb9;" : "=r"(signs) : "r"(a), "r"(b));
  return signs;
}

// Loads four 8 x 8 matrices of 16-bit elements. Lane 8m + r passes the address of row r of matrix m, 16 bytes. Register
// m of lane l receives elements (l/4, 2(l%4)) and (l/4, 2(l%4) + 1) of matrix m.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// Loads the transposed matrices: elements (2(l%4), l/4) and (2(l%4) + 1, l/4).
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// Computes sum [16, 8] += a [16, 16] b [16, 8] of element type T, in float. With g = lane / 4 and c = 2 (lane % 4), and
// (r, c..) for the two elements at columns c and c + 1, a lane holds
// a: (g, c..), (g + 8, c..), (g, c + 8..), (g + 8, c + 8..); b0, b1: (c.., g), (c + 8.., g); sum: (g, c..), (g + 8,
// c..).
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                            uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<__half>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                     uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace cpr

#endif

namespace cpr {

// Two neighbouring 16-bit elements.
template <typename T>
struct Pair;

template <>
struct Pair<__nv_bfloat16> {
  __nv_bfloat162 values;
  __device__ __forceinline__ Pair(float x, float y) : values(__floats2bfloat162_rn(x, y)) {}
  __device__ __forceinline__ float2 widened() const { return __bfloat1622float2(values); }
  __device__ __forceinline__ uint32_t bits() const { return reinterpret_cast<const uint32_t&>(values); }
};

template <>
struct Pair<__half> {
  __half2 values;
  __device__ __forceinline__ Pair(float x, float y) : values(__floats2half2_rn(x, y)) {}
  __device__ __forceinline__ float2 widened() const { return __half22float2(values); }
};

}  // namespace cpr
