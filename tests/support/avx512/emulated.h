// AVX-512 on a processor that has AVX2 only, for tests of the avx512 variant (CPR_FAST_EMULATE_AVX512 in
// CMakeLists.txt).
//
// CMake includes this file before every source of the variant. The 512-bit types and intrinsics of those sources become
// the functions of SIMDe (Debian's libsimde-dev), which computes them in two halves of 256 bits. A lane gets the same
// IEEE 754 operation either way, so the results are those of the real instructions. Their speed is not.
#pragma once

#if defined(__AVX512F__)
#error "compile for AVX2: SIMDe replaces intrinsics only where the compiler has none"
#endif

#include <immintrin.h>
#include <simde/x86/avx512.h>
#include <simde/x86/svml.h>

// SIMDe would otherwise write a multiplication and an addition, which round twice.
#if !defined(SIMDE_X86_FMA_NATIVE) || !SIMDE_NATURAL_VECTOR_SIZE_LE(256)
#error "compile for AVX2 and FMA: SIMDe does not use the fused multiply-add of this target"
#endif

#define __m512 simde__m512
#define __m512i simde__m512i

#define _mm512_add_epi32 simde_mm512_add_epi32
#define _mm512_add_ps simde_mm512_add_ps
#define _mm512_castps_si512 simde_mm512_castps_si512
#define _mm512_castsi512_ps simde_mm512_castsi512_ps
#define _mm512_cmp_ps_mask simde_mm512_cmp_ps_mask
#define _mm512_cmpeq_epi32_mask simde_mm512_cmpeq_epi32_mask
#define _mm512_cmpeq_epi64_mask simde_mm512_cmpeq_epi64_mask
#define _mm512_cmpgt_epi32_mask simde_mm512_cmpgt_epi32_mask
#define _mm512_div_ps simde_mm512_div_ps
#define _mm512_floor_ps simde_mm512_floor_ps
#define _mm512_fmadd_ps simde_mm512_fmadd_ps
#define _mm512_fnmadd_ps simde_mm512_fnmadd_ps
#define _mm512_loadu_ps simde_mm512_loadu_ps
#define _mm512_loadu_si512 simde_mm512_loadu_si512
#define _mm512_mask_add_epi32 simde_mm512_mask_add_epi32
#define _mm512_mask_mov_epi32 simde_mm512_mask_mov_epi32
#define _mm512_mask_mov_ps simde_mm512_mask_mov_ps
#define _mm512_maskz_compress_epi32 cpr_emulated_compress
#define _mm512_maskz_mov_ps simde_mm512_maskz_mov_ps
#define _mm512_max_ps simde_mm512_max_ps
#define _mm512_min_epi32 simde_mm512_min_epi32
#define _mm512_min_ps simde_mm512_min_ps
#define _mm512_mul_ps simde_mm512_mul_ps
#define _mm512_set1_epi32 simde_mm512_set1_epi32
#define _mm512_set1_epi64 simde_mm512_set1_epi64
#define _mm512_set1_ps simde_mm512_set1_ps
#define _mm512_setzero_ps simde_mm512_setzero_ps
#define _mm512_shuffle_i32x4 simde_mm512_shuffle_i32x4
#define _mm512_slli_epi32 simde_mm512_slli_epi32
#define _mm512_sqrt_ps simde_mm512_sqrt_ps
#define _mm512_srli_epi32 simde_mm512_srli_epi32
#define _mm512_storeu_ps simde_mm512_storeu_ps
#define _mm512_storeu_si512 simde_mm512_storeu_si512
#define _mm512_sub_ps simde_mm512_sub_ps
#define _mm512_unpackhi_epi32 simde_mm512_unpackhi_epi32
#define _mm512_unpackhi_epi64 simde_mm512_unpackhi_epi64
#define _mm512_unpacklo_epi32 simde_mm512_unpacklo_epi32
#define _mm512_unpacklo_epi64 simde_mm512_unpacklo_epi64
#define _mm512_xor_si512 simde_mm512_xor_si512

// Missing in SIMDe 0.7.4, the version of Debian 12.
#define _mm512_srai_epi32 cpr_emulated_srai
#define _mm512_reduce_min_epi32 cpr_emulated_reduce_min

static inline simde__m512i cpr_emulated_srai(simde__m512i a, unsigned int bits) {
  alignas(64) int lanes[16];
  simde_mm512_storeu_si512(lanes, a);
  for (int& lane : lanes) lane >>= bits;
  return simde_mm512_loadu_si512(lanes);
}

static inline int cpr_emulated_reduce_min(simde__m512i a) {
  alignas(64) int lanes[16];
  simde_mm512_storeu_si512(lanes, a);
  int least = lanes[0];
  for (int lane : lanes) least = lane < least ? lane : least;
  return least;
}

// SIMDe 0.7.4 compresses within one array, in a loop that it declares to be free of dependencies (GCC ivdep): it is
// not.
static inline simde__m512i cpr_emulated_compress(unsigned mask, simde__m512i a) {
  alignas(64) int lanes[16], packed[16] = {};
  simde_mm512_storeu_si512(lanes, a);
  for (int i = 0, count = 0; i < 16; ++i) {
    if (mask >> i & 1) packed[count++] = lanes[i];
  }
  return simde_mm512_loadu_si512(packed);
}

#define __AVX512F__ 1  // the sources choose their code by it
