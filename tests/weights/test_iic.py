"""IIC's published R3D, R(2+1)D and C3D are imported by name, for the two views that their one network serves."""

from __future__ import annotations

import pytest
import torch
from support.published.files import iic_file

from cpr_fast.cli import main
from cpr_fast.weights.checkpoint import load_checkpoint, load_encoders
from cpr_fast.weights.importing import import_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("arch", ["r3d", "r21d", "c3d"])
def test_iic_with_its_arguments_and_its_memory_beside_it(tmp_path, arch):
    theirs = iic_file(arch)
    state = theirs["model"]
    torch.save(theirs, tmp_path / "ckpt_epoch_240.pth")
    report = import_checkpoint(tmp_path / "ckpt_epoch_240.pth", tmp_path / "ours.pt")
    assert (report["source"], report["arch"], report["unused"]) == ("iic", arch, [])
    assert report["encoders"] == {
        "encoder_q": {"views": ["rgb", "residual"], "matched": len(state), "missing": []},
    }
    config, encoders = load_encoders(tmp_path / "ours.pt")
    model, data = config.model, config.data
    assert (model.arch, model.head, model.feature_dim, model.shared) == (arch, "pooled", 64, True)
    assert (data.augment, data.frames, data.size, config.memory.kind) == ("iic", 16, 112, "bank")
    assert (config.finetune.optimizer, config.finetune.residual) == ("sgd", "difference")
    assert list(encoders) == ["rgb", "residual"]
    for encoder in encoders.values():
        loaded = encoder.state_dict()
        assert loaded.keys() == {f"backbone.{name}" for name in state}
        assert all(torch.equal(loaded[f"backbone.{name}"], tensor) for name, tensor in state.items())
    both = (tmp_path / "ours.pt").stat().st_size
    import_checkpoint(tmp_path / "ckpt_epoch_240.pth", tmp_path / "rgb.pt", view="rgb")
    assert both < 1.1 * (tmp_path / "rgb.pt").stat().st_size  # the weights are stored once


@pytest.mark.parametrize(
    ("modality", "view", "views"),
    [
        ("res", None, ["rgb", "residual"]),
        ("u", None, ["rgb"]),  # trained on RGB and horizontal flow
        ("rgb", None, ["rgb"]),
        ("res", "residual", ["residual"]),
        ("res", "flow", ["flow"]),
        ("u", "rgb", ["rgb"]),
    ],
)
def test_the_views_are_those_of_its_training_or_the_users(tmp_path, capsys, modality, view, views):
    torch.save(iic_file("c3d", modality=modality), tmp_path / "a.pth")
    options = ["--view", view] if view else []
    assert main(["import-checkpoint", str(tmp_path / "a.pth"), "--out", str(tmp_path / "ours.pt"), *options]) == 0
    said = capsys.readouterr().out
    assert "ours.pt: c3d from a checkpoint of " in said and f" of the encoder of {' and '.join(views)}\n" in said
    payload = load_checkpoint(tmp_path / "ours.pt")
    assert (list(payload["encoders"]), payload["view"]) == (views, views[0])


def test_a_finetuned_network_keeps_its_backbone(tmp_path):
    state = iic_file("r3d")["model"] | {"linear.weight": torch.zeros(101, 64), "linear.bias": torch.zeros(101)}
    torch.save(state, tmp_path / "best.pt")
    report = import_checkpoint(tmp_path / "best.pt", tmp_path / "ours.pt")
    assert report["unused"] == ["linear.bias", "linear.weight"]
