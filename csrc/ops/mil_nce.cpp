// Implements torch.ops.cpr_fast.mil_nce and mil_nce_grad_memory.
#include <stdexcept>
#include <string>
#include <tuple>

#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/loss.h"
#include "ops/ops.h"
#include "ops/thread_pool.h"

namespace cpr::ops {
namespace {

// The checked, dense inputs of both operators. `args` points into the tensors.
struct MilNce {
  Tensor query, own_key, memory;
  OptionalTensor positives, query_ids, memory_ids, self_mode;
  cpr_mil_nce_args args;
  ScalarType accumulator;
};

void check_values(const MilNce& call) {
  const int64_t *slots = call.args.positives, K = call.args.K;
  for (int64_t i = 0; slots != nullptr && i < call.args.B * call.args.P; ++i) {
    if (slots[i] < -1 || slots[i] >= K) {
      throw std::out_of_range("positives: expected memory slots 0.." + std::to_string(K - 1) + " or -1, got " +
                              std::to_string(slots[i]));
    }
  }
  check_self_modes(call.args.self_mode, call.args.B);
}

MilNce mil_nce_inputs(const Tensor& query, const Tensor& own_key, const Tensor& memory, const OptionalTensor& positives,
                      const OptionalTensor& query_ids, const OptionalTensor& memory_ids,
                      const OptionalTensor& self_mode, const std::string& same_id, const std::string& self_positive,
                      double temperature, bool cuda) {
  check(query.dim() == 2, "query: expected shape [B, D], got ", query);
  check(memory.dim() == 2, "memory: expected shape [K, D], got ", memory);
  const int64_t B = query.size(0), D = query.size(1), K = memory.size(0);
  check(B > 0 && D > 0 && K > 0, "query, memory: expected B, K, D >= 1");
  check_shape("own_key", own_key, {B, D});
  check_shape("memory", memory, {K, D});
  check(own_key.scalar_type() == query.scalar_type(), "own_key: expected the dtype of query");
  check(memory.scalar_type() == query.scalar_type(), "memory: expected the dtype of query");
  check(own_key.device() == query.device(), "own_key: expected the device of query");
  check(memory.device() == query.device(), "memory: expected the device of query");
  check(!query_ids || memory_ids, "query_ids: requires memory_ids");
  check(temperature > 0, "temperature: expected a positive number, got ", temperature);
  check(!positives || positives->dim() == 2, "positives: expected shape [B, P]");
  const int64_t P = positives ? positives->size(1) : 0;
  const int dtype = dtype_code("query", query);
  check(!cuda || dtype != CPR_F64, "query: expected float32, bfloat16 or float16 on CUDA, got float64");

  MilNce call{.query = dense(query),
              .own_key = dense(own_key),
              .memory = dense(memory),
              .positives = dense_int64("positives", positives, {B, P}, query),
              .query_ids = dense_int64("query_ids", query_ids, {B}, query),
              .memory_ids = dense_int64("memory_ids", memory_ids, {K}, query),
              .self_mode = dense_int64("self_positive", self_mode, {B}, query),
              .args = {},
              .accumulator = dtype == CPR_F64 ? ScalarType::Double : ScalarType::Float};
  call.args = {.query = call.query.const_data_ptr(),
               .own_key = call.own_key.const_data_ptr(),
               .memory = call.memory.const_data_ptr(),
               .positives = pointer(call.positives),
               .query_ids = pointer(call.query_ids),
               .memory_ids = pointer(call.memory_ids),
               .self_mode = pointer(call.self_mode),
               .B = B,
               .K = K,
               .D = D,
               .P = P,
               .dtype = dtype,
               .same_id = choice("same_id", same_id, {"positive", "ignore", "negative"}),
               .self_positive = choice("self_positive", self_positive, {"keep", "denominator", "drop_both"}),
               .temperature = temperature};
  if (!cuda) check_values(call);
  return call;
}

}  // namespace

template <bool cuda>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mil_nce(const Tensor& query, const Tensor& own_key,
                                                           const Tensor& memory, const OptionalTensor& positives,
                                                           const OptionalTensor& query_ids,
                                                           const OptionalTensor& memory_ids,
                                                           const OptionalTensor& self_mode, std::string same_id,
                                                           std::string self_positive, double temperature) {
  const MilNce call = mil_nce_inputs(query, own_key, memory, positives, query_ids, memory_ids, self_mode, same_id,
                                     self_positive, temperature, cuda);
  Loss found(call.query, call.args.B, call.args.D, call.accumulator);
  const cpr_mil_nce_outputs outputs = found.pointers();
  if (!cuda) raise_failure(cpr_mil_nce_forward_cpu(&call.args, &outputs, parallel_for));
#ifdef CPR_FAST_WITH_CUDA
  if (cuda) {
    const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
    Tensor scratch = workspace(query, cpr_mil_nce_forward_cuda_workspace(&call.args));
    raise_failure(
        cpr_mil_nce_forward_cuda(&call.args, &outputs, scratch.mutable_data_ptr(), current_cuda_stream(query)));
  }
#endif
  return {found.loss, found.grad_query, found.own_coefficient, found.lse_all, found.lse_positive};
}

template <bool cuda>
Tensor mil_nce_grad_memory(const Tensor& query, const Tensor& own_key, const Tensor& memory,
                           const OptionalTensor& positives, const OptionalTensor& query_ids,
                           const OptionalTensor& memory_ids, const OptionalTensor& self_mode, std::string same_id,
                           std::string self_positive, double temperature, const Tensor& lse_all_in,
                           const Tensor& lse_positive_in, const Tensor& grad_loss_in) {
  const MilNce call = mil_nce_inputs(query, own_key, memory, positives, query_ids, memory_ids, self_mode, same_id,
                                     self_positive, temperature, cuda);
  const auto row = [&](const char* name, const Tensor& tensor) {
    check_shape(name, tensor, {call.args.B});
    check(tensor.scalar_type() == call.accumulator, name, ": expected the accumulator's dtype");
    return dense(tensor);
  };
  const Tensor lse_all = row("lse_all", lse_all_in), lse_positive = row("lse_positive", lse_positive_in);
  const Tensor grad_loss = row("grad_loss", grad_loss_in);
  Tensor grad_memory = empty(call.memory, {call.args.K, call.args.D}, call.accumulator);
  if (!cuda) {
    raise_failure(cpr_mil_nce_grad_memory_cpu(&call.args, grad_loss.const_data_ptr(), lse_all.const_data_ptr(),
                                              lse_positive.const_data_ptr(), grad_memory.mutable_data_ptr(),
                                              parallel_for));
  }
#ifdef CPR_FAST_WITH_CUDA
  if (cuda) {
    const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
    raise_failure(cpr_mil_nce_grad_memory_cuda(&call.args, grad_loss.const_data_ptr(), lse_all.const_data_ptr(),
                                               lse_positive.const_data_ptr(), grad_memory.mutable_data_ptr(),
                                               current_cuda_stream(query)));
  }
#endif
  return grad_memory;
}

Tensor mil_nce_partial(const Tensor& query, const Tensor& memory, const OptionalTensor& positives,
                       const OptionalTensor& query_ids, const OptionalTensor& memory_ids, std::string same_id,
                       double temperature, int64_t entries) {
  const MilNce call = mil_nce_inputs(query, query, memory, positives, query_ids, memory_ids, std::nullopt, same_id,
                                     "keep", temperature, false);
  check(entries >= 1 && entries % CPR_PART_MULTIPLE == 0, "entries: expected a positive multiple of ",
        int64_t{CPR_PART_MULTIPLE}, ", got ", entries);
  const int64_t parts = (call.args.K + entries - 1) / entries;
  Tensor partials = empty(call.query, {parts, call.args.B, 2, 2 + call.args.D}, call.accumulator);
  raise_failure(cpr_mil_nce_partial_cpu(&call.args, entries, partials.mutable_data_ptr(), parallel_for));
  return partials;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mil_nce_merge(const Tensor& partials_in, const Tensor& query,
                                                                 const Tensor& own_key, const OptionalTensor& self_mode,
                                                                 std::string self_positive, double temperature) {
  // The memory is not read; the queries stand in for it.
  const MilNce call = mil_nce_inputs(query, own_key, query, std::nullopt, std::nullopt, std::nullopt, self_mode,
                                     "positive", self_positive, temperature, false);
  const int64_t B = call.args.B, D = call.args.D;
  check(partials_in.dim() == 4 && partials_in.size(0) > 0, "partials: expected shape [S, B, 2, 2 + D], got ",
        partials_in);
  check_shape("partials", partials_in, {partials_in.size(0), B, 2, 2 + D});
  check(partials_in.scalar_type() == call.accumulator, "partials: expected float32, or float64 for float64 features");
  check(partials_in.device() == query.device(), "partials: expected the device of query");
  const Tensor partials = dense(partials_in);
  Loss found(call.query, B, D, call.accumulator);
  const cpr_mil_nce_outputs outputs = found.pointers();
  raise_failure(cpr_mil_nce_merge_cpu(&call.args, partials.const_data_ptr(), partials.size(0), &outputs, parallel_for));
  return {found.loss, found.grad_query, found.own_coefficient, found.lse_all, found.lse_positive};
}

template decltype(mil_nce<false>) mil_nce<false>;
template decltype(mil_nce_grad_memory<false>) mil_nce_grad_memory<false>;
#ifdef CPR_FAST_WITH_CUDA
template decltype(mil_nce<true>) mil_nce<true>;
template decltype(mil_nce_grad_memory<true>) mil_nce_grad_memory<true>;
#endif

}  // namespace cpr::ops
