"""Heads: networks on top of the pooled features of a backbone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class HostLinear(nn.Linear):
    """`nn.Linear` for features [N, C], whose float32 products on a CPU are computed by oneDNN instead of MKL.

    MKL uses AVX2 on processors that are not Intel's, and oneDNN what the processor has: 2.0x for 1,024 x 768 x 768 on
    a Zen 5 core with AVX-512, and 1.0 to 1.1x with AVX2. torch.compile generates the same operator. Elsewhere
    and in what is exported or compiled, it is `nn.Linear`.
    """

    def forward(self, features: Tensor) -> Tensor:
        on_host = features.device.type == "cpu" and features.dtype == self.weight.dtype == torch.float32
        if not on_host or features.dim() != 2 or not len(features) or _is_left_to_torch():
            return super().forward(features)
        return _OneDnnLinear.apply(features, self.weight, self.bias)


def _is_left_to_torch() -> bool:
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return not onednn or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or torch.jit.is_tracing()


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(features, weight)
        return _product(features, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        features, weight = ctx.saved_tensors
        wanted, grad = ctx.needs_input_grad, grad.contiguous()
        return (
            _product(grad, weight.T) if wanted[0] else None,
            _product(grad.T, features.T) if wanted[1] else None,
            grad.sum(0) if wanted[2] else None,
        )


def _product(rows: Tensor, columns: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns rows [N, C] @ columns [D, C]^T + bias [D]."""
    return torch.ops.mkldnn._linear_pointwise(_dense(rows), _dense(columns), bias, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """Returns the matrix, copied if it is part of a larger one: oneDNN multiplies such parts by its reference loops."""
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


class ProjectionHead(nn.Sequential):
    """Maps features [N, C] to unit vectors [N, D] float32: linear, ReLU, linear, L2 normalisation.

    The two linear layers correspond to the 1x1x1 convolutions of CoCLR's head after its average pool. Their weights
    [out, in, 1, 1, 1] can be loaded after a reshape.
    """

    def __init__(self, in_channels: int, feature_dim: int) -> None:
        super().__init__(
            nn.Linear(in_channels, in_channels), nn.ReLU(inplace=True), nn.Linear(in_channels, feature_dim)
        )

    def forward(self, features: Tensor) -> Tensor:
        # float(): under autocast the projection has half precision, in which a norm is too inexact.
        return F.normalize(super().forward(features).float(), dim=1)


class PooledHead(nn.Module):
    """Returns the pooled features [N, C] as float32; `unit` scales them to length 1."""

    def __init__(self, unit: bool) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(features.float(), dim=1) if self.unit else features.float()
