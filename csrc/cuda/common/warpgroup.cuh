// Matrix products of a warpgroup, four neighbouring warps: `wgmma`, which only sm_90a has. A product runs beside the
// instructions that follow it, and reads shared memory and the registers of its operands until it has been waited for.
// tests/support/cuda_emulation implements this file on the host.
//
// Sources: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions", for the rules, the
// descriptors and the layouts.
#pragma once

#include <string.h>

#include <type_traits>

#include "cuda/common/launch.cuh"
#include "cuda/common/tensor_core.cuh"

// Whether the kernels that use this file are compiled: on the host, which emulates them, and for sm_90a.
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CPR_HAS_WARPGROUP_PRODUCTS
#endif

namespace cpr {

constexpr int kWarpgroup = 128;  // threads
// Rows of shared memory that hold a factor: 128 bytes, whose eight vectors of 16 bytes are permuted so that
// neighbouring rows have them in different banks. Vector v of row r is at place v ^ r % 8.
constexpr int kSwizzledBytes = 128, kSwizzledRows = 8;

// Returns where vector `vector` of row `row` is, in vectors of 16 bytes.
__host__ __device__ constexpr int swizzled(int row, int vector) {
  return row * kSwizzledRows + (vector ^ (row % kSwizzledRows));
}

// Returns whether the current device can multiply by warpgroups, and this build has the code for it.
inline bool has_warpgroup_products() {
  const char* built = cpr_cuda_architectures();
  return has_compute_capability(9, 0) && (strstr(built, "90a") != nullptr || strstr(built, "9.0a") != nullptr);
}

// Describes a factor in shared memory to a product, for swizzled rows of 128 bytes. address: of its first element, in
// bytes of shared memory; the rows begin at multiples of 1024. Rows run along n where the factor is transposed, then
// `leading_bytes` is the distance of 64 columns, and else along k, where it has no meaning. Groups of eight rows are
// next to each other.
__device__ __forceinline__ uint64_t factor_at(uint32_t address, int leading_bytes) {
  constexpr uint64_t kSwizzle128 = 1, kUnit = 16;
  return address / kUnit | static_cast<uint64_t>(leading_bytes) / kUnit << 16 |
         kSwizzledRows * kSwizzledBytes / kUnit << 32 | kSwizzle128 << 62;
}

}  // namespace cpr

#ifndef __CUDACC__
#include "emulated_warpgroup.h"
#else

namespace cpr {

// Lets products read what this thread wrote to shared memory, or what was copied there for it and it has waited for.
// The products of other threads may read it after a barrier.
__device__ __forceinline__ void publish_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The compiler keeps computations of these registers on their side of this line, as seen from the functions below. It
// knows of no use of the registers of a product after its start.
template <int kRows, int kColumns>
__device__ __forceinline__ void pin_registers(float (&registers)[kRows][kColumns]) {
#pragma unroll
  for (int i = 0; i < kRows * kColumns; ++i) asm volatile("" : "+f"(registers[i / kColumns][i % kColumns])::"memory");
}

template <int kRows, int kColumns>
__device__ __forceinline__ void pin_registers(uint32_t (&registers)[kRows][kColumns]) {
#pragma unroll
  for (int i = 0; i < kRows * kColumns; ++i) asm volatile("" : "+r"(registers[i / kColumns][i % kColumns])::"memory");
}

// Must stand between writes of registers and the first product that uses them.
__device__ __forceinline__ void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until all committed products of this warp are complete.
__device__ __forceinline__ void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

#define CPR_SUMS(n) "+f"(sum[n][0]), "+f"(sum[n][1]), "+f"(sum[n][2]), "+f"(sum[n][3])
#define CPR_SUMS_8(n)                                                                                                \
  CPR_SUMS(n), CPR_SUMS(n + 1), CPR_SUMS(n + 2), CPR_SUMS(n + 3), CPR_SUMS(n + 4), CPR_SUMS(n + 5), CPR_SUMS(n + 6), \
      CPR_SUMS(n + 7)
#define CPR_PRODUCT_64(type)                                                              \
  asm volatile(                                                                           \
      "{\n.reg .pred accumulates;\nsetp.ne.b32 accumulates, %37, 0;\n"                    \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                         \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
      "{%32, %33, %34, %35}, %36, accumulates, 1, 1, 0;\n}"                               \
      : CPR_SUMS_8(0)                                                                     \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAccumulates ? 1 : 0))
#define CPR_PRODUCT_128(type)                                                             \
  asm volatile(                                                                           \
      "{\n.reg .pred accumulates;\nsetp.ne.b32 accumulates, 1, 0;\n"                      \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                        \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
      "{%64, %65, %66, %67}, %68, accumulates, 1, 1, 1;\n}"                               \
      : CPR_SUMS_8(0), CPR_SUMS_8(8)                                                      \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// Starts sum [64, 64] = a [64, 16] b [64, 16]^T, added to `sum` if kAccumulates, of element type T, in float. Warp w of
// the group holds rows 16 w .. 16 w + 15 of a and sum, each as multiply_add does: sum[n] has columns 8 n .. 8 n + 7.
// b: described by factor_at, rows along k.
template <typename T, bool kAccumulates>
__device__ __forceinline__ void start_product(float (&sum)[8][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same<T, __half>::value) {
    CPR_PRODUCT_64("f16");
  } else {
    CPR_PRODUCT_64("bf16");
  }
}

// Starts sum [64, 128] += a [64, 16] b [16, 128]. b: described by factor_at, rows along the 128 columns.
template <typename T>
__device__ __forceinline__ void start_transposed_product(float (&sum)[16][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same<T, __half>::value) {
    CPR_PRODUCT_128("f16");
  } else {
    CPR_PRODUCT_128("bf16");
  }
}

#undef CPR_PRODUCT_128
#undef CPR_PRODUCT_64
#undef CPR_SUMS_8
#undef CPR_SUMS

}  // namespace cpr

#endif
