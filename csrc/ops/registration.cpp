// Schemas and registration of torch.ops.cpr_fast.*, on the LibTorch stable ABI (torch >= 2.10). In a kernel package of
// Hugging Face (hub/write.py), TORCH_EXTENSION_NAME is the namespace, which is unique for each build.
#include <torch/csrc/stable/library.h>

#include "ops/ops.h"

#ifndef TORCH_EXTENSION_NAME
#define TORCH_EXTENSION_NAME cpr_fast
#endif
// torch's macros do not expand the name of the namespace; these do, because they pass it on.
#define CPR_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define CPR_LIBRARY_IMPL(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

namespace ops = cpr::ops;

CPR_LIBRARY(TORCH_EXTENSION_NAME, m) {
  m.def(
      "cascade_select(Tensor queries, Tensor memory, int[] views, int[] keep, Tensor? query_ids, Tensor? memory_ids, "
      "str precision) -> (Tensor indices, Tensor scores)");
  m.def(
      "mil_nce(Tensor query, Tensor own_key, Tensor memory, Tensor? positives, Tensor? query_ids, Tensor? memory_ids, "
      "Tensor? self_mode, str same_id, str self_positive, float temperature) -> (Tensor loss, Tensor grad_query, "
      "Tensor own_coefficient, Tensor lse_all, Tensor lse_positive)");
  m.def(
      "mil_nce_grad_memory(Tensor query, Tensor own_key, Tensor memory, Tensor? positives, Tensor? query_ids, "
      "Tensor? memory_ids, Tensor? self_mode, str same_id, str self_positive, float temperature, Tensor lse_all, "
      "Tensor lse_positive, Tensor grad_loss) -> Tensor");
  m.def(
      "cascade_mil_nce(Tensor queries, Tensor own_key, Tensor memory, int[] views, int[] keep, int view, "
      "Tensor? query_ids, Tensor? memory_ids, Tensor? self_mode, str same_id, str self_positive, float temperature) -> "
      "(Tensor loss, Tensor grad_query, Tensor own_coefficient, Tensor lse_all, Tensor lse_positive, Tensor indices, "
      "Tensor scores)");
  m.def(
      "mil_nce_partial(Tensor query, Tensor memory, Tensor? positives, Tensor? query_ids, Tensor? memory_ids, "
      "str same_id, float temperature, int entries) -> Tensor");
  m.def(
      "mil_nce_merge(Tensor partials, Tensor query, Tensor own_key, Tensor? self_mode, str self_positive, "
      "float temperature) -> (Tensor loss, Tensor grad_query, Tensor own_coefficient, Tensor lse_all, "
      "Tensor lse_positive)");
  m.def("cascade_keys(Tensor queries, Tensor memory, int[] views, Tensor? query_ids, Tensor? memory_ids) -> Tensor");
  m.def("cascade_counts(Tensor keys, Tensor prefix, int digit) -> Tensor");
  m.def("cascade_keep(Tensor(a!) keys, int row, Tensor threshold, Tensor ties) -> ()");
  m.def("knn_graph_rows(Tensor features, Tensor(a!) best, int begin, int end) -> ()");
  m.def(
      "tvl1_flow(Tensor frames, float tau, float lambda_, float theta, int scales, float scale_step, int warps, "
      "float epsilon, int inner_iterations, int outer_iterations, int median) -> (Tensor flow, "
      "Tensor pixel_iterations)");
  m.def(
      "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "float momentum, float eps, bool relu) -> (Tensor y, Tensor mean, Tensor variance)");
  m.def(
      "batch_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor variance, "
      "float eps, bool relu) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
}

CPR_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CPU, m) {
  m.impl("cascade_select", TORCH_BOX(&ops::cascade_select<false>));
  m.impl("mil_nce", TORCH_BOX(&ops::mil_nce<false>));
  m.impl("mil_nce_grad_memory", TORCH_BOX(&ops::mil_nce_grad_memory<false>));
  m.impl("cascade_mil_nce", TORCH_BOX(&ops::cascade_mil_nce));
  m.impl("mil_nce_partial", TORCH_BOX(&ops::mil_nce_partial));
  m.impl("mil_nce_merge", TORCH_BOX(&ops::mil_nce_merge));
  m.impl("cascade_keys", TORCH_BOX(&ops::cascade_keys));
  m.impl("cascade_counts", TORCH_BOX(&ops::cascade_counts));
  m.impl("cascade_keep", TORCH_BOX(&ops::cascade_keep));
  m.impl("knn_graph_rows", TORCH_BOX(&ops::knn_graph_rows));
  m.impl("tvl1_flow", TORCH_BOX(&ops::tvl1_flow<false>));
  m.impl("batch_norm", TORCH_BOX(&ops::batch_norm));
  m.impl("batch_norm_backward", TORCH_BOX(&ops::batch_norm_backward));
}

#ifdef CPR_FAST_WITH_CUDA
CPR_LIBRARY_IMPL(TORCH_EXTENSION_NAME, CUDA, m) {
  m.impl("cascade_select", TORCH_BOX(&ops::cascade_select<true>));
  m.impl("mil_nce", TORCH_BOX(&ops::mil_nce<true>));
  m.impl("mil_nce_grad_memory", TORCH_BOX(&ops::mil_nce_grad_memory<true>));
  m.impl("tvl1_flow", TORCH_BOX(&ops::tvl1_flow<true>));
}
#endif
