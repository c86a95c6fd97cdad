// Implements torch.ops.cpr_fast.tvl1_flow.
#include <tuple>

#include "ops/checks.h"
#include "ops/launch.h"
#include "ops/ops.h"

namespace cpr::ops {

template <bool cuda>
std::tuple<Tensor, Tensor> tvl1_flow(const Tensor& frames_in, double tau, double lambda, double theta, int64_t scales,
                                     double scale_step, int64_t warps, double epsilon, int64_t inner_iterations,
                                     int64_t outer_iterations, int64_t median) {
  check(frames_in.dim() == 4, "frames: expected shape [N, T, H, W], got ", frames_in);
  const bool uint8 = frames_in.scalar_type() == ScalarType::Byte;
  check(uint8 || frames_in.scalar_type() == ScalarType::Float, "frames: expected dtype uint8 or float32");
  const int64_t N = frames_in.size(0), T = frames_in.size(1), H = frames_in.size(2), W = frames_in.size(3);
  check(T >= 2 && H >= 1 && W >= 1, "frames: expected T >= 2 and H, W >= 1, got ", frames_in);

  const Tensor frames = dense(frames_in);
  Tensor flow = empty(frames, {N, T - 1, 2, H, W}, ScalarType::Float);
  Tensor pixel_iterations = empty(frames, {N, T - 1}, ScalarType::Long);
  const cpr_tvl1_args args{.frames = frames.const_data_ptr(),
                           .flow = flow.mutable_data_ptr<float>(),
                           .pixel_iterations = pixel_iterations.mutable_data_ptr<int64_t>(),
                           .N = N,
                           .T = T,
                           .H = H,
                           .W = W,
                           .frames_are_uint8 = uint8,
                           .tau = tau,
                           .lambda = lambda,
                           .theta = theta,
                           .scale_step = scale_step,
                           .epsilon = epsilon,
                           .scales = static_cast<int>(scales),
                           .warps = static_cast<int>(warps),
                           .inner_iterations = static_cast<int>(inner_iterations),
                           .outer_iterations = static_cast<int>(outer_iterations),
                           .median = static_cast<int>(median)};
  if (!cuda) raise_failure(cpr_tvl1_flow_cpu(&args, num_threads()));
#ifdef CPR_FAST_WITH_CUDA
  if (cuda) {
    const torch::stable::accelerator::DeviceGuard guard(frames.get_device_index());
    Tensor scratch = workspace(frames, cpr_tvl1_flow_cuda_workspace(&args));
    raise_failure(cpr_tvl1_flow_cuda(&args, scratch.mutable_data_ptr(), current_cuda_stream(frames)));
  }
#endif
  return {flow, pixel_iterations};
}

template decltype(tvl1_flow<false>) tvl1_flow<false>;
#ifdef CPR_FAST_WITH_CUDA
template decltype(tvl1_flow<true>) tvl1_flow<true>;
#endif

}  // namespace cpr::ops
