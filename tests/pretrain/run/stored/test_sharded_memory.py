"""Runs whose queue is divided among processes (memory.shard), on a store of features: the bits of those without."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from support.data_sets.small_stores import make_store
from support.processes.gloo import on_processes
from support.small_runs import rows

from cpr_fast.config import Config, ConfigError
from cpr_fast.errors import InputError
from cpr_fast.pretrain.ledger.chain import read_ledger
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.weights.checkpoint import load_checkpoint

SIZE = 3200  # four parts, as many as processes
CYCLES = [
    {"view": "flow", "epochs": 1, "mining": "none"},  # its queue starts with random vectors
    {"view": "rgb", "epochs": 7},  # the queue is full after 12.5 of 21 steps
    {"view": "flow", "epochs": 1, "mining": "label"},
]


def config_of(store: Path, out: Path, processes: int, **changes) -> Config:
    sections = {
        "data": {"features": str(store), "batch_size": 256 // processes, "window": 128},
        "model": {"feature_dim": 8},
        "memory": {"size": SIZE, "shuffle_bn_groups": 4},
        "mining": {"stages": 3, "top_k": 5},
        "optim": {"name": "sgd", "lr": 0.01, "accumulate": 2 if processes == 2 else 1},
        "schedule": {"cycles": CYCLES},
        "health": {"mining_queries": 16},
        "run": {"out": str(out), "device": "cpu", "keep_checkpoints": 9},
    }
    for name, values in changes.items():
        sections[name] = sections.get(name, {}) | values
    return Config.from_dict(sections)


def train(rank: int, processes: int, folder: Path) -> None:
    """Trains with the whole queue on every process, and with a divided one. Trains both again from step 18 on, from the
    checkpoint of the divided one."""
    import torch.distributed as dist

    settings = {"whole": {"shard": False}, "parts": {"shard": True}}
    for name, memory in settings.items():
        pretrain(config_of(folder / "store", folder / name, processes, memory=memory), progress=False)
    for name, memory in settings.items():
        resumed = folder / f"resumed-{name}"
        if rank == 0:
            shutil.copytree(folder / "parts", resumed)
            for path in (resumed / "checkpoints").iterdir():
                if not path.name.startswith("step") or int(path.stem.split("-")[1]) > 18:
                    path.unlink()
        dist.barrier()
        pretrain(config_of(folder / "store", resumed, processes, memory=memory), progress=False, resume=True)


def assert_same_runs(one: Path, other: Path) -> None:
    """Asserts that two runs have the same bits; view agreement may differ where scores are equal up to rounding."""
    assert read_ledger(one) == read_ledger(other)
    for a, b in zip(rows(one, "step"), rows(other, "step"), strict=True):
        for name in ("loss", "pmr", "mining_r1", "hubness", "survivor_precision_1", "survivor_recall_2",
                     "mutual_neighbours", "mined_age_steps", "pmr_chance"):  # fmt: skip
            assert a.get(name) == b.get(name), (name, a["step"])
        if a.get("view_agreement") is not None:
            assert math.isclose(a["view_agreement"], b["view_agreement"], abs_tol=1e-3)
    for a, b in zip(rows(one, "health"), rows(other, "health"), strict=True):
        assert a["memory_drift"] == b["memory_drift"]
    states = [load_checkpoint(folder / "checkpoints" / "last.pt") for folder in (one, other)]
    for name in ("features", "source", "enqueued_at", "count"):
        memories = [torch.as_tensor(state["cycle_state"]["memory"][name]) for state in states]
        assert torch.equal(*memories), name
    assert torch.equal(states[0]["cycle_state"]["loss_sum"], states[1]["cycle_state"]["loss_sum"])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_divided_queue_trains_and_resumes_with_the_bits_of_a_whole_one(processes, tmp_path):
    make_store(tmp_path / "store", count=960, noise=2.0)  # three steps of 256
    on_processes(train, processes, tmp_path, tmp_path)
    assert len([row for row in rows(tmp_path / "whole", "step") if row.get("pmr") is not None]) > 5
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    assert_same_runs(tmp_path / "resumed-whole", tmp_path / "resumed-parts")
    assert_same_runs(tmp_path / "parts", tmp_path / "resumed-parts")


def test_one_process_holds_the_whole_queue(tmp_path):
    make_store(tmp_path / "store", count=330)
    cycles = {"schedule": {"cycles": [{"view": "rgb", "epochs": 1, "mining": "none"}]}}
    for name, shard in (("whole", False), ("parts", True)):
        pretrain(config_of(tmp_path / "store", tmp_path / name, 1, memory={"shard": shard}, **cycles), progress=False)
    assert read_ledger(tmp_path / "whole") == read_ledger(tmp_path / "parts")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memory": {"shard": True, "kind": "bank"}}, "memory.kind: expected 'queue' with memory.shard = true"),
        ({"mining": {"stages": "auto"}}, "mining.stages: expected a number with memory.shard = true, got 'auto'"),
        ({"loss": {"protocol": "coclr"}}, "loss.protocol: expected 'paper' with memory.shard = true, got 'coclr'"),
        ({"run": {"dump_memory": True}}, "run.dump_memory: expected False with memory.shard = true, got True"),
    ],
)
def test_settings_that_need_the_whole_memory_are_refused(changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        config_of(tmp_path, tmp_path, 1, **{"memory": {"shard": True}, "loss": {}, **changes})


def test_a_queue_that_is_too_small_to_be_divided_is_refused(tmp_path):
    from cpr_fast.pretrain.state.cycle import _shard_of
    from cpr_fast.runtime.distributed import World

    config = config_of(tmp_path, tmp_path, 1, memory={"shard": True})
    with pytest.raises(InputError, match="memory.shard: processes: expected at most 4 for a memory of 3200 entries"):
        _shard_of(config, World(0, 5, torch.device("cpu")))
