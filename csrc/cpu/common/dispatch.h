// Run-time choice of the CPU variant. Kernel sources are compiled once per variant (CMakeLists.txt defines
// CPR_VARIANT as avx512, avx2 or portable, and sets the matching instruction set) into a namespace of that name.
// Such a source must not call an inline function of a shared header (std::sort, std::vector, ...) that the compiler
// might emit out of line: the linker keeps one copy for all variants, possibly one that this machine cannot run.
#pragma once

#include "cpr_fast.h"
#include "cpu/resize/resize.h"
#include "cpu/yuv_to_rgb/yuv_to_rgb.h"

namespace cpr {

struct KernelTable {
  const char* name;
  const char* (*cascade_select)(const cpr_cascade_args*, cpr_parallel_for);
  const char* (*mil_nce_forward)(const cpr_mil_nce_args*, const cpr_mil_nce_outputs*, cpr_parallel_for);
  const char* (*mil_nce_grad_memory)(const cpr_mil_nce_args*, const void* grad_loss, const void* lse_all,
                                     const void* lse_positive, void* grad_memory, cpr_parallel_for);
  const char* (*cascade_mil_nce)(const cpr_cascade_args*, const cpr_mil_nce_args*, int64_t view,
                                 const cpr_mil_nce_outputs*, cpr_parallel_for);
  const char* (*batch_norm_forward)(const cpr_batch_norm_args*, const cpr_batch_norm_running*, float* y, double* mean,
                                    double* variance, cpr_parallel_for);
  const char* (*batch_norm_backward)(const cpr_batch_norm_args*, const double* mean, const double* variance,
                                     const float* grad, float* grad_x, float* grad_weight, float* grad_bias,
                                     cpr_parallel_for);
  const char* (*resize_frames)(const resize::Job&);
  void (*convert_yuv420)(const yuv_to_rgb::Job&);
};

// Returns the variant in use, see cpr_cpu_variant.
const KernelTable& kernels();

#define CPR_DECLARE_VARIANT(variant)                                                                                  \
  namespace variant {                                                                                                 \
  const char* cascade_select(const cpr_cascade_args*, cpr_parallel_for);                                              \
  const char* mil_nce_forward(const cpr_mil_nce_args*, const cpr_mil_nce_outputs*, cpr_parallel_for);                 \
  const char* mil_nce_grad_memory(const cpr_mil_nce_args*, const void*, const void*, const void*, void*,              \
                                  cpr_parallel_for);                                                                  \
  const char* cascade_mil_nce(const cpr_cascade_args*, const cpr_mil_nce_args*, int64_t, const cpr_mil_nce_outputs*,  \
                              cpr_parallel_for);                                                                      \
  const char* batch_norm_forward(const cpr_batch_norm_args*, const cpr_batch_norm_running*, float*, double*, double*, \
                                 cpr_parallel_for);                                                                   \
  const char* batch_norm_backward(const cpr_batch_norm_args*, const double*, const double*, const float*, float*,     \
                                  float*, float*, cpr_parallel_for);                                                  \
  }
CPR_DECLARE_VARIANT(portable)
#if defined(__x86_64__)
CPR_DECLARE_VARIANT(avx2)
CPR_DECLARE_VARIANT(avx512)
#endif
#undef CPR_DECLARE_VARIANT

}  // namespace cpr
