// Implements torch.ops.cpr_fast.cascade_select.
#include <tuple>
#include <utility>

#include "ops/cascade.h"
#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/thread_pool.h"

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

Tensor cascade_keys(const Tensor& queries, const Tensor& memory, std::vector<int64_t> views,
                    const OptionalTensor& query_ids, const OptionalTensor& memory_ids) {
  std::vector<int64_t> keep(views.size(), 1);
  Cascade call(queries, memory, std::move(views), std::move(keep), query_ids, memory_ids, "fp32");
  for (size_t s = 0; s < call.views.size(); ++s) {
    for (size_t earlier = 0; earlier < s; ++earlier) {
      check(call.views[earlier] != call.views[s], "views: expected different views, got ", call.views);
    }
  }
  Tensor keys = empty(call.queries, {call.args.n, call.args.B, call.args.K}, ScalarType::Int);
  raise_failure(cpr_cascade_keys_cpu(&call.args, keys.mutable_data_ptr<int32_t>(), parallel_for));
  return keys;
}

Tensor cascade_counts(const Tensor& keys_in, const Tensor& prefix_in, int64_t digit) {
  check(keys_in.dim() == 2 && keys_in.scalar_type() == ScalarType::Int, "keys: expected int32 [B, K], got ", keys_in);
  const int64_t B = keys_in.size(0), K = keys_in.size(1);
  check(B > 0 && K > 0, "keys: expected B, K >= 1");
  check_shape("prefix", prefix_in, {B});
  check(prefix_in.scalar_type() == ScalarType::Int, "prefix: expected dtype int32");
  check(prefix_in.device() == keys_in.device(), "prefix: expected the device of keys");
  check(digit >= 0 && digit < 4, "digit: expected 0..3, got ", digit);
  const Tensor keys = dense(keys_in), prefix = dense(prefix_in);
  Tensor counts = empty(keys, {B, 256}, ScalarType::Int);
  raise_failure(cpr_cascade_counts_cpu(keys.const_data_ptr<int32_t>(), prefix.const_data_ptr<int32_t>(), B, K,
                                       static_cast<int>(digit), counts.mutable_data_ptr<int32_t>(), parallel_for));
  return counts;
}

void cascade_keep(Tensor keys, int64_t row, const Tensor& threshold_in, const Tensor& ties_in) {
  check(keys.dim() == 3 && keys.scalar_type() == ScalarType::Int, "keys: expected int32 [U, B, K], got ", keys);
  check(keys.is_contiguous(), "keys: expected contiguous memory, because they are changed in place");
  const int64_t U = keys.size(0), B = keys.size(1), K = keys.size(2);
  check(row >= 0 && row < U, "row: expected 0..", U - 1, ", got ", row);
  const auto column = [&](const char* name, const Tensor& tensor) {
    check_shape(name, tensor, {B});
    check(tensor.scalar_type() == ScalarType::Int, name, ": expected dtype int32");
    check(tensor.device() == keys.device(), name, ": expected the device of keys");
    return dense(tensor);
  };
  const Tensor threshold = column("threshold", threshold_in), ties = column("ties", ties_in);
  raise_failure(cpr_cascade_keep_cpu(keys.mutable_data_ptr<int32_t>(), threshold.const_data_ptr<int32_t>(),
                                     ties.const_data_ptr<int32_t>(), U, B, K, row, parallel_for));
}

template decltype(cascade_select<false>) cascade_select<false>;
#ifdef CPR_FAST_WITH_CUDA
template decltype(cascade_select<true>) cascade_select<true>;
#endif

}  // namespace cpr::ops
