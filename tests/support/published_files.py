"""Checkpoint files in exactly the layouts of the published code of CoCLR, CPR and MIL-NCE, with random weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cpr_fast.config import ModelConfig
from cpr_fast.models import build_encoder

# "<block>.<place in it>" of every layer with weights, written down from CoCLR's backbone/s3dg.py.
PLACES = {
    "Conv_1a": "block1.0", "Conv_2b": "block2.1", "Conv_2c": "block2.2", "Mixed_3b": "block3.1", "Mixed_3c": "block3.2",
    "Mixed_4b": "block4.1", "Mixed_4c": "block4.2", "Mixed_4d": "block4.3", "Mixed_4e": "block4.4",
    "Mixed_4f": "block4.5", "Mixed_5b": "block5.1", "Mixed_5c": "block5.2",
}  # fmt: skip


def bn(state: dict[str, Tensor], name: str, width: int) -> None:
    for part in ("weight", "bias", "running_mean", "running_var"):
        state[f"{name}.{part}"] = torch.rand(width) + 0.5
    state[f"{name}.num_batches_tracked"] = torch.tensor(7)


def coclr_encoder(role: str, width: float, dim: int) -> dict[str, Tensor]:
    """nn.Sequential(S3D, pool, conv, ReLU, conv): both names of every layer, the head as 1x1x1 convolutions."""
    backbone = build_encoder(ModelConfig(width=width)).backbone
    state = {}
    for name, tensor in backbone.state_dict().items():
        layer, rest = name.split(".", 1)
        value = tensor + 0.01 * torch.rand(tensor.shape) if tensor.is_floating_point() else torch.tensor(3)
        for alias in (layer, PLACES[layer]):
            state[f"{role}.0.{alias}.{rest}"] = value
    c = backbone.out_channels
    for place, out in (("2", c), ("4", dim)):
        state[f"{role}.{place}.weight"], state[f"{role}.{place}.bias"] = torch.randn(out, c, 1, 1, 1), torch.randn(out)
    return state


def coclr_file(kind: str, width: float = 0.125, dim: int = 16, slots: int = 32) -> dict:
    state = coclr_encoder("encoder_q", width, dim) | coclr_encoder("encoder_k", width, dim)
    state["queue"], state["queue_ptr"] = F.normalize(torch.randn(dim, slots), dim=0), torch.tensor([12])
    if kind != "infonce":
        state["queue_label"] = torch.ones(slots, dtype=torch.int64)
    if kind == "coclr":
        state |= coclr_encoder("sampler", width, dim)
        state["queue_second"] = F.normalize(torch.randn(dim, slots), dim=0)
        state["queue_vname"] = torch.randint(0, 1000, (slots,))
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"params": [0]}]}
    return {"epoch": 99, "state_dict": state, "best_acc": np.float64(0.5), "optimizer": optimizer, "iteration": 1234}


def milnce_file(width: int) -> dict[str, Tensor]:
    """The state_dict of S3D_HowTo100M's s3dg.py with `width` first channels instead of 64, including the text
    module.
    """

    def scaled(c):
        return max(8, round(c * width / 64 / 8) * 8)

    state: dict[str, Tensor] = {}

    def conv(name, c_in, c_out, *kernels):
        for i, kernel in enumerate(kernels, 1):
            state[f"{name}.conv{i}.weight"] = torch.randn(c_out, c_in, *kernel) * 0.2
            bn(state, f"{name}.bn{i}", c_out)
            c_in = c_out

    def gate(name, c):
        state[f"{name}.fc.weight"], state[f"{name}.fc.bias"] = torch.randn(c, c), torch.randn(c)

    one, split = (1, 1, 1), ((1, 3, 3), (3, 1, 1))
    channels = scaled(192)
    conv("conv1", 24, width, (2, 4, 4))
    conv("conv_2b", width, width, one)
    conv("conv_2c", width, channels, *split)
    gate("gating", channels)
    blocks = {
        "3b": (64, 96, 128, 16, 32, 32), "3c": (128, 128, 192, 32, 96, 64), "4b": (192, 96, 208, 16, 48, 64),
        "4c": (160, 112, 224, 24, 64, 64), "4d": (128, 128, 256, 24, 64, 64), "4e": (112, 144, 288, 32, 64, 64),
        "4f": (256, 160, 320, 32, 128, 128), "5b": (256, 160, 320, 32, 128, 128), "5c": (384, 192, 384, 48, 128, 128),
    }  # fmt: skip
    for name, widths in blocks.items():
        b0, b1a, b1b, b2a, b2b, b3 = (scaled(c) for c in widths)
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
