"""Runs of four processes (gloo), resumed: bit for bit by four, up to rounding by two and by one.

Two processes do not suffice for the first: a sum of two numbers does not depend on their order.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.processes.gloo import on_processes
from support.small_runs import assert_same, everything, rows, settings
from support.stand_in_loader import RandomLoader, make_index

from cpr_fast.config import Config
from cpr_fast.pretrain.ledger.chain import FILE, read_ledger
from cpr_fast.pretrain.run.loop import pretrain

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

STEPS = 9  # three of the first cycle; in the second one the queue is full after two
RESUMED = (1, 6)  # within the first cycle, and where the cascade mines
NETWORKS = {
    "replicated": {},
    "sharded": {
        "model": {"arch": "vit", "args": {"tubelet": [2, 8, 8], "depth": 2, "width": 30, "heads": 2}, "width": 1.0},
        "run": {"shard": True},
    },
}


def config_of(out: Path, network: str, processes: int) -> Config:
    changes = NETWORKS[network]
    return settings(
        out,
        data={"batch_size": 8 // processes, "frames": 8, "size": 16},
        model=changes.get("model", {}),
        memory={"size": 16, "shuffle_bn_groups": None if processes == 4 else 4},  # None: as many as processes
        optim={"name": "sgd", "lr": 1e-3, "clip_norm": 0.5},
        schedule={"cycles": [{"view": "rgb", "epochs": 1, "mining": "none"}, {"view": "flow", "epochs": 2}]},
        run={"out": str(out), "device": "cpu", "checkpoint_every": 1, "keep_checkpoints": STEPS}
        | changes.get("run", {}),
    )


def train(config: Config, *, resume: bool = False) -> Path:
    return pretrain(config, index=make_index(24), make_loader=RandomLoader, progress=False, resume=resume)


def copy_until(step: int, run: Path, out: Path) -> None:
    """Copies a run as it was after `step`; the rows of later steps are removed when it is resumed."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("*.pt"))
    shutil.copy(run / "checkpoints" / f"step-{step:08d}.pt", out / "checkpoints" / "last.pt")


def train_and_resume(rank: int, processes: int, folder: Path, network: str, steps: Sequence[int]) -> None:
    """Trains once from start to end, and again from the checkpoint after each of `steps`."""
    import torch.distributed as dist

    straight = train(config_of(folder / "straight", network, processes))
    for step in steps:
        out = folder / f"from-{step}"
        if rank == 0:
            copy_until(step, straight, out)
        dist.barrier()
        train(config_of(out, network, processes), resume=True)


def go_on(rank: int, processes: int, out: Path) -> None:
    train(config_of(out, "replicated", processes), resume=True)


@pytest.fixture(scope="module")
def replicated(tmp_path_factory) -> Path:
    """The folder of the runs of `train_and_resume` on four processes that hold all weights."""
    folder = tmp_path_factory.mktemp("replicated")
    on_processes(train_and_resume, 4, folder, folder, "replicated", RESUMED)
    return folder


def assert_resumed_bit_for_bit(folder: Path, steps: Sequence[int]) -> None:
    straight = folder / "straight"
    assert [row["loss"] is None for row in rows(straight, "step")] == [False] * 3 + [True] * 2 + [False] * 4
    assert [row.get("pmr") is None for row in rows(straight, "step")] == [True] * 5 + [False] * 4
    for step in steps:
        resumed = folder / f"from-{step}"
        assert rows(resumed, "note")[-1]["text"] == f"resumed at step {step}"
        assert (resumed / FILE).read_bytes() == (straight / FILE).read_bytes()
        assert_same(everything(resumed), everything(straight))
        for kind in ("step", "epoch", "mined", "health"):
            assert rows(resumed, kind) == rows(straight, kind)


def test_four_processes_resume_bit_for_bit(replicated):
    assert_resumed_bit_for_bit(replicated, RESUMED)


def test_four_sharded_processes_resume_bit_for_bit(tmp_path):
    on_processes(train_and_resume, 4, tmp_path, tmp_path, "sharded", RESUMED[1:])
    assert_resumed_bit_for_bit(tmp_path, RESUMED[1:])


@pytest.mark.parametrize("processes", [2, 1])
def test_fewer_processes_go_on_up_to_rounding(replicated, tmp_path, processes):
    """The plan and the mined entries are the same; gradients are averaged in another order."""
    straight, out = replicated / "straight", tmp_path / "run"
    copy_until(RESUMED[1], straight, out)
    if processes == 1:
        train(config_of(out, "replicated", 1), resume=True)
    else:
        on_processes(go_on, processes, tmp_path, out)
    assert everything(out)["processes"] == processes and everything(out)["step"] == STEPS
    before, after = read_ledger(straight), read_ledger(out)
    for name in ("step", "plan", "mined"):
        assert [row.get(name) for row in after] == [row.get(name) for row in before]
    losses = [[row["loss"] for row in rows(run, "step")[RESUMED[1] :]] for run in (straight, out)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
