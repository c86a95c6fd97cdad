"""MIL-NCE's published S3D: its checkpoint is imported, and the output equals that of the published forward pass."""

from __future__ import annotations

import pytest
import torch
from support.published_files import milnce_file
from torch import Tensor
from torch.nn import functional as F

from cpr_fast.models.s3d_milnce import S3DMilNce
from cpr_fast.weights.checkpoint import load_encoders
from cpr_fast.weights.importing import import_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def milnce_forward(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """Computes the published forward pass up to the average of `mixed_5c`, with functions on the published names."""

    def norm(x, name):
        s = {part: state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")}
        return F.relu(F.batch_norm(x, s["running_mean"], s["running_var"], s["weight"], s["bias"]))

    def conv(x, name):
        for i in (1, 2):
            if (weight := state.get(f"{name}.conv{i}.weight")) is not None:
                x = norm(F.conv3d(x, weight, padding=[k // 2 for k in weight.shape[2:]]), f"{name}.bn{i}")
        return x

    def gate(x, name):
        weights = torch.sigmoid(F.linear(x.mean((2, 3, 4)), state[f"{name}.fc.weight"], state[f"{name}.fc.bias"]))
        return x * weights[:, :, None, None, None]

    def pool(x, kernel, stride):  # TensorFlow's "SAME": ceil(size / stride) outputs; an odd pad has the extra one after
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
    x = pixels.view(n, c, t // 2, 2, h // 2, 2, w // 2, 2).permute(0, 3, 5, 7, 1, 2, 4, 6)
    x = F.conv3d(x.reshape(n, 8 * c, t // 2, h // 2, w // 2), state["conv1.conv1.weight"], padding=(1, 2, 2))
    x = pool(norm(x, "conv1.bn1")[:, :, 1:, 1:, 1:], (1, 3, 3), (1, 2, 2))
    x = pool(gate(conv(conv(x, "conv_2b"), "conv_2c"), "gating"), (1, 3, 3), (1, 2, 2))
    x = pool(mixed(mixed(x, "mixed_3b"), "mixed_3c"), (3, 3, 3), (2, 2, 2))
    for name in ("4b", "4c", "4d", "4e", "4f"):
        x = mixed(x, f"mixed_{name}")
    x = pool(x, (2, 2, 2), (2, 2, 2))
    return mixed(mixed(x, "mixed_5b"), "mixed_5c").mean((2, 3, 4))


@pytest.mark.parametrize("size", [(8, 32, 32), (10, 36, 50)])
def test_milnce_computes_what_the_published_network_does(tmp_path, size):
    torch.manual_seed(0)
    state = milnce_file(8)
    torch.save(state, tmp_path / "s3d_howto100m.pth")
    report = import_checkpoint(tmp_path / "s3d_howto100m.pth", tmp_path / "ours.pt")
    assert (report["source"], report["arch"]) == ("milnce", "s3d_milnce")
    head = ["head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"]
    assert report["encoders"] == {"encoder_q": {"view": "rgb", "matched": len(state) - 3, "missing": head}}
    assert report["unused"] == ["fc.bias", "fc.weight", "text_module.word_embd.weight"]
    _, encoders = load_encoders(tmp_path / "ours.pt")
    pixels = torch.rand(2, 3, *size)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        ours = encoders["rgb"].features((pixels - mean) / std)
    torch.testing.assert_close(ours, milnce_forward(state, pixels), rtol=1e-4, atol=1e-5)


def test_milnce_at_the_published_size():
    with torch.device("meta"):
        network = S3DMilNce()
    assert sum(p.numel() for p in network.parameters()) == 9_146_000
    assert network.Conv_1a.conv.weight.shape == (64, 24, 2, 4, 4)
    with pytest.raises(ValueError, match=r"even T, H and W, got \[1, 3, 8, 33, 32\]"):
        network(torch.empty(1, 3, 8, 33, 32, device="meta"))
