// Implements torch.ops.cpr_fast.cascade_select.
#include <tuple>
#include <utility>

#include "ops/cascade.h"
#include "ops/checks.h"
#include "ops/launch.h"

namespace cpr::ops {

Cascade::Cascade(const Tensor& queries_in, const Tensor& memory_in, std::vector<int64_t> views_in,
                 std::vector<int64_t> keep_in, const OptionalTensor& query_ids_in, const OptionalTensor& memory_ids_in,
                 const std::string& precision)
    : queries(queries_in), memory(memory_in), views(std::move(views_in)), keep(std::move(keep_in)) {
  check(queries_in.dim() == 3, "queries: expected shape [V, B, D], got ", queries_in);
  check(memory_in.dim() == 3, "memory: expected shape [V, K, D], got ", memory_in);
  const int64_t V = queries_in.size(0), B = queries_in.size(1), D = queries_in.size(2), K = memory_in.size(1);
  check_shape("memory", memory_in, {V, K, D});
  check(V > 0 && B > 0 && K > 0 && D > 0, "queries, memory: expected V, B, K, D >= 1");
  check(queries_in.scalar_type() == memory_in.scalar_type(), "memory: expected the dtype of queries");
  check(queries_in.device() == memory_in.device(), "memory: expected the device of queries");
  check(!views.empty() && views.size() == keep.size(), "views, keep: expected n >= 1 entries each");
  for (size_t s = 0; s < views.size(); ++s) {
    check(views[s] >= 0 && views[s] < V, "views: expected 0..", V - 1);
    check(keep[s] >= 1 && (s == 0 || keep[s] <= keep[s - 1]), "keep: expected non-increasing values >= 1");
  }
  check(!query_ids_in || memory_ids_in, "query_ids: requires memory_ids");
  const int dtype = dtype_code("queries", queries_in);
  check(dtype != CPR_F64, "queries: expected float32, bfloat16 or float16, got float64");

  queries = dense(queries_in);
  memory = dense(memory_in);
  query_ids = dense_int64("query_ids", query_ids_in, {B}, queries);
  memory_ids = dense_int64("memory_ids", memory_ids_in, {K}, queries);
  indices = empty(queries, {B, keep.back()}, ScalarType::Long);
  scores = empty(queries, {B, keep.back()}, ScalarType::Float);
  args = {.queries = queries.const_data_ptr(),
          .memory = memory.const_data_ptr(),
          .query_ids = pointer(query_ids),
          .memory_ids = pointer(memory_ids),
          .indices = indices.mutable_data_ptr<int64_t>(),
          .scores = scores.mutable_data_ptr<float>(),
          .views = views.data(),
          .keep = keep.data(),
          .V = V,
          .B = B,
          .K = K,
          .D = D,
          .n = static_cast<int64_t>(views.size()),
          .dtype = dtype,
          .precision = choice("precision", precision, {"fp32", "bf16"})};
}

template <bool cuda>
std::tuple<Tensor, Tensor> cascade_select(const Tensor& queries, const Tensor& memory, std::vector<int64_t> views,
                                          std::vector<int64_t> keep, const OptionalTensor& query_ids,
                                          const OptionalTensor& memory_ids, std::string precision) {
  Cascade call(queries, memory, std::move(views), std::move(keep), query_ids, memory_ids, precision);
  if (!cuda) raise_failure(cpr_cascade_select_cpu(&call.args, parallel_for));
#ifdef CPR_FAST_WITH_CUDA
  if (cuda) {
    const torch::stable::accelerator::DeviceGuard guard(queries.get_device_index());
    Tensor scratch = workspace(queries, cpr_cascade_select_cuda_workspace(&call.args));
    raise_failure(cpr_cascade_select_cuda(&call.args, scratch.mutable_data_ptr(), current_cuda_stream(queries)));
  }
#endif
  return {call.indices, call.scores};
}

template decltype(cascade_select<false>) cascade_select<false>;
#ifdef CPR_FAST_WITH_CUDA
template decltype(cascade_select<true>) cascade_select<true>;
#endif

}  // namespace cpr::ops
