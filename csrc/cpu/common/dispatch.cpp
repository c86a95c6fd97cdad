// Which CPU variant runs, and what this build contains and needs.
#include "cpu/common/dispatch.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

namespace cpr {
namespace {

#define CPR_TABLE(variant)                                                                                         \
  KernelTable {                                                                                                    \
    #variant, variant::cascade_select, variant::mil_nce_forward, variant::mil_nce_grad_memory,                     \
        variant::cascade_mil_nce, variant::mil_nce_part_entries, variant::mil_nce_partial, variant::mil_nce_merge, \
        variant::cascade_keys, variant::cascade_counts, variant::cascade_keep, variant::knn_graph,                 \
        variant::batch_norm_forward, variant::batch_norm_backward, variant::resize_frames, variant::convert_yuv420 \
  }

// The variants that this machine can run, fastest first.
const std::vector<KernelTable>& runnable() {
  static const std::vector<KernelTable> tables = [] {
    std::vector<KernelTable> found;
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
#if !defined(CPR_EMULATED_AVX512)
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      found.push_back(CPR_TABLE(avx512));
    }
#endif
    if (avx2) found.push_back(CPR_TABLE(avx2));
#endif
    found.push_back(CPR_TABLE(portable));
#if defined(CPR_EMULATED_AVX512)
    if (avx2) found.push_back(CPR_TABLE(avx512));  // slow: for tests only, so never the default
#endif
    return found;
  }();
  return tables;
}

const KernelTable* find(const std::string& name) {
  for (const auto& table : runnable()) {
    if (name == table.name) return &table;
  }
  return nullptr;
}

// The variant that the environment selects, read once, or the fastest by default. `error` is empty if it can run.
struct Default {
  const KernelTable* table = &runnable().front();
  std::string error;
};

const Default& by_default() {
  static const Default chosen = [] {
    Default found;
    const char* name = std::getenv("CPR_FAST_CPU_VARIANT");
    if (name == nullptr || *name == '\0') return found;
    if (const KernelTable* table = find(name)) {
      found.table = table;
    } else {
      found.error = std::string("CPR_FAST_CPU_VARIANT: expected a variant that this machine can run (") +
                    cpr_cpu_variants() + "), got '" + name + "'";
    }
    return found;
  }();
  return chosen;
}

std::atomic<const KernelTable*> forced{nullptr};

constexpr int kCudaVersion = CPR_CUDA_VERSION;  // 13000 for CUDA 13.0; 0 without CUDA kernels

std::string dotted(int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); }

// The version of CUDA that the driver supports, 0 if there is no driver. cuDriverGetVersion is the one function of the
// driver that initialises nothing, so that the process may still be forked.
int driver_version() {
  void* const driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (driver == nullptr) return 0;
  using GetVersion = int (*)(int*);
  const auto get_version = reinterpret_cast<GetVersion>(dlsym(driver, "cuDriverGetVersion"));
  int version = 0;
  return get_version != nullptr && get_version(&version) == 0 ? version : 0;
}

// The oldest driver of a major version of CUDA [CUDA Toolkit release notes, "CUDA Toolkit and Minimum Required Driver
// Version"]. Drivers run every minor version of it.
int oldest_driver(int version) { return version >= 13000 ? 580 : version >= 12000 ? 525 : version > 0 ? 450 : 0; }

}  // namespace

const KernelTable& kernels() {
  const KernelTable* table = forced.load(std::memory_order_relaxed);
  return table ? *table : *by_default().table;
}

}  // namespace cpr

