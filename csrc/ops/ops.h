// The operators behind torch.ops.cpr_fast.*, with one instantiation per device. They check their arguments, allocate
// the outputs and call the kernels in csrc/cpr_fast.h. cpr_fast/ops/*.py gives more helpful errors; the checks here
// keep the kernels safe when torch.ops is called directly.
//
// Letters in shapes: B queries, V views, K memory entries, D width, n stages, P positives, T frames, H x W pixels,
// R rows, C channels.
#pragma once

#if defined(CUDA_KERNEL) && !defined(CPR_FAST_WITH_CUDA)  // Hugging Face's kernel builder builds for CUDA
#define CPR_FAST_WITH_CUDA
#endif

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace cpr::ops {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <bool cuda>
std::tuple<Tensor, Tensor> cascade_select(const Tensor& queries, const Tensor& memory, std::vector<int64_t> views,
                                          std::vector<int64_t> keep, const OptionalTensor& query_ids,
                                          const OptionalTensor& memory_ids, std::string precision);

template <bool cuda>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mil_nce(const Tensor& query, const Tensor& own_key,
                                                           const Tensor& memory, const OptionalTensor& positives,
                                                           const OptionalTensor& query_ids,
                                                           const OptionalTensor& memory_ids,
                                                           const OptionalTensor& self_mode, std::string same_id,
                                                           std::string self_positive, double temperature);

template <bool cuda>
Tensor mil_nce_grad_memory(const Tensor& query, const Tensor& own_key, const Tensor& memory,
                           const OptionalTensor& positives, const OptionalTensor& query_ids,
                           const OptionalTensor& memory_ids, const OptionalTensor& self_mode, std::string same_id,
                           std::string self_positive, double temperature, const Tensor& lse_all,
                           const Tensor& lse_positive, const Tensor& grad_loss);

// On the CPU alone: it saves a matrix product of the CPU kernels.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cascade_mil_nce(
    const Tensor& queries, const Tensor& own_key, const Tensor& memory, std::vector<int64_t> views,
    std::vector<int64_t> keep, int64_t view, const OptionalTensor& query_ids, const OptionalTensor& memory_ids,
    const OptionalTensor& self_mode, std::string same_id, std::string self_positive, double temperature);

// The parts of both operators, for a memory that is divided among processes. Only on the CPU; on CUDA, cpr_fast/ops
// computes them with torch.
Tensor mil_nce_partial(const Tensor& query, const Tensor& memory, const OptionalTensor& positives,
                       const OptionalTensor& query_ids, const OptionalTensor& memory_ids, std::string same_id,
                       double temperature, int64_t entries);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mil_nce_merge(const Tensor& partials, const Tensor& query,
                                                                 const Tensor& own_key, const OptionalTensor& self_mode,
                                                                 std::string self_positive, double temperature);

Tensor cascade_keys(const Tensor& queries, const Tensor& memory, std::vector<int64_t> views,
                    const OptionalTensor& query_ids, const OptionalTensor& memory_ids);

Tensor cascade_counts(const Tensor& keys, const Tensor& prefix, int64_t digit);

void cascade_keep(Tensor keys, int64_t row, const Tensor& threshold, const Tensor& ties);

// Only on the CPU; on CUDA, cpr_fast/ops selects with cascade_select.
void knn_graph_rows(const Tensor& features, Tensor best, int64_t begin, int64_t end);

template <bool cuda>
std::tuple<Tensor, Tensor> tvl1_flow(const Tensor& frames, double tau, double lambda, double theta, int64_t scales,
                                     double scale_step, int64_t warps, double epsilon, int64_t inner_iterations,
                                     int64_t outer_iterations, int64_t median);

// Only on the CPU, because torch's BatchNorm on CUDA is accurate.
std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
                                              const OptionalTensor& running_mean, const OptionalTensor& running_var,
                                              double momentum, double eps, bool relu);

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad, const Tensor& x,
                                                       const OptionalTensor& weight, const OptionalTensor& bias,
                                                       const Tensor& mean, const Tensor& variance, double eps,
                                                       bool relu);

}  // namespace cpr::ops
