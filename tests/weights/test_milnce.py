"""MIL-NCE's published S3D: its checkpoint is imported, and the output equals that of the published forward pass."""

from __future__ import annotations

import pytest
import torch
from support.published.files import milnce_file
from support.published.networks import milnce_features

from cpr_fast.models.s3d_milnce import S3DMilNce
from cpr_fast.weights.checkpoint import load_encoders
from cpr_fast.weights.importing import import_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("size", [(8, 32, 32), (10, 36, 50)])
def test_milnce_computes_what_the_published_network_does(tmp_path, size):
    torch.manual_seed(0)
    state = milnce_file(8)
    torch.save(state, tmp_path / "s3d_howto100m.pth")
    report = import_checkpoint(tmp_path / "s3d_howto100m.pth", tmp_path / "ours.pt")
    assert (report["source"], report["arch"]) == ("milnce", "s3d_milnce")
    head = ["head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"]
    assert report["encoders"] == {"encoder_q": {"views": ["rgb"], "matched": len(state) - 3, "missing": head}}
    assert report["unused"] == ["fc.bias", "fc.weight", "text_module.word_embd.weight"]
    _, encoders = load_encoders(tmp_path / "ours.pt")
    pixels = torch.rand(2, 3, *size)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        ours = encoders["rgb"].features((pixels - mean) / std)
    torch.testing.assert_close(ours, milnce_features(state, pixels), rtol=1e-4, atol=1e-5)


def test_milnce_at_the_published_size():
    with torch.device("meta"):
        network = S3DMilNce()
    assert sum(p.numel() for p in network.parameters()) == 9_146_000
    assert network.Conv_1a.conv.weight.shape == (64, 24, 2, 4, 4)
    with pytest.raises(ValueError, match=r"even T, H and W, got \[1, 3, 8, 33, 32\]"):
        network(torch.empty(1, 3, 8, 33, 32, device="meta"))
