"""The S3D-G of MIL-NCE, trained on HowTo100M [Miech et al. 2020, arXiv:1912.06430], for its published weights.

It differs from S3D-G in three ways: the stem folds 2 x 2 x 2 pixels into channels, the second convolution is gated too,
and poolings use TensorFlow's "SAME" padding (if the number of zeros is odd, the end gets one more than the start). It
was trained on pixels in 0..1.

Letters: N clips, T frames, H x W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpr_fast.config.pixels import IMAGENET_MEAN, IMAGENET_STD
from cpr_fast.models.s3d import S3D, SelfGating
from cpr_fast.ops import BatchNorm3d


class SpaceToDepthStem(nn.Module):
    """2 x 4 x 4 convolution over 2 x 2 x 2 cells of pixels in 0..1: [N, 3, T, H, W] -> [N, C, T/2, H/2, W/2].

    The input is ImageNet-normalised, as for every encoder; the stem undoes the normalisation.
    """

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(8 * 3, out_channels, (2, 4, 4), padding=(1, 2, 2), bias=False)
        self.bn = BatchNorm3d(out_channels)
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n, channels, *size = x.shape
        frames, height, width = (length // 2 for length in size)
        cells = (x * self.std + self.mean).reshape(n, channels, frames, 2, height, 2, width, 2)
        cells = cells.permute(0, 3, 5, 7, 1, 2, 4, 6).reshape(n, 8 * channels, frames, height, width)
        out = self.bn(self.conv(cells), relu=True)
        return out[:, :, 1:, 1:, 1:]  # "SAME" padding of an even kernel: one more zero before than after


class SamePool3d(nn.Module):
    """Max pooling with TensorFlow's "SAME" padding. It pads with zeros: no activation after a ReLU is smaller."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride
        over = [max(k - s, 0) for k, s in zip(kernel, stride, strict=True)]
        self.padding = [side for total in reversed(over) for side in (total // 2, total - total // 2)]  # W, H, T

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool3d(F.pad(x, self.padding), self.kernel, self.stride, ceil_mode=True)


class S3DMilNce(S3D):
    """The S3D-G of MIL-NCE up to `mixed_5c`, 9.15 M parameters at width 1. T, H and W must be even.

    Args:
        width, conv_std: see `S3D`.
    """

    def __init__(self, width: float = 1.0, conv_std: float = 0.01) -> None:
        super().__init__(width, conv_std, gating=True)
        self.Conv_1a = SpaceToDepthStem(self.Conv_1a.conv1.out_channels)
        nn.init.normal_(self.Conv_1a.conv.weight, std=conv_std)
        self.Conv_2c = nn.Sequential(self.Conv_2c, SelfGating(self.Conv_2c.conv1.out_channels))
        self.MaxPool_2a = SamePool3d((1, 3, 3), (1, 2, 2))
        self.MaxPool_3a = SamePool3d((1, 3, 3), (1, 2, 2))
        self.MaxPool_4a = SamePool3d((3, 3, 3), (2, 2, 2))
        self.MaxPool_5a = SamePool3d((2, 2, 2), (2, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        if any(length % 2 for length in x.shape[2:]):
            raise ValueError(f"x: expected [N, 3, T, H, W] with even T, H and W, got {list(x.shape)}")
        return super().forward(x)
