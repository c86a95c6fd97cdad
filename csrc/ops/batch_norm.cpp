// Implements torch.ops.cpr_fast.batch_norm and batch_norm_backward.
#include <tuple>

#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/ops.h"
#include "ops/thread_pool.h"

namespace cpr::ops {
namespace {

// Checks that the memory of a float32 tensor [N, C, ...] is dense with the channels last.
void check_channels_last(const char* name, const Tensor& tensor) {
  check(tensor.scalar_type() == ScalarType::Float, name, ": expected dtype float32");
  check(tensor.dim() >= 2, name, ": expected shape [N, C, ...], got ", tensor);
  int64_t stride = 1;
  const auto next = [&](int64_t axis) {
    check(tensor.size(axis) >= 1, name, ": expected a non-empty tensor, got ", tensor);
    check(tensor.size(axis) == 1 || tensor.stride(axis) == stride, name, ": expected channels-last memory");
    stride *= tensor.size(axis);
  };
  next(1);
  for (int64_t axis = tensor.dim() - 1; axis > 1; --axis) next(axis);
  next(0);
}

// Returns a tensor [C] of this dtype, dense.
Tensor of_channels(const char* name, const Tensor& tensor, const Tensor& x, ScalarType type) {
  check_shape(name, tensor, {x.size(1)});
  check(tensor.scalar_type() == type, name, ": expected dtype ", type == ScalarType::Float ? "float32" : "float64");
  return dense(tensor);
}

OptionalTensor of_channels(const char* name, const OptionalTensor& tensor, const Tensor& x) {
  if (!tensor) return std::nullopt;
  return of_channels(name, *tensor, x, ScalarType::Float);
}

// Returns the values [C] of a tensor that the kernel updates in place, or null.
float* updated(const char* name, const OptionalTensor& tensor, const Tensor& x) {
  if (!tensor) return nullptr;
  check_shape(name, *tensor, {x.size(1)});
  check(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous(), name, ": expected dense float32");
  return tensor->mutable_data_ptr<float>();
}

cpr_batch_norm_args arguments(const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
                              bool relu) {
  return {.x = x.const_data_ptr<float>(),
          .weight = weight ? weight->const_data_ptr<float>() : nullptr,
          .bias = bias ? bias->const_data_ptr<float>() : nullptr,
          .R = x.numel() / x.size(1),
          .C = x.size(1),
          .eps = eps,
          .relu = relu};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm(const Tensor& x, const OptionalTensor& weight_in,
                                              const OptionalTensor& bias_in, const OptionalTensor& running_mean,
                                              const OptionalTensor& running_var, double momentum, double eps,
                                              bool relu) {
  check_channels_last("x", x);
  const OptionalTensor weight = of_channels("weight", weight_in, x), bias = of_channels("bias", bias_in, x);
  Tensor y = torch::stable::empty_like(x);  // with the strides of x
  Tensor mean = empty(x, {x.size(1)}, ScalarType::Double), variance = empty(x, {x.size(1)}, ScalarType::Double);
  const cpr_batch_norm_args args = arguments(x, weight, bias, eps, relu);
  const cpr_batch_norm_running running{.mean = updated("running_mean", running_mean, x),
                                       .variance = updated("running_var", running_var, x),
                                       .momentum = momentum};
  raise_failure(cpr_batch_norm_forward_cpu(&args, &running, y.mutable_data_ptr<float>(),
                                           mean.mutable_data_ptr<double>(), variance.mutable_data_ptr<double>(),
                                           parallel_for));
  return {y, mean, variance};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& grad, const Tensor& x,
                                                       const OptionalTensor& weight_in, const OptionalTensor& bias_in,
                                                       const Tensor& mean_in, const Tensor& variance_in, double eps,
                                                       bool relu) {
  check_channels_last("x", x);
  check_channels_last("grad", grad);
  bool equal = grad.dim() == x.dim();
  for (int64_t axis = 0; equal && axis < x.dim(); ++axis) equal = grad.size(axis) == x.size(axis);
  check(equal, "grad: expected the shape of x, ", x, ", got ", grad);
  const OptionalTensor weight = of_channels("weight", weight_in, x), bias = of_channels("bias", bias_in, x);
  const Tensor mean = of_channels("mean", mean_in, x, ScalarType::Double);
  const Tensor variance = of_channels("variance", variance_in, x, ScalarType::Double);
  Tensor grad_x = torch::stable::empty_like(x);
  Tensor grad_weight = empty(x, {x.size(1)}, ScalarType::Float), grad_bias = empty(x, {x.size(1)}, ScalarType::Float);
  const cpr_batch_norm_args args = arguments(x, weight, bias, eps, relu);
  raise_failure(cpr_batch_norm_backward_cpu(&args, mean.const_data_ptr<double>(), variance.const_data_ptr<double>(),
                                            grad.const_data_ptr<float>(), grad_x.mutable_data_ptr<float>(),
                                            grad_weight.mutable_data_ptr<float>(), grad_bias.mutable_data_ptr<float>(),
                                            parallel_for));
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace cpr::ops
