"""The backbones of IIC [Tao et al. 2020, arXiv:2008.02531]: R3D and R(2+1)D with one block per layer, and C3D.

Letters: N clips, C channels, T frames, H x W pixels. The module names are those of IIC's published weights
(`conv2.block1.conv1.temporal_spatial_conv`, `conv1.spatial_conv`, `conv3a`, ...), so that its checkpoints load by name.
All three map [N, 3, T, H, W] float with T >= 8 and H, W >= 16 to [N, `out_channels`, T/8, H/16, W/16] (rounded down
by C3D, up by the others), with 512 channels at width 1. Weights are initialised as torch does by default.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from cpr_fast.models.s3d import scaled
from cpr_fast.ops import BatchNorm3d

LAYERS = (64, 128, 256, 512)  # output channels of conv2 .. conv5
MIN_FRAMES, MIN_SIZE = 8, 16


class PaddedConv3d(nn.Conv3d):
    """3-D convolution that, on the CPU, pads the input with zeros before it convolves without padding.

    This is for correctness, not speed: oneDNN's weight gradient of a padded 3-D convolution reads and writes outside
    its memory when there are few frames (torch 2.13: 3 x 3 x 3 over 2 frames in bf16; it sometimes crashes).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not any(self.padding):
            return super().forward(x)
        t, h, w = self.padding
        return F.conv3d(F.pad(x, (w, w, h, h, t, t)), self.weight, self.bias, self.stride)


class JointConv(nn.Module):
    """The convolution of R3D: k_t x k x k, without bias, with "same" padding."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
        super().__init__()
        padding = tuple(k // 2 for k in kernel)
        self.temporal_spatial_conv = PaddedConv3d(in_channels, out_channels, kernel, stride, padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.temporal_spatial_conv(x)


class SplitConv(nn.Module):
    """The convolution of R(2+1)D: 1 x k x k, BatchNorm, ReLU, k_t x 1 x 1, without bias.

    The number of channels between the two convolutions is chosen such that both have as many weights as `JointConv`
    [Tran et al. 2018, section 3.5].
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]):
        super().__init__()
        t, h, w = kernel
        middle = t * h * w * in_channels * out_channels // (h * w * in_channels + t * out_channels)
        self.spatial_conv = PaddedConv3d(
            in_channels, middle, (1, h, w), (1, *stride[1:]), (0, h // 2, w // 2), bias=False
        )
        self.bn = BatchNorm3d(middle)
        self.temporal_conv = PaddedConv3d(
            middle, out_channels, (t, 1, 1), (stride[0], 1, 1), (t // 2, 0, 0), bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.temporal_conv(self.bn(self.spatial_conv(x), relu=True))


class ResidualBlock(nn.Module):
    """Two convolutions with a shortcut: the identity, or a 1x1x1 convolution of stride 2 if `halve`."""

    def __init__(self, conv: type[nn.Module], in_channels: int, out_channels: int, halve: bool) -> None:
        super().__init__()
        stride = (2, 2, 2) if halve else (1, 1, 1)
        self.conv1 = conv(in_channels, out_channels, (3, 3, 3), stride)
        self.bn1 = BatchNorm3d(out_channels)
        self.conv2 = conv(out_channels, out_channels, (3, 3, 3), (1, 1, 1))
        self.bn2 = BatchNorm3d(out_channels)
        if halve:
            self.downsampleconv = conv(in_channels, out_channels, (1, 1, 1), stride)
            self.downsamplebn = BatchNorm3d(out_channels)
        self.halve = halve

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x), relu=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + (self.downsamplebn(self.downsampleconv(x)) if self.halve else x), inplace=True)


class ResidualLayer(nn.Module):
    """A layer of one block. The class exists only to give parameters the names that they have in checkpoints of IIC."""

    def __init__(self, conv: type[nn.Module], in_channels: int, out_channels: int, halve: bool) -> None:
        super().__init__()
        self.block1 = ResidualBlock(conv, in_channels, out_channels, halve)

    def forward(self, x: Tensor) -> Tensor:
        return self.block1(x)


class ResNet3D(nn.Module):
    """A stem and four residual layers of one block each: 14.36 M parameters with `JointConv`, 14.37 M with `SplitConv`.

    Args:
        conv: the class of every convolution, `JointConv` or `SplitConv`.
        width: multiplies every channel count, each rounded to a multiple of 8.
    """

    def __init__(self, conv: type[nn.Module], width: float = 1.0) -> None:
        super().__init__()
        channels = [scaled(c, width) for c in LAYERS]
        self.conv1 = conv(3, channels[0], (3, 7, 7), (1, 2, 2))
        self.bn1 = BatchNorm3d(channels[0])
        self.conv2 = ResidualLayer(conv, channels[0], channels[0], halve=False)
        self.conv3 = ResidualLayer(conv, channels[0], channels[1], halve=True)
        self.conv4 = ResidualLayer(conv, channels[1], channels[2], halve=True)
        self.conv5 = ResidualLayer(conv, channels[2], channels[3], halve=True)
        self.out_channels = channels[3]

    def forward(self, x: Tensor) -> Tensor:
        _check(x)
        x = self.bn1(self.conv1(x), relu=True)
        return self.conv5(self.conv4(self.conv3(self.conv2(x))))


R3D = partial(ResNet3D, JointConv)
R2Plus1D = partial(ResNet3D, SplitConv)


class C3D(nn.Module):
    """Eight 3x3x3 convolutions with bias, each followed by BatchNorm and ReLU, and four max pools: 27.66 M parameters
    at width 1.

    Args:
        width: multiplies every channel count, each rounded to a multiple of 8.
    """

    # Name of each convolution and its output channels. A max pool follows each convolution listed in `_POOLED`.
    _CONVS = {"1": 64, "2": 128, "3a": 256, "3b": 256, "4a": 512, "4b": 512, "5a": 512, "5b": 512}
    _POOLED = {"1": (1, 2, 2), "2": (2, 2, 2), "3b": (2, 2, 2), "4b": (2, 2, 2)}

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        channels = 3
        for name, out in self._CONVS.items():
            self.add_module(f"conv{name}", PaddedConv3d(channels, scaled(out, width), 3, padding=1))
            self.add_module(f"bn{name}", BatchNorm3d(scaled(out, width)))
            channels = scaled(out, width)
        self.out_channels = channels

    def forward(self, x: Tensor) -> Tensor:
        _check(x)
        for name in self._CONVS:
            x = self.get_submodule(f"bn{name}")(self.get_submodule(f"conv{name}")(x), relu=True)
            if name in self._POOLED:
                x = F.max_pool3d(x, self._POOLED[name])
        return x


def _check(x: Tensor) -> None:
    if x.dim() != 5 or x.shape[1] != 3 or x.shape[2] < MIN_FRAMES or min(x.shape[3:]) < MIN_SIZE:
        raise ValueError(
            f"x: expected [N, 3, T >= {MIN_FRAMES}, H >= {MIN_SIZE}, W >= {MIN_SIZE}], got {list(x.shape)}"
        )
