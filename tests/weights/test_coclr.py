"""Checkpoints of CoCLR and CPR: files in exactly the published layout are imported and exported."""

from __future__ import annotations

import argparse
import re

import pytest
import torch
from support.published.files import coclr_encoder, coclr_file

from cpr_fast.weights.checkpoint import load_encoders
from cpr_fast.weights.exporting import export
from cpr_fast.weights.importing import import_checkpoint
from cpr_fast.weights.reading import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["infonce", "ubernce", "coclr", "cpr"])
@pytest.mark.parametrize("legacy", [False, True])  # torch 1.4 did not write zip files
def test_coclr_and_back_is_the_same_file(tmp_path, kind, legacy):
    theirs = coclr_file(kind)
    torch.save(theirs, tmp_path / "theirs.pth.tar", _use_new_zipfile_serialization=not legacy)
    report = import_checkpoint(tmp_path / "theirs.pth.tar", tmp_path / "ours.pt", view="flow")
    assert (report["source"], report["arch"], report["unused"]) == ("coclr", "s3d", [])
    views = {"encoder_q": ["flow"], "encoder_k": ["flow"], "sampler": ["rgb"]}
    two = kind in ("coclr", "cpr")
    assert report["encoders"] == {
        role: {"views": view, "matched": 466, "missing": []} for role, view in views.items() if role != "sampler" or two
    }
    _, encoders = load_encoders(tmp_path / "ours.pt")
    assert set(encoders) == ({"flow", "rgb"} if two else {"flow"})
    written = export(tmp_path / "ours.pt", tmp_path / "again.pth.tar", to="cpr" if kind == "cpr" else "coclr")
    assert written["model"] == {"infonce": "InfoNCE", "ubernce": "UberNCE"}.get(kind, "CoCLR")
    again = torch.load(tmp_path / "again.pth.tar", weights_only=True)
    assert {key: again[key] for key in ("epoch", "iteration", "best_acc")} == {
        "epoch": 99, "iteration": 1234, "best_acc": 0.5,
    }  # fmt: skip
    assert again["state_dict"].keys() == theirs["state_dict"].keys()
    for name, tensor in theirs["state_dict"].items():
        assert torch.equal(again["state_dict"][name], tensor), name


def test_the_published_size_has_924_backbone_keys_for_462_tensors(tmp_path):
    state = coclr_encoder("encoder_q", 1.0, 128)
    assert len([key for key in state if key.startswith("encoder_q.0.")]) == 924
    assert state["encoder_q.0.block4.5.branch1.1.conv2.weight"].shape == (320, 320, 3, 1, 1)
    torch.save({"epoch": 299, "state_dict": state}, tmp_path / "theirs.pth.tar")
    report = import_checkpoint(tmp_path / "theirs.pth.tar", tmp_path / "ours.pt")
    assert report["encoders"]["encoder_q"] == {"views": ["rgb"], "matched": 466, "missing": []}
    config, encoders = load_encoders(tmp_path / "ours.pt")
    assert (config.model.width, config.model.feature_dim, list(encoders)) == (1.0, 128, ["rgb"])
    weight = encoders["rgb"].backbone.Mixed_4f.branch1[1].conv2.weight
    assert torch.equal(weight, state["encoder_q.0.block4.5.branch1.1.conv2.weight"])


@pytest.mark.parametrize("kept", ["names", "blocks"])
def test_either_set_of_names_suffices(tmp_path, kept):
    state = coclr_encoder("encoder_q", 0.125, 16)
    dropped = re.compile(r"^encoder_q\.0\.(Conv|Mixed)" if kept == "blocks" else r"^encoder_q\.0\.block")
    state = {f"module.{key}": value for key, value in state.items() if not dropped.match(key)}  # as DDP names them
    torch.save({"state_dict": state}, tmp_path / "a.pth.tar")
    report = import_checkpoint(tmp_path / "a.pth.tar", tmp_path / "ours.pt")
    assert report["encoders"]["encoder_q"] == {"views": ["rgb"], "matched": 466, "missing": []}


def test_a_classifier_has_no_head_and_its_last_layer_is_not_used(tmp_path):
    state = coclr_encoder("encoder_q", 0.125, 16)
    state = {key.replace("encoder_q.0.", "backbone."): value for key, value in state.items() if ".0." in key[:12]}
    state["final_fc.1.weight"] = torch.zeros(101, 128)
    torch.save({"state_dict": state}, tmp_path / "a.pth.tar")
    report = import_checkpoint(tmp_path / "a.pth.tar", tmp_path / "ours.pt")
    assert report["unused"] == ["final_fc.1.weight"]
    found = report["encoders"]["encoder_q"]
    assert found["matched"] == 462
    assert {name.split(".")[0] for name in found["missing"]} == {"head"} and len(found["missing"]) == 4


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (
            {"state_dict": {"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}},
            r"holds conv1.weight, fc.bias; ex",
        ),
        ({"state_dict": {}}, r"holds no tensor; expected a checkpoint of CoCLR or CPR"),
        ([1, 2], r"holds a list; expected"),
        (
            {"state_dict": {"encoder_q.0.layer1.weight": torch.zeros(3)}},
            r"expected the tensor encoder_q.0.Conv_1a.conv1.weight, but the file holds encoder_q.0.layer1.weight",
        ),
    ],
)
def test_a_file_that_matches_nothing_is_refused(tmp_path, payload, message):
    torch.save(payload, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(tmp_path / "a.pt", tmp_path / "ours.pt")
    assert not (tmp_path / "ours.pt").exists()


def test_other_shapes_and_aliases_that_differ_are_refused(tmp_path):
    state = coclr_encoder("encoder_q", 0.125, 16)
    torch.save({"state_dict": state | {"encoder_q.0.Mixed_3b.branch0.0.conv.weight": torch.zeros(8, 8, 1, 1, 1)}},
               tmp_path / "a.pt")  # fmt: skip
    with pytest.raises(
        CheckpointError, match=r"branch0.0.conv.weight: expected shape \[8, 24, 1, 1, 1\] \(s3d of width "
    ):
        import_checkpoint(tmp_path / "a.pt", tmp_path / "ours.pt")
    state["encoder_q.0.block2.1.bn.bias"] = state["encoder_q.0.block2.1.bn.bias"] + 1
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"block2.1.bn.bias differs from encoder_q.0.Conv_2b.bn.bias"):
        import_checkpoint(tmp_path / "a.pt", tmp_path / "ours.pt")


def test_arguments_of_a_script_are_read_but_code_is_not(tmp_path):
    class Trap:
        def __reduce__(self):
            return print, ("executed",)

    state = coclr_encoder("encoder_q", 0.125, 16)
    torch.save({"opt": argparse.Namespace(lr=0.01), "state_dict": state}, tmp_path / "a.pt")
    assert import_checkpoint(tmp_path / "a.pt", tmp_path / "ours.pt")["source"] == "coclr"
    torch.save({"opt": Trap(), "state_dict": state}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"holds \S*print, which is not among the types that are read"):
        import_checkpoint(tmp_path / "a.pt", tmp_path / "ours.pt")
