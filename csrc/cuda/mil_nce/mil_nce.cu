// MIL-NCE over a memory on CUDA [CPR paper, Eq. 2], without a [B, K] matrix.
//
// The loss is computed like attention whose values are the keys. One pass over the memory (the scan) keeps for each row
// and each split of the memory a running maximum, a sum of exponentials and the sum of keys weighted by them, for the
// denominator ("all") and for the positives by id. A second kernel (the finish) merges the splits in order, adds the
// own key and the explicit positives, and computes the gradient from the same sums. Splits depend only on K and no
// float is added atomically, so the result of a row does not depend on its batch or on scheduling.
//
// Features of 16 bits are scanned on tensor cores if their width is 128 (warpgroup_scan.cuh on sm_90a, else
// row_scan.cuh) or 512 (tensor_scan.cuh), all others in float32: by larger tiles (wide_scan.cuh) if there are enough of
// them, and else by those of scan.cuh.
//
// Letters in shapes: B queries, K memory entries, D feature width, P explicit positives, S splits.
#include "cpr_fast.h"
#include "cuda/common/launch.cuh"
#include "cuda/common/tile.cuh"
#include "cuda/mil_nce/finish.cuh"
#include "cuda/mil_nce/grad_memory.cuh"
#include "cuda/mil_nce/problem.cuh"
#include "cuda/mil_nce/row_scan.cuh"
#include "cuda/mil_nce/scan.cuh"
#include "cuda/mil_nce/tensor_scan.cuh"
#include "cuda/mil_nce/warpgroup_scan.cuh"
#include "cuda/mil_nce/wide_scan.cuh"

namespace cpr {
namespace {

Partials partials_at(void* workspace, const cpr_mil_nce_args& args, int64_t* bytes) {
  const int64_t rows = Splits(args.K).count * kChunk;
  const int groups = args.same_id == CPR_SAME_POSITIVE && args.query_ids != nullptr ? kGroups : 1;
  float* base = static_cast<float*>(workspace);
  Partials partials = {base, base + groups * rows, base + 2 * groups * rows, nullptr};
  float* end = partials.weighted + groups * rows * args.D;
  partials.named = reinterpret_cast<Named*>(end);
  *bytes = (end - base) * static_cast<int64_t>(sizeof(float)) + kChunk * args.P * static_cast<int64_t>(sizeof(Named));
  return partials;
}

const char* check(const cpr_mil_nce_args& args) {
  if (args.B < 1 || args.K < 1 || args.D < 1 || args.P < 0) return "B, K, D: expected at least 1";
  if (args.query_ids != nullptr && args.memory_ids == nullptr) return "query_ids: given without memory_ids";
  if (!(args.temperature > 0)) return "temperature: expected a positive number";
  return nullptr;
}

Problem problem_of(const cpr_mil_nce_args& args) {
  return {args.positives,
          args.query_ids,
          args.memory_ids,
          args.self_mode,
          args.B,
          args.K,
          args.D,
          args.positives != nullptr ? args.P : 0,
          args.same_id,
          args.self_positive,
          static_cast<float>(1 / args.temperature)};
}

template <typename T, bool kPositiveById>
const char* forward(const cpr_mil_nce_args& args, const cpr_mil_nce_outputs& outputs, void* workspace,
                    cudaStream_t stream) {
  const Problem problem = problem_of(args);
  const Splits splits(args.K);
  int64_t bytes;
  const Partials partials = partials_at(workspace, args, &bytes);
  const T *query = static_cast<const T*>(args.query), *own_key = static_cast<const T*>(args.own_key);
  const T* memory = static_cast<const T*>(args.memory);
  for (int64_t first = 0; first < args.B; first += kChunk) {
    const int64_t queries = args.B - first < kChunk ? args.B - first : kChunk;
    bool scanned = false;
    const char* error = launch_warpgroup_scan<kPositiveById>(problem, query, memory, first, queries, splits, partials,
                                                             stream, &scanned);
    if (error == nullptr && !scanned) {
      error =
          launch_row_scan<kPositiveById>(problem, query, memory, first, queries, splits, partials, stream, &scanned);
    }
    if (error == nullptr && !scanned) {
      error =
          launch_tensor_scan<kPositiveById>(problem, query, memory, first, queries, splits, partials, stream, &scanned);
    }
    if (error == nullptr && !scanned) {
      error =
          launch_wide_scan<kPositiveById>(problem, query, memory, first, queries, splits, partials, stream, &scanned);
    }
    if (error == nullptr && !scanned) {
      const dim3 grid(static_cast<unsigned>(ceil_div(queries, kSumRows)), static_cast<unsigned>(splits.count),
                      static_cast<unsigned>(ceil_div(args.D, kSumColumns)));
      error = launch<ScanShared>(scan_kernel<T, kPositiveById>, grid, kTileThreads, stream, problem, query, memory,
                                 first, queries, splits.tiles, partials);
    }
    if (error != nullptr) return error;
    error = launch<FinishShared>(finish_kernel<T>, dim3(static_cast<unsigned>(queries)), kFinishThreads, stream,
                                 problem, query, own_key, memory, first, splits.count, kPositiveById ? splits.count : 0,
                                 partials, outputs);
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace
}  // namespace cpr

extern "C" size_t cpr_mil_nce_forward_cuda_workspace(const cpr_mil_nce_args* args) {
  if (cpr::check(*args) != nullptr) return 0;
  int64_t bytes;
  cpr::partials_at(nullptr, *args, &bytes);
  return static_cast<size_t>(bytes);
}

extern "C" const char* cpr_mil_nce_forward_cuda(const cpr_mil_nce_args* args, const cpr_mil_nce_outputs* outputs,
                                                void* workspace, void* stream) {
  if (const char* error = cpr::check(*args)) return error;
  if (const char* error = cpr::check_workspace(workspace)) return error;
  return cpr::with_element_type(args->dtype, [&](auto element) {
    using T = decltype(element);
    const bool positive_by_id = args->same_id == CPR_SAME_POSITIVE && args->query_ids != nullptr;
    return positive_by_id ? cpr::forward<T, true>(*args, *outputs, workspace, static_cast<cudaStream_t>(stream))
                          : cpr::forward<T, false>(*args, *outputs, workspace, static_cast<cudaStream_t>(stream));
  });
}

extern "C" const char* cpr_mil_nce_grad_memory_cuda(const cpr_mil_nce_args* args, const void* grad_loss,
                                                    const void* lse_all, const void* lse_positive, void* grad_memory,
                                                    void* stream) {
  if (const char* error = cpr::check(*args)) return error;
  return cpr::with_element_type(args->dtype, [&](auto element) {
    using T = decltype(element);
    const dim3 grid(static_cast<unsigned>(cpr::ceil_div(args->K, cpr::kSumRows)),
                    static_cast<unsigned>(cpr::ceil_div(args->D, cpr::kSumColumns)));
    return cpr::launch<cpr::GradMemoryShared>(
        cpr::grad_memory_kernel<T>, grid, cpr::kTileThreads, static_cast<cudaStream_t>(stream), cpr::problem_of(*args),
        static_cast<const T*>(args->query), static_cast<const T*>(args->memory), static_cast<const float*>(grad_loss),
        static_cast<const float*>(lse_all), static_cast<const float*>(lse_positive), static_cast<float*>(grad_memory));
  });
}
