"""Heads: networks on top of the pooled features of a backbone."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


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