extern "C" {

const char* cpr_cascade_select_cpu(const cpr_cascade_args* args, cpr_parallel_for parallel) {
  if (const char* error = cpr_cpu_variant_error()) return error;
  return cpr::kernels().cascade_select(args, parallel);
}

const char* cpr_mil_nce_forward_cpu(const cpr_mil_nce_args* args, const cpr_mil_nce_outputs* outputs,
                                    cpr_parallel_for parallel) {
  if (const char* error = cpr_cpu_variant_error()) return error;
  return cpr::kernels().mil_nce_forward(args, outputs, parallel);
}

const char* cpr_mil_nce_grad_memory_cpu(const cpr_mil_nce_args* args, const void* grad_loss, const void* lse_all,
                                        const void* lse_positive, void* grad_memory, cpr_parallel_for parallel) {
  if (const char* error = cpr_cpu_variant_error()) return error;
  return cpr::kernels().mil_nce_grad_memory(args, grad_loss, lse_all, lse_positive, grad_memory, parallel);
}

const char* cpr_cascade_mil_nce_cpu(const cpr_cascade_args* cascade, const cpr_mil_nce_args* loss, int64_t view,
                                    const cpr_mil_nce_outputs* outputs, cpr_parallel_for parallel) {
  if (const char* error = cpr_cpu_variant_error()) return error;
  return cpr::kernels().cascade_mil_nce(cascade, loss, view, outputs, parallel);
}

int64_t cpr_mil_nce_part_entries(int64_t K) { return cpr::kernels().mil_nce_part_entries(K); }

const char* cpr_mil_nce_partial_cpu(const cpr_mil_nce_args* args, int64_t entries, void* partials,
                                    cpr_parallel_for parallel) {
  if (const char* error = cpr_cpu_variant_error()) return error;
  return cpr::kernels().mil_nce_partial(args, entries, partials, parallel);
}

const char* cpr_mil_nce_merge_cpu(const cpr_mil_nce_args* args, const void* partials, int64_t S,
                                  const cpr_mil_nce_outputs* outputs, cpr_parallel_for parallel) {
  if (const char* error = cpr_cpu_variant_error()) return error;
  return cpr::kernels().mil_nce_merge(args, partials, S, outputs, parallel);
}

const char* cpr_cascade_keys_cpu(const cpr_cascade_args* args, int32_t* keys, cpr_parallel_for parallel) {
  if (const char* error = cpr_cpu_variant_error()) return error;
  return cpr::kernels().cascade_keys(args, keys, parallel);
}

const char* cpr_cascade_counts_cpu(const int32_t* keys, const int32_t* prefix, int64_t B, int64_t K, int digit,
                                   int32_t* counts, cpr_parallel_for parallel) {
  if (const char* error = cpr_cpu_variant_error()) return error;
  cpr::kernels().cascade_counts(keys, prefix, B, K, digit, counts, parallel);
  return nullptr;
}

const char* cpr_cascade_keep_cpu(int32_t* keys, const int32_t* threshold, const int32_t* ties, int64_t U, int64_t B,
                                 int64_t K, int64_t row, cpr_parallel_for parallel) {
  if (const char* error = cpr_cpu_variant_error()) return error;
  cpr::kernels().cascade_keep(keys, threshold, ties, U, B, K, row, parallel);
  return nullptr;
}

const char* cpr_knn_graph_cpu(const cpr_knn_graph_args* args, cpr_parallel_for parallel) {
  if (const char* error = cpr_cpu_variant_error()) return error;
  return cpr::kernels().knn_graph(args, parallel);
}

const char* cpr_batch_norm_forward_cpu(const cpr_batch_norm_args* args, const cpr_batch_norm_running* running, float* y,
                                       double* mean, double* variance, cpr_parallel_for parallel) {
  if (const char* error = cpr_cpu_variant_error()) return error;
  return cpr::kernels().batch_norm_forward(args, running, y, mean, variance, parallel);
}

const char* cpr_batch_norm_backward_cpu(const cpr_batch_norm_args* args, const double* mean, const double* variance,
                                        const float* grad, float* grad_x, float* grad_weight, float* grad_bias,
                                        cpr_parallel_for parallel) {
  if (const char* error = cpr_cpu_variant_error()) return error;
  return cpr::kernels().batch_norm_backward(args, mean, variance, grad, grad_x, grad_weight, grad_bias, parallel);
}

const char* cpr_cpu_variants(void) {
  static const std::string names = [] {
    std::string joined;
    for (const auto& table : cpr::runnable()) joined += std::string(joined.empty() ? "" : ",") + table.name;
    return joined;
  }();
  return names.c_str();
}

int cpr_force_cpu_variant(const char* name) {
  if (name == nullptr) {
    cpr::forced = nullptr;
    return 0;
  }
  const cpr::KernelTable* table = cpr::find(name);
  if (table == nullptr) return 1;
  cpr::forced = table;
  return 0;
}

const char* cpr_cpu_variant(void) { return cpr::kernels().name; }

const char* cpr_cpu_variant_error(void) {
  const std::string& error = cpr::by_default().error;
  return error.empty() ? nullptr : error.c_str();
}

const char* cpr_cuda_architectures(void) { return CPR_CUDA_ARCHITECTURES; }

const char* cpr_cuda_version(void) {
  static const std::string version = cpr::kCudaVersion > 0 ? cpr::dotted(cpr::kCudaVersion) : "";
  return version.c_str();
}

int cpr_cuda_oldest_driver(void) { return cpr::oldest_driver(cpr::kCudaVersion); }

const char* cpr_cuda_driver_error(void) {
  static const std::string error = [] {
    const int supported = cpr::kCudaVersion > 0 ? cpr::driver_version() : 0;
    if (supported == 0 || supported / 1000 >= cpr::kCudaVersion / 1000) return std::string();
    const std::string major = std::to_string(supported / 1000);
    return "the NVIDIA driver supports CUDA " + cpr::dotted(supported) +
           ", and the CUDA kernels of cpr_fast were built with CUDA " + cpr::dotted(cpr::kCudaVersion) +
           ": install driver " + std::to_string(cpr_cuda_oldest_driver()) +
           " or newer, or build cpr_fast again with the nvcc of CUDA " + major + " (CUDA_HOME)";
  }();
  return error.empty() ? nullptr : error.c_str();
}

}  // extern "C"
