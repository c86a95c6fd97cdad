"""Pretraining of the user's own network: resumed runs, BatchNorm groups, recomputation, accumulation."""

from __future__ import annotations

import pytest
import torch
from support import own_networks
from support.small_runs import Killed, assert_same, everything, killed_at, rows, run, settings
from support.stand_in_loader import RandomLoader

from cpr_fast.config import load
from cpr_fast.errors import InputError
from cpr_fast.pretrain.run.log import NonFiniteError
from cpr_fast.weights.checkpoint import load_checkpoint
from cpr_fast.weights.reading import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")


def own(tmp_path, name="run", arch="Tokens", file=None, model=None, **sections):
    """Settings of a tiny run with a network of net.py."""
    place = own_networks.write(tmp_path) if file is None else file
    network = {"arch": f"{place}:{arch}", "width": 1.0} | (model or {})
    return settings(tmp_path / name, model=network, **sections)


def test_a_resumed_run_has_the_same_bits_with_dropout(tmp_path):
    straight = run(own(tmp_path, "straight"))
    config = own(tmp_path)
    with pytest.raises(Killed):
        run(config, killed_at(2, 1))
    assert_same(everything(run(config, resume=True)), everything(straight))
    for kind in ("step", "epoch", "health"):
        assert rows(straight, kind) == rows(tmp_path / "run", kind)
    saved = load_checkpoint(straight / "checkpoints" / "last.pt")
    query, key = saved["encoders"]["flow"], saved["cycle_state"]["key"]
    assert saved["config"]["model"]["arch"] == f"{tmp_path}/net.py:Tokens"
    assert not torch.equal(query["backbone.token"], key["backbone.token"])
    assert torch.equal(query["backbone.fixed"], key["backbone.fixed"])
    assert torch.equal(query["backbone.scale"], torch.linspace(0.5, 1.5, 8))


def test_a_run_continues_after_its_folder_and_its_network_were_moved(tmp_path):
    config = own(tmp_path)
    with pytest.raises(Killed):
        run(config, killed_at(2, 1))
    (tmp_path / "moved").mkdir()
    moved = own_networks.write(tmp_path / "moved")
    (tmp_path / "net.py").unlink()
    run(own(tmp_path, file=moved), resume=True)
    with pytest.raises(
        CheckpointError, match=r"other settings .*model.args: the run has {}, this command asks for {\"depth\": 3}"
    ):
        run(own(tmp_path, file=moved, model={"args": {"depth": 3}}), resume=True)


@pytest.mark.parametrize("arch", ["Tokens", "Normed"])
def test_batch_norm_groups_do_not_change_a_network_without_batch_norm(tmp_path, arch):
    args = {"dropout": 0.0} if arch == "Tokens" else {}
    found = []
    for name, memory in (("one", {"size": 10}), ("three", {"size": 10, "shuffle_bn_groups": 3})):
        config = own(tmp_path, name, arch, model={"args": args}, memory=memory)
        found.append([row["loss"] for row in rows(run(config), "step")])
    if arch == "Tokens":
        assert found[0] == pytest.approx(found[1], abs=1e-4)
    else:
        assert found[0] != pytest.approx(found[1], abs=1e-4)


@pytest.mark.parametrize("arch", ["Tokens", "Normed"])
def test_recomputed_activations_give_the_same_weights(tmp_path, arch):
    """Also with dropout, whose draws are repeated."""
    plain, again = (run(own(tmp_path, str(flag), arch, model={"recompute": flag})) for flag in (False, True))
    assert_same(everything(plain)["encoders"], everything(again)["encoders"])


def test_a_shared_network_with_a_bank_and_accumulated_parts_are_trained(tmp_path):
    bank = {"memory": {"kind": "bank"}, "model": {"shared": True, "head": "unit"}}
    run(own(tmp_path, "bank", **bank))
    run(own(tmp_path, "parts", "Normed", optim={"accumulate": 2, "precision": "bf16"}))
    run(own(tmp_path, "batch", memory={"kind": "batch"}))


def test_an_initial_checkpoint_must_be_of_the_same_network(tmp_path):
    first = run(own(tmp_path, "first"))
    init = {"rgb": str(first / "checkpoints" / "last.pt")}
    run(own(tmp_path, "second", model={"init": init}))
    with pytest.raises(CheckpointError, match=r"model.init.rgb: .* has model.args {}, got {'depth': 3}"):
        run(own(tmp_path, "third", model={"init": init, "args": {"depth": 3}}))
    with pytest.raises(CheckpointError, match=r"has model.arch 'net.py:Tokens', got 'net.py:Normed'"):
        run(own(tmp_path, "third", "Normed", model={"init": init}))


def test_features_that_are_not_finite_stop_the_run(tmp_path):
    with pytest.raises(NonFiniteError):
        run(own(tmp_path, arch="returns", model={"args": {"what": "nan"}}))


def test_a_network_that_cannot_be_built_leaves_no_run_folder(tmp_path):
    with pytest.raises(InputError, match="T must be 16, got 8"):
        run(own(tmp_path, arch="refuses"))
    assert not (tmp_path / "run" / "config.json").exists()


def test_the_recorded_config_is_read_from_any_folder(tmp_path, monkeypatch):
    own_networks.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    folder = run(own(tmp_path, file="net.py"), RandomLoader)
    monkeypatch.chdir("/")
    assert load(folder / "config.json").model.arch == f"{tmp_path}/net.py:Tokens"
