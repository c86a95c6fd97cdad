"""Retrieval while a run trains: it gives the rates of `retrieve`, selects the best checkpoint by them, and does not
change the run.
"""

import dataclasses
import json
import os
import shutil

import pytest
import torch

pytest.importorskip("nvidia.dali", reason="the data pipeline needs NVIDIA DALI")

from support.small_runs import assert_same, rows

from cpr_fast.config import Config
from cpr_fast.data.index.index import Index
from cpr_fast.data.synthetic.videos import write_synthetic
from cpr_fast.errors import InputError
from cpr_fast.evaluate.retrieval.retrieve import retrieve
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.pretrain.run.online import OnlineRetrieval
from cpr_fast.runtime import distributed
from cpr_fast.weights.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write_synthetic(tmp_path_factory.mktemp("set"), classes=4, videos=8, frames=12, width=64, height=48)


def config(index, out, **health) -> Config:
    return Config.from_dict(
        {
            "data": {"index": str(index), "frames": 8, "size": 32, "batch_size": 6},
            "model": {"arch": "r3d", "width": 0.0625, "feature_dim": 8},
            "memory": {"size": 6},
            "optim": {"lr": 0.01},
            "schedule": {"cycles": [{"view": "rgb", "epochs": 4, "mining": "none"}]},
            "health": {"online_split": "test"} | health,
            "run": {"out": str(out), "keep_checkpoints": 9},
        }
    )


@pytest.fixture(scope="module")
def watched(index, tmp_path_factory, one_thread):
    return pretrain(config(index, tmp_path_factory.mktemp("run") / "a", online_every=1), progress=False)


def test_rates_are_those_of_retrieve(index, watched, tmp_path):
    online = rows(watched, "online")
    assert [row["epoch"] for row in online] == [0, 1, 2, 3] and all(row["view"] == "rgb" for row in online)
    held_out = tmp_path / "test.csv"
    Index.load(index).select(split="test").save(held_out)
    found = retrieve(
        watched / "checkpoints" / "last.pt", held_out, protocol="leave_source_out", clips_per_video=2, cache=False
    )
    trained = next(row for row in found["results"] if row["name"] == "trained")
    for name in ("r@1", "r@5", "map", "queries", "chance_r@1", "chance_map"):
        assert online[-1][name] == pytest.approx(trained[name], abs=1e-6), name


def test_best_is_the_first_of_the_highest(watched):
    online = rows(watched, "online")
    rates = [row["r@1"] for row in online]
    first = rates.index(max(rates))
    assert [row["best"] for row in online] == [rate > max(rates[:i], default=-1) for i, rate in enumerate(rates)]
    best = load_checkpoint(watched / "checkpoints" / "best.pt")
    assert best["epoch"] == first + 1
    assert best["cycle_state"]["best"] == {"epoch": first, "r@1": rates[first]}


def test_it_changes_no_training(index, watched, tmp_path):
    bare = pretrain(config(index, tmp_path / "bare"), progress=False)
    assert not (bare / "checkpoints" / "best.pt").exists() and rows(bare, "online") == []
    assert rows(bare, "step") == rows(watched, "step")
    weights = [load_checkpoint(run / "checkpoints" / "last.pt")["encoders"] for run in (bare, watched)]
    assert_same(*weights)


def test_a_resumed_run_knows_the_best_so_far(index, watched, tmp_path):
    settings = config(index, tmp_path / "b", online_every=1)
    again = pretrain(settings, progress=False)
    checkpoints = again / "checkpoints"
    early = sorted(checkpoints.glob("step-*.pt"))[1]
    for name in ("last.pt", "best.pt"):
        (checkpoints / name).unlink()
        os.link(early, checkpoints / name)
    pretrain(settings, resume=True, progress=False)
    assert rows(again, "online") == rows(watched, "online")
    states = [load_checkpoint(run / "checkpoints" / "last.pt")["cycle_state"] for run in (again, watched)]
    assert_same(*states)


def test_held_out_videos_that_cannot_be_judged(index, tmp_path):
    for health, message in [
        ({"online_split": "val"}, "split 'val'"),
        ({"online_videos": 1}, "two sources"),
    ]:
        with pytest.raises(InputError, match=message):
            pretrain(config(index, tmp_path / json.dumps(health), online_every=1, **health), progress=False)


def test_held_out_videos_with_an_exact_copy_are_told_at_the_start(index, tmp_path):
    held_out = Index.load(index).select(split="test")
    copy = shutil.copyfile(held_out[0].path, tmp_path / "copy.mp4")
    both = Index([*held_out, dataclasses.replace(held_out[0], path=copy, source="another")], held_out.classes)
    for videos, said in ((held_out, ""), (both, ". 2 queries have an exact copy in the gallery, found whatever")):
        measured = OnlineRetrieval(config(index, tmp_path), videos, ["rgb"], distributed.init("cpu"), watch=None)
        assert said in measured.work_ahead() and ("copy" in measured.work_ahead()) == bool(said)
