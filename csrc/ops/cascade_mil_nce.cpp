// Implements torch.ops.cpr_fast.cascade_mil_nce.
#include <tuple>
#include <utility>

#include "ops/cascade.h"
#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/loss.h"
#include "ops/thread_pool.h"

namespace cpr::ops {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cascade_mil_nce(
    const Tensor& queries, const Tensor& own_key_in, const Tensor& memory, std::vector<int64_t> views,
    std::vector<int64_t> keep, int64_t view, const OptionalTensor& query_ids, const OptionalTensor& memory_ids,
    const OptionalTensor& self_mode_in, std::string same_id, std::string self_positive, double temperature) {
  Cascade cascade(queries, memory, std::move(views), std::move(keep), query_ids, memory_ids, "fp32");
  const cpr_cascade_args& a = cascade.args;
  check(view >= 0 && view < a.V, "view: expected 0..", a.V - 1, ", got ", view);
  check_shape("own_key", own_key_in, {a.B, a.D});
  check(own_key_in.scalar_type() == queries.scalar_type(), "own_key: expected the dtype of queries");
  check(own_key_in.device() == queries.device(), "own_key: expected the device of queries");
  check(temperature > 0, "temperature: expected a positive number, got ", temperature);
  const Tensor own_key = dense(own_key_in);
  const OptionalTensor self_mode = dense_int64("self_positive", self_mode_in, {a.B}, queries);
  check_self_modes(pointer(self_mode), a.B);

  const auto of_view = [&](const Tensor& tensor, int64_t rows) {
    return static_cast<const char*>(tensor.const_data_ptr()) + view * rows * a.D * tensor.element_size();
  };
  const cpr_mil_nce_args args{
      .query = of_view(cascade.queries, a.B),
      .own_key = own_key.const_data_ptr(),
      .memory = of_view(cascade.memory, a.K),
      .positives = a.indices,
      .query_ids = a.query_ids,
      .memory_ids = a.memory_ids,
      .self_mode = pointer(self_mode),
      .B = a.B,
      .K = a.K,
      .D = a.D,
      .P = cascade.keep.back(),
      .dtype = a.dtype,
      .same_id = choice("same_id", same_id, {"positive", "ignore", "negative"}),
      .self_positive = choice("self_positive", self_positive, {"keep", "denominator", "drop_both"}),
      .temperature = temperature};
  Loss found(queries, a.B, a.D, ScalarType::Float);
  const cpr_mil_nce_outputs outputs = found.pointers();
  raise_failure(cpr_cascade_mil_nce_cpu(&a, &args, view, &outputs, parallel_for));
  return {found.loss,         found.grad_query, found.own_coefficient, found.lse_all,
          found.lse_positive, cascade.indices,  cascade.scores};
}

}  // namespace cpr::ops
