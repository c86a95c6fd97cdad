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
  int64_t (*mil_nce_part_entries)(int64_t K);
  const char* (*mil_nce_partial)(const cpr_mil_nce_args*, int64_t entries, void* partials, cpr_parallel_for);
  const char* (*mil_nce_merge)(const cpr_mil_nce_args*, const void* partials, int64_t S, const cpr_mil_nce_outputs*,
                               cpr_parallel_for);
  const char* (*cascade_keys)(const cpr_cascade_args*, int32_t* keys, cpr_parallel_for);
  void (*cascade_counts)(const int32_t* keys, const int32_t* prefix, int64_t B, int64_t K, int digit, int32_t* counts,
                         cpr_parallel_for);
  void (*cascade_keep)(int32_t* keys, const int32_t* threshold, const int32_t* ties, int64_t U, int64_t B, int64_t K,
                       int64_t row, cpr_parallel_for);
  const char* (*knn_graph)(const cpr_knn_graph_args*, cpr_parallel_for);
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
  int64_t mil_nce_part_entries(int64_t);                                                                              \
  const char* mil_nce_partial(const cpr_mil_nce_args*, int64_t, void*, cpr_parallel_for);                             \
  const char* mil_nce_merge(const cpr_mil_nce_args*, const void*, int64_t, const cpr_mil_nce_outputs*,                \
                            cpr_parallel_for);                                                                        \
  const char* cascade_keys(const cpr_cascade_args*, int32_t*, cpr_parallel_for);                                      \
  void cascade_counts(const int32_t*, const int32_t*, int64_t, int64_t, int, int32_t*, cpr_parallel_for);             \
  void cascade_keep(int32_t*, const int32_t*, const int32_t*, int64_t, int64_t, int64_t, int64_t, cpr_parallel_for);  \
  const char* knn_graph(const cpr_knn_graph_args*, cpr_parallel_for);                                                 \
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
