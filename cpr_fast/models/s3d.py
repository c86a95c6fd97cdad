"""S3D, the separable Inception network for video [Xie et al. 2018, arXiv:1712.04851], in the form of CoCLR and CPR.

Letters: N clips, C channels, T frames, H x W pixels. The module names are those of CoCLR's published weights
(`Conv_1a`, `Mixed_3b.branch1.1.conv2`, ...), so that its checkpoints load by name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cpr_fast.ops import BatchNorm3d

# Output channels of an Inception block's branches: 1x1x1 | 1x1x1, 3x3x3 | 1x1x1, 3x3x3 | pool, 1x1x1.
_MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
_CHANNEL_MULTIPLE = 8  # scaled channel counts are multiples of 8, to fill SIMD vectors and tensor-core tiles


class BasicConv3d(nn.Module):
    """1x1x1 convolution, BatchNorm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, 1, bias=False)
        self.bn = BatchNorm3d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x), relu=True)


class TemporalConv(nn.Conv3d):
    """k x 1 x 1 convolution over the frames, computed as a k x 1 convolution of the image [T, H*W].

    This is for correctness, not speed: oneDNN's 3-D weight gradients read uninitialised memory when there are few
    frames (torch 2.13: k = 3 over 2 frames in bf16, k = 7 over 5 to 7 frames in fp32). Its 2-D weight gradients do not.
    """

    def __init__(self, channels: int, kernel: int, stride: int) -> None:
        super().__init__(channels, channels, (kernel, 1, 1), (stride, 1, 1), (kernel // 2, 0, 0), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        image = F.conv2d(  # all reshapes are views, in channels-last layout too
            x.flatten(3), self.weight.flatten(3), stride=(self.stride[0], 1), padding=(self.padding[0], 0)
        )
        return image.unflatten(3, x.shape[3:])


class STConv3d(nn.Module):
    """k x k x k convolution split into space (1 x k x k) and time (k x 1 x 1), each with BatchNorm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        pad = kernel // 2
        self.conv1 = nn.Conv3d(
            in_channels, out_channels, (1, kernel, kernel), (1, stride, stride), (0, pad, pad), bias=False
        )
        self.conv2 = TemporalConv(out_channels, kernel, stride)
        self.bn1 = BatchNorm3d(out_channels)
        self.bn2 = BatchNorm3d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x), relu=True)
        return self.bn2(self.conv2(x), relu=True)


class SelfGating(nn.Module):
    """Scales each channel by a sigmoid of a linear function of all channel means: the "G" of S3D-G."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(x.mean((2, 3, 4))))[:, :, None, None, None] * x


class SepInception(nn.Module):
    """Four parallel branches, optionally gated, concatenated along the channels; `channels` has the form of
    `_MIXED`."""

    def __init__(self, in_channels: int, channels: tuple[int, ...], gating: bool = False) -> None:
        super().__init__()
        c0, c1_in, c1, c2_in, c2, c3 = channels
        self.branch0 = nn.Sequential(BasicConv3d(in_channels, c0))
        self.branch1 = nn.Sequential(BasicConv3d(in_channels, c1_in), STConv3d(c1_in, c1, 3))
        self.branch2 = nn.Sequential(BasicConv3d(in_channels, c2_in), STConv3d(c2_in, c2, 3))
        self.branch3 = nn.Sequential(nn.MaxPool3d(3, 1, 1), BasicConv3d(in_channels, c3))
        self.out_channels = c0 + c1 + c2 + c3
        for i, c in enumerate((c0, c1, c2, c3)):
            self.add_module(f"gating_b{i}", SelfGating(c) if gating else nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        branches = (
            self.gating_b0(self.branch0(x)),
            self.gating_b1(self.branch1(x)),
            self.gating_b2(self.branch2(x)),
            self.gating_b3(self.branch3(x)),
        )
        return torch.cat(branches, dim=1)


def scaled(channels: int, width: float) -> int:
    """Returns `channels` times `width`, rounded to a multiple of 8 and at least 8; unchanged at width 1."""
    if width == 1:
        return channels
    return max(_CHANNEL_MULTIPLE, round(channels * width / _CHANNEL_MULTIPLE) * _CHANNEL_MULTIPLE)


class S3D(nn.Module):
    """S3D: 7.91 M parameters at width 1; with gating, S3D-G: 9.10 M.

    Input [N, 3, T, H, W] float, T >= 5 and H, W >= 17; output [N, `out_channels`, T/8, H/32, W/32] (stem stride 2 in
    time, floor in the last pooling). At width 1 and 3 x 32 x 128 x 128 the blocks give 64x16x64x64, 192x16x32x32,
    480x16x16x16, 832x8x8x8, 1024x4x4x4.

    Args:
        width: multiplies every channel count, each rounded to a multiple of 8.
        conv_std: standard deviation of the initial convolution weights. BatchNorm follows every convolution, so the
            initial function does not depend on it. It determines how fast the weights change: in one step Adam moves
            them by about lr / conv_std of their size.
        gating: add `SelfGating` to the branches of every Inception block (S3D-G).
    """

    def __init__(self, width: float = 1.0, conv_std: float = 0.01, gating: bool = False) -> None:
        super().__init__()
        stem, second = scaled(64, width), scaled(192, width)
        self.Conv_1a = STConv3d(3, stem, kernel=7, stride=2)
        self.MaxPool_2a = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.Conv_2b = BasicConv3d(stem, stem)
        self.Conv_2c = STConv3d(stem, second, kernel=3)
        self.MaxPool_3a = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        channels = second
        for name, branches in _MIXED.items():
            if name == "Mixed_4b":
                self.MaxPool_4a = nn.MaxPool3d(3, 2, 1)
            if name == "Mixed_5b":
                self.MaxPool_5a = nn.MaxPool3d(2, 2)
            block = SepInception(channels, tuple(scaled(c, width) for c in branches), gating)
            self.add_module(name, block)
            channels = block.out_channels
        self.out_channels = channels
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, std=conv_std)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 5 or x.shape[1] != 3 or x.shape[2] < 5 or min(x.shape[3:]) < 17:
            raise ValueError(f"x: expected [N, 3, T >= 5, H >= 17, W >= 17], got {list(x.shape)}")
        for module in self.children():  # in the order of __init__
            x = module(x)
        return x
