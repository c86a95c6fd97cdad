"""IIC's published R3D, R(2+1)D and C3D are imported by name."""

from __future__ import annotations

import argparse

import pytest
import torch
from support.published_files import bn
from torch import Tensor

from cpr_fast.weights.checkpoint import load_encoders
from cpr_fast.weights.importing import import_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def iic_file(arch: str, c: int) -> dict[str, Tensor]:
    """The state_dict of IIC's models/r3d.py, r21d.py and c3d.py with `c` first channels instead of 64."""
    state: dict[str, Tensor] = {}

    def conv(name, c_in, c_out, kernel):
        t, h, w = kernel
        if arch == "r3d":
            state[f"{name}.temporal_spatial_conv.weight"] = torch.randn(c_out, c_in, t, h, w)
        else:
            middle = (t * h * w * c_in * c_out) // (h * w * c_in + t * c_out)
            state[f"{name}.spatial_conv.weight"] = torch.randn(middle, c_in, 1, h, w)
            bn(state, f"{name}.bn", middle)
            state[f"{name}.temporal_conv.weight"] = torch.randn(c_out, middle, t, 1, 1)

    if arch == "c3d":
        c_in = 3
        for name, times in {"1": 1, "2": 2, "3a": 4, "3b": 4, "4a": 8, "4b": 8, "5a": 8, "5b": 8}.items():
            state[f"conv{name}.weight"] = torch.randn(times * c, c_in, 3, 3, 3)
            state[f"conv{name}.bias"] = torch.randn(times * c)
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


@pytest.mark.parametrize("arch", ["r3d", "r21d", "c3d"])
def test_iic_with_its_arguments_and_its_memory_beside_it(tmp_path, arch):
    state = iic_file(arch, 8)
    contrast = {"memory_l": torch.randn(10, 64), "params": torch.zeros(5)}
    payload = {"opt": argparse.Namespace(model=arch), "model": state, "contrast": contrast, "epoch": 240}
    torch.save(payload | {"optimizer": {}}, tmp_path / "ckpt_epoch_240.pth")
    report = import_checkpoint(tmp_path / "ckpt_epoch_240.pth", tmp_path / "ours.pt")
    assert (report["source"], report["arch"], report["unused"]) == ("iic", arch, [])
    assert report["encoders"] == {"encoder_q": {"view": "rgb", "matched": len(state), "missing": []}}
    config, encoders = load_encoders(tmp_path / "ours.pt")
    assert (config.model.head, config.model.feature_dim, config.data.frames, config.data.size) == (
        "pooled",
        64,
        16,
        112,
    )
    loaded = encoders["rgb"].state_dict()
    assert loaded.keys() == {f"backbone.{name}" for name in state}
    assert all(torch.equal(loaded[f"backbone.{name}"], tensor) for name, tensor in state.items())
