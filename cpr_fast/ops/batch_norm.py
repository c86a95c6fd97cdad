"""BatchNorm whose statistics and gradients are accurate on the CPU where the channels are last in memory.

torch's CPU kernel for that memory adds all values of a channel one by one in float32, in the statistics and in the
backward pass. Over 262,144 values of a channel, its output is 500 times further from float64 than that of torch's
kernel for contiguous memory. Ours is at least as near as the latter.

Letters in shapes: N clips, C channels, T frames, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ._ops import ops

_forward, _backward = ops.batch_norm.default, ops.batch_norm_backward.default
_REST = (None,) * 5  # _BatchNorm.forward has five further arguments, which get no gradient


class _AccurateBatchNorm(nn.modules.batchnorm._BatchNorm):
    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """Normalises x [N, C, ...]; with `relu`, applies ReLU to the result in the same pass over memory."""
        self._check_input_dim(x)
        if not self.training or not _has_kernel(x, self.weight):
            y = super().forward(x)
            return F.relu(y, inplace=True) if relu else y
        momentum, running = 0.0, (None, None)
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            running = (self.running_mean, self.running_var)
        return _BatchNorm.apply(x, self.weight, self.bias, *running, momentum, self.eps, relu)


class BatchNorm3d(_AccurateBatchNorm, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` [N, C, T, H, W] -> [N, C, T, H, W], with a kernel of our own for training on the CPU.

    Its arguments, attributes and `state_dict` are those of `torch.nn.BatchNorm3d`. The kernel runs in training mode for
    float32 tensors on the CPU in `torch.channels_last_3d`, and its result does not depend on the number of threads.
    Everything else is torch's: evaluation, CUDA, other dtypes and memory formats, compiled programs, torch.func,
    forward-mode and second derivatives.

    Args:
        num_features, eps, momentum, affine, track_running_stats: see `torch.nn.BatchNorm3d`.

    Raises:
        ValueError: as torch, for another number of dimensions, or a single value per channel in training mode.

    Example:
        >>> clips = torch.randn(2, 8, 4, 16, 16).contiguous(memory_format=torch.channels_last_3d)
        >>> BatchNorm3d(8)(clips, relu=True).shape
        torch.Size([2, 8, 4, 16, 16])
    """


class BatchNorm1d(_AccurateBatchNorm, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` [N, C] -> [N, C], with the kernel of `BatchNorm3d`: the channels of a matrix are
    last, too.

    Args:
        num_features, eps, momentum, affine, track_running_stats: see `torch.nn.BatchNorm1d`.

    Example:
        >>> BatchNorm1d(8)(torch.randn(16, 8)).shape
        torch.Size([16, 8])
    """


def _has_kernel(x: Tensor, weight: Tensor | None) -> bool:
    return (
        type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and (weight is None or weight.dtype == torch.float32)
        and _channels_last(x)
        and x.numel() > x.shape[1]  # torch raises an error for one value per channel, and accepts an empty batch
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad.unpack_dual(x).tangent is None
    )


def _channels_last(x: Tensor) -> bool:
    if x.dim() == 5:
        return x.is_contiguous(memory_format=torch.channels_last_3d)
    return x.movedim(1, -1).is_contiguous()


class _BatchNorm(torch.autograd.Function):
    """Returns y [N, C, T, H, W], and updates the running statistics in place."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, relu):
        y, mean, variance = _forward(x, weight, bias, running_mean, running_var, momentum, eps, relu)
        ctx.eps, ctx.relu = eps, relu
        ctx.save_for_backward(x, weight, bias, mean, variance)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, mean, variance = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient itself is to be differentiated
            return *_differentiable(grad, (x, weight, bias), ctx.needs_input_grad, ctx.eps, ctx.relu), *_REST
        if not _channels_last(grad):
            grad = torch.empty_like(x).copy_(grad)
        grads = _backward(grad, x, weight, bias, mean, variance, ctx.eps, ctx.relu)
        needed = zip(grads, ctx.needs_input_grad[:3])
        return *(grad if need else None for grad, need in needed), *_REST


def _differentiable(grad: Tensor, inputs: tuple, needed: tuple, eps: float, relu: bool) -> list[Tensor | None]:
    """Returns the gradients to x, weight and bias as results of torch operations with derivatives."""
    x, weight, bias = inputs
    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    wanted = [tensor for tensor, need in zip(inputs, needed) if need]
    grads = iter(torch.autograd.grad(F.relu(y) if relu else y, wanted, grad, create_graph=True))
    return [next(grads) if need else None for need in needed[:3]]
