// Implements torch.ops.cpr_fast.knn_graph_rows.
#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/thread_pool.h"

namespace cpr::ops {

void knn_graph_rows(const Tensor& features, Tensor best, int64_t begin, int64_t end) {
  check(features.dim() == 2, "features: expected shape [N, D], got ", features);
  const int64_t N = features.size(0), D = features.size(1);
  check(N > 0 && D > 0 && N < INT32_MAX, "features: expected 1 <= N < 2^31 - 1 and D >= 1, got ", features);
  check(features.is_contiguous(), "features: expected contiguous memory, because they are read by many calls");
  check(best.dim() == 2 && best.size(0) == N && best.size(1) > 0, "best: expected shape [N, k], got ", best);
  check(best.scalar_type() == ScalarType::Long, "best: expected dtype int64");
  check(best.is_contiguous(), "best: expected contiguous memory, because it is changed in place");
  check(best.device() == features.device(), "best: expected the device of features");
  check(0 <= begin && begin < end && end <= N, "begin, end: expected 0 <= begin < end <= ", N, ", got ", begin, ", ",
        end);
  const int dtype = dtype_code("features", features);
  check(dtype != CPR_F64, "features: expected float32, bfloat16 or float16, got float64");
  const cpr_knn_graph_args args = {.features = features.const_data_ptr(),
                                   .best = best.mutable_data_ptr<int64_t>(),
                                   .N = N,
                                   .D = D,
                                   .k = best.size(1),
                                   .begin = begin,
                                   .end = end,
                                   .dtype = dtype};
  raise_failure(cpr_knn_graph_cpu(&args, parallel_for));
}

}  // namespace cpr::ops
