"""Heads on top of a backbone's pooled features."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ProjectionHead(nn.Sequential):
    """Linear, ReLU, Linear, L2: features [N, C] -> unit vectors [N, D] float32.

    The two linear layers are the 1x1x1 convolutions of CoCLR's head after its average pool: their weights
    [out, in, 1, 1, 1] load after a reshape.
    """

    def __init__(self, in_channels: int, feature_dim: int) -> None:
        super().__init__(
            nn.Linear(in_channels, in_channels), nn.ReLU(inplace=True), nn.Linear(in_channels, feature_dim)
        )

    def forward(self, features: Tensor) -> Tensor:
        # float(): under autocast the projection is half precision, and a norm must not be.
        return F.normalize(super().forward(features).float(), dim=1)


class PooledHead(nn.Module):
    """The pooled features [N, C] themselves, float32; `unit` scales them to length 1."""

    def __init__(self, unit: bool) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(features.float(), dim=1) if self.unit else features.float()
