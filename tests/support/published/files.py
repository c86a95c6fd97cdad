"""Checkpoint files in exactly the layouts of the published code of CoCLR, CPR, IIC and MIL-NCE, with random weights."""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import torch
from support.published.networks import MIXED, MODELS, encoder, randomise, scaled
from torch import Tensor
from torch.nn import functional as F


def bn(state: dict[str, Tensor], name: str, width: int) -> None:
    for part in ("weight", "running_var"):
        state[f"{name}.{part}"] = torch.rand(width) + 0.5
    for part in ("bias", "running_mean"):
        state[f"{name}.{part}"] = 0.1 * torch.randn(width)
    state[f"{name}.num_batches_tracked"] = torch.tensor(7)


def weight(*shape: int) -> Tensor:
    """Returns random weights with which the signal neither grows nor shrinks."""
    return torch.randn(*shape) * math.sqrt(2 / math.prod(shape[1:]))


def coclr_encoder(role: str, width: float, dim: int, gated: bool = False) -> dict[str, Tensor]:
    """Returns the state of nn.Sequential(S3D, pool, conv, ReLU, conv): both names of every layer, the head as 1x1x1
    convolutions."""
    network = encoder(width, dim, gated)
    randomise(network)
    return {f"{role}.{name}": value for name, value in network.state_dict().items()}


def coclr_file(kind: str, width: float = 0.125, dim: int = 16, slots: int = 32, gated: bool = False) -> dict:
    """Returns the file of a model of CoCLR ("infonce", "ubernce", "coclr") or of CPR's model of two views ("cpr")."""
    model = MODELS[kind](width, dim, slots, gated)
    randomise(model)
    state = dict(model.state_dict())
    state["queue_ptr"] = torch.tensor([12])
    if kind != "infonce":
        state["queue_label"] = torch.ones(slots, dtype=torch.int64)
    if kind in ("coclr", "cpr"):
        state["queue_vname"] = torch.randint(0, 1000, (slots,))
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"params": [0]}]}
    return {"epoch": 99, "state_dict": state, "best_acc": np.float64(0.5), "optimizer": optimizer, "iteration": 1234}


def iic_state(arch: str, c: int = 8) -> dict[str, Tensor]:
    """Returns the state_dict of IIC's models/r3d.py, r21d.py and c3d.py with `c` first channels instead of 64."""
    state: dict[str, Tensor] = {}

    def conv(name, c_in, c_out, kernel):
        t, h, w = kernel
        if arch == "r3d":
            state[f"{name}.temporal_spatial_conv.weight"] = weight(c_out, c_in, t, h, w)
        else:
            middle = (t * h * w * c_in * c_out) // (h * w * c_in + t * c_out)
            state[f"{name}.spatial_conv.weight"] = weight(middle, c_in, 1, h, w)
            bn(state, f"{name}.bn", middle)
            state[f"{name}.temporal_conv.weight"] = weight(c_out, middle, t, 1, 1)

    if arch == "c3d":
        c_in = 3
        for name, times in {"1": 1, "2": 2, "3a": 4, "3b": 4, "4a": 8, "4b": 8, "5a": 8, "5b": 8}.items():
            state[f"conv{name}.weight"] = weight(times * c, c_in, 3, 3, 3)
            state[f"conv{name}.bias"] = 0.1 * torch.randn(times * c)
            bn(state, f"bn{name}", times * c)
            c_in = times * c
        return state
    conv("conv1", 3, c, (3, 7, 7))
    bn(state, "bn1", c)
    c_in = c
    for layer, times in (("conv2", 1), ("conv3", 2), ("conv4", 4), ("conv5", 8)):
        if layer != "conv2":
            conv(f"{layer}.block1.downsampleconv", c_in, times * c, (1, 1, 1))
            bn(state, f"{layer}.block1.downsamplebn", times * c)
        conv(f"{layer}.block1.conv1", c_in, times * c, (3, 3, 3))
        bn(state, f"{layer}.block1.bn1", times * c)
        conv(f"{layer}.block1.conv2", times * c, times * c, (3, 3, 3))
        bn(state, f"{layer}.block1.bn2", times * c)
        c_in = times * c
    return state


def iic_file(arch: str, c: int = 8, modality: str = "res") -> dict[str, Any]:
    """Returns the file of IIC's train_ssl.py, with its options, its memory bank and the state of its optimiser."""
    contrast = {"memory_l": F.normalize(torch.randn(10, 8 * c)), "params": torch.tensor([1024, 0.07, -1, -1, 0.5])}
    return {"opt": argparse.Namespace(model=arch, modality=modality, learning_rate=0.01), "model": iic_state(arch, c),
            "contrast": contrast, "optimizer": {"state": {}}, "epoch": 240}  # fmt: skip


def milnce_file(width: int) -> dict[str, Tensor]:
    """Returns the state_dict of S3D_HowTo100M's s3dg.py with `width` first channels instead of 64, including the text
    module.
    """
    state: dict[str, Tensor] = {}
    factor = width / 64

    def conv(name, c_in, c_out, *kernels):
        for i, kernel in enumerate(kernels, 1):
            state[f"{name}.conv{i}.weight"] = weight(c_out, c_in, *kernel)
            bn(state, f"{name}.bn{i}", c_out)
            c_in = c_out

    def gate(name, c):
        state[f"{name}.fc.weight"], state[f"{name}.fc.bias"] = weight(c, c), 1 + torch.randn(c)

    one, split = (1, 1, 1), ((1, 3, 3), (3, 1, 1))
    channels = scaled(192, factor)
    conv("conv1", 24, width, (2, 4, 4))
    conv("conv_2b", width, width, one)
    conv("conv_2c", width, channels, *split)
    gate("gating", channels)
    for name, widths in MIXED.items():
        b0, b1a, b1b, b2a, b2b, b3 = (scaled(c, factor) for c in widths)
        place = f"mixed_{name}"
        conv(f"{place}.conv_b0", channels, b0, one)
        conv(f"{place}.conv_b1_a", channels, b1a, one)
        conv(f"{place}.conv_b1_b", b1a, b1b, *split)
        conv(f"{place}.conv_b2_a", channels, b2a, one)
        conv(f"{place}.conv_b2_b", b2a, b2b, *split)
        conv(f"{place}.conv_b3_b", channels, b3, one)
        for i, c in enumerate((b0, b1b, b2b, b3)):
            gate(f"{place}.gating_b{i}", c)
        channels = b0 + b1b + b2b + b3
    state["fc.weight"], state["fc.bias"] = torch.randn(512, channels), torch.randn(512)
    state["text_module.word_embd.weight"] = torch.randn(50, 300)
    return state
