"""The published networks and models, written from their descriptions with torch alone, as a reference in float64.

S3D and the models of CoCLR and CPR are modules, whose names and shapes are those of the published checkpoints. The
networks of IIC and MIL-NCE are functions of a published state_dict. All of them can be narrower than published.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MIXED = {
    "3b": (64, 96, 128, 16, 32, 32), "3c": (128, 128, 192, 32, 96, 64), "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64), "4d": (128, 128, 256, 24, 64, 64), "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128), "5b": (256, 160, 320, 32, 128, 128), "5c": (384, 192, 384, 48, 128, 128),
}  # fmt: skip


def scaled(channels: int, width: float) -> int:
    return channels if width == 1 else max(8, round(channels * width / 8) * 8)


class Conv(nn.Module):
    """1x1x1 convolution, BatchNorm, ReLU."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv, self.bn = nn.Conv3d(c_in, c_out, 1, bias=False), nn.BatchNorm3d(c_out)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class SplitConv(nn.Module):
    """A convolution in space and one in time, each with BatchNorm and ReLU."""

    def __init__(self, c_in, c_out, k, stride=1):
        super().__init__()
        self.conv1 = nn.Conv3d(c_in, c_out, (1, k, k), (1, stride, stride), (0, k // 2, k // 2), bias=False)
        self.conv2 = nn.Conv3d(c_out, c_out, (k, 1, 1), (stride, 1, 1), (k // 2, 0, 0), bias=False)
        self.bn1, self.bn2 = nn.BatchNorm3d(c_out), nn.BatchNorm3d(c_out)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Gating(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc = nn.Linear(c, c)

    def forward(self, x):
        return torch.sigmoid(self.fc(x.mean((2, 3, 4))))[:, :, None, None, None] * x


class Inception(nn.Module):
    def __init__(self, c_in, widths, gated):
        super().__init__()
        b0, b1a, b1, b2a, b2, b3 = widths
        self.branch0 = nn.Sequential(Conv(c_in, b0))
        self.branch1 = nn.Sequential(Conv(c_in, b1a), SplitConv(b1a, b1, 3))
        self.branch2 = nn.Sequential(Conv(c_in, b2a), SplitConv(b2a, b2, 3))
        self.branch3 = nn.Sequential(nn.MaxPool3d(3, 1, 1), Conv(c_in, b3))
        self.gated, self.out = gated, b0 + b1 + b2 + b3
        if gated:
            for i, c in enumerate((b0, b1, b2, b3)):
                self.add_module(f"gating_b{i}", Gating(c))

    def forward(self, x):
        parts = [getattr(self, f"branch{i}")(x) for i in range(4)]
        return torch.cat([getattr(self, f"gating_b{i}")(p) if self.gated else p for i, p in enumerate(parts)], 1)


class S3D(nn.Module):
    """CoCLR's S3D, which registers every layer by its name and by its place in one of five blocks."""

    def __init__(self, width=1.0, gated=False):
        super().__init__()
        first, channels = scaled(64, width), scaled(192, width)
        blocks = [
            {"Conv_1a": SplitConv(3, first, 7, 2)},
            {"MaxPool_2a": nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)), "Conv_2b": Conv(first, first),
             "Conv_2c": SplitConv(first, channels, 3)},
            {"MaxPool_3a": nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))},
            {"MaxPool_4a": nn.MaxPool3d(3, 2, 1)},
            {"MaxPool_5a": nn.MaxPool3d(2, 2)},
        ]  # fmt: skip
        for name, widths in MIXED.items():
            block = Inception(channels, [scaled(c, width) for c in widths], gated)
            blocks[int(name[0]) - 1][f"Mixed_{name}"], channels = block, block.out
        for number, layers in enumerate(blocks, 1):
            for name, layer in layers.items():
                self.add_module(name, layer)
            self.add_module(f"block{number}", nn.Sequential(*layers.values()))
        self.out = channels

    def forward(self, x):
        for number in range(1, 6):
            x = getattr(self, f"block{number}")(x)
        return x


def encoder(width: float, dim: int, gated: bool) -> nn.Sequential:
    backbone = S3D(width, gated)
    c = backbone.out
    return nn.Sequential(backbone, nn.AdaptiveAvgPool3d(1), nn.Conv3d(c, c, 1), nn.ReLU(), nn.Conv3d(c, dim, 1))


class InfoNCE(nn.Module):
    """CoCLR's and CPR's model of one view."""

    def __init__(self, width=1.0, dim=128, slots=2048, gated=False):
        super().__init__()
        self.encoder_q, self.encoder_k = encoder(width, dim, gated), encoder(width, dim, gated)
        self.register_buffer("queue", F.normalize(torch.randn(dim, slots), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))


class UberNCE(InfoNCE):
    def __init__(self, width=1.0, dim=128, slots=2048, gated=False):
        super().__init__(width, dim, slots, gated)
        self.register_buffer("queue_label", torch.full((slots,), -1))


class CoCLR(InfoNCE):
    """The model of two views in CoCLR's code."""

    def __init__(self, width=1.0, dim=128, slots=2048, gated=False):
        super().__init__(width, dim, slots, gated)
        self.sampler = encoder(width, dim, gated)
        self.register_buffer("queue_second", F.normalize(torch.randn(dim, slots), dim=0))
        self.register_buffer("queue_vname", torch.full((slots,), -1))
        self.register_buffer("queue_label", torch.full((slots,), -1))


class CPR(CoCLR):
    """The model of two views in CPR's code, without and with `--cascade`."""

    def __init__(self, width=1.0, dim=128, slots=2048, gated=False):
        super().__init__(width, dim, slots, gated)
        self.register_buffer("memory_index_record", torch.arange(0, slots, dtype=torch.long))


MODELS = {"infonce": InfoNCE, "ubernce": UberNCE, "coclr": CoCLR, "cpr": CPR}


def randomise(network: nn.Module) -> None:
    """Draws weights with which the signal neither grows nor shrinks, and statistics of BatchNorm as after training."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.BatchNorm3d):
            for value in (module.weight, module.running_var):
                nn.init.uniform_(value, 0.5, 1.5)
            for value in (module.bias, module.running_mean):
                nn.init.normal_(value, std=0.1)
            module.num_batches_tracked.fill_(7)


def _norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    parts = [state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
    return F.batch_norm(x, *parts)


def iic_maps(state: dict[str, Tensor], clips: Tensor) -> Tensor:
    """Computes the last feature map of R3D, R(2+1)D or C3D: clips [N, 3, T, H, W] in 0..1 -> [N, C, T', H', W']."""
    if "conv5b.weight" in state:
        x = clips
        for name in ("1", "2", "3a", "3b", "4a", "4b", "5a", "5b"):
            x = F.conv3d(x, state[f"conv{name}.weight"], state[f"conv{name}.bias"], padding=1)
            x = F.relu(_norm(x, state, f"bn{name}"))
            if name in ("1", "2", "3b", "4b"):
                x = F.max_pool3d(x, (1, 2, 2) if name == "1" else 2)
        return x

    def conv(x, name, stride):
        if f"{name}.temporal_spatial_conv.weight" in state:
            weight = state[f"{name}.temporal_spatial_conv.weight"]
            return F.conv3d(x, weight, stride=stride, padding=[k // 2 for k in weight.shape[2:]])
        space, time = state[f"{name}.spatial_conv.weight"], state[f"{name}.temporal_conv.weight"]
        x = F.conv3d(x, space, stride=(1, *stride[1:]), padding=[k // 2 for k in space.shape[2:]])
        x = F.relu(_norm(x, state, f"{name}.bn"))
        return F.conv3d(x, time, stride=(stride[0], 1, 1), padding=(time.shape[2] // 2, 0, 0))

    x = F.relu(_norm(conv(clips, "conv1", (1, 2, 2)), state, "bn1"))
    for layer in ("conv2", "conv3", "conv4", "conv5"):
        block, stride = f"{layer}.block1", (1, 1, 1) if layer == "conv2" else (2, 2, 2)
        y = F.relu(_norm(conv(x, f"{block}.conv1", stride), state, f"{block}.bn1"))
        y = _norm(conv(y, f"{block}.conv2", (1, 1, 1)), state, f"{block}.bn2")
        if layer != "conv2":
            x = _norm(conv(x, f"{block}.downsampleconv", stride), state, f"{block}.downsamplebn")
        x = F.relu(x + y)
    return x


def milnce_features(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Computes the average of `mixed_5c` of MIL-NCE's S3D: pixels [N, 3, T, H, W] in 0..1 -> [N, C]."""

    def conv(x, name):
        for i in (1, 2):
            if (weight := state.get(f"{name}.conv{i}.weight")) is not None:
                x = F.conv3d(x, weight, padding=[k // 2 for k in weight.shape[2:]])
                x = F.relu(_norm(x, state, f"{name}.bn{i}"))
        return x

    def gate(x, name):
        scale = torch.sigmoid(F.linear(x.mean((2, 3, 4)), state[f"{name}.fc.weight"], state[f"{name}.fc.bias"]))
        return scale[:, :, None, None, None] * x

    def pool(x, kernel, stride):  # TensorFlow's padding: an odd number of zeros has one more after than before
        pads = []
        for k, s in zip(kernel, stride, strict=True):
            pads = [max(k - s, 0) // 2, max(k - s, 0) - max(k - s, 0) // 2, *pads]
        return F.max_pool3d(F.pad(x, pads), kernel, stride, ceil_mode=True)

    def mixed(x, name):
        parts = [
            conv(x, f"{name}.conv_b0"),
            conv(conv(x, f"{name}.conv_b1_a"), f"{name}.conv_b1_b"),
            conv(conv(x, f"{name}.conv_b2_a"), f"{name}.conv_b2_b"),
            conv(F.max_pool3d(x, 3, 1, 1), f"{name}.conv_b3_b"),
        ]
        return torch.cat([gate(part, f"{name}.gating_b{i}") for i, part in enumerate(parts)], 1)

    n, c, t, h, w = pixels.shape
    x = pixels.reshape(n, c, t // 2, 2, h // 2, 2, w // 2, 2).permute(0, 3, 5, 7, 1, 2, 4, 6)
    x = F.conv3d(x.reshape(n, 8 * c, t // 2, h // 2, w // 2), state["conv1.conv1.weight"], padding=(1, 2, 2))
    x = F.relu(_norm(x, state, "conv1.bn1"))[:, :, 1:, 1:, 1:]
    x = pool(x, (1, 3, 3), (1, 2, 2))
    x = pool(gate(conv(conv(x, "conv_2b"), "conv_2c"), "gating"), (1, 3, 3), (1, 2, 2))
    x = pool(mixed(mixed(x, "mixed_3b"), "mixed_3c"), (3, 3, 3), (2, 2, 2))
    for name in ("4b", "4c", "4d", "4e", "4f"):
        x = mixed(x, f"mixed_{name}")
    x = pool(x, (2, 2, 2), (2, 2, 2))
    return mixed(mixed(x, "mixed_5b"), "mixed_5c").mean((2, 3, 4))
