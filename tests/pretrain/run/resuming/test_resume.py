"""A run that was stopped and resumed equals an uninterrupted one: kill -9, SIGTERM, SLURM's SIGUSR1, a full disk."""

from __future__ import annotations

import errno
import gc
import os
import random
import shutil
import signal
import time
import weakref
from pathlib import Path

import pytest
import torch
from support.small_process import TrainingProcess
from support.small_runs import Killed, assert_same, everything, killed_at, rows, settings, wait_for_step
from support.stand_in_loader import NoisyLoader, RandomLoader, make_index

from cpr_fast.config import Config
from cpr_fast.pretrain.run import loop
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.runtime.interrupt import Interrupted
from cpr_fast.weights import checkpoint
from cpr_fast.weights.checkpoint import load_checkpoint
from cpr_fast.weights.reading import CheckpointError

INDEX = make_index(videos=18)

pytestmark = pytest.mark.usefixtures("one_thread")


def start(config: Config) -> TrainingProcess:
    return TrainingProcess(config, Path(f"{config.run.out}.errors"))


def run(config: Config, **kwargs) -> Path:
    return pretrain(config, index=INDEX, make_loader=NoisyLoader, progress=False, **kwargs)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Runs the tiny settings from start to end, on clips with noise from torch's global generator."""
    return run(settings(tmp_path_factory.mktemp("straight") / "run"))


def assert_equal_runs(straight: Path, other: Path) -> None:
    """Asserts that weights, memories, optimiser, generators, counters and all rows of the metrics are bitwise equal."""
    assert_same(everything(straight), everything(other))
    for kind in ("step", "epoch", "mined", "health", "alarm"):
        assert rows(straight, kind) == rows(other, kind)


def test_kill_9_at_a_random_step(straight, tmp_path):
    """The run is killed twice, at steps that vary between test runs; the result must be equal for all of them."""
    config = settings(tmp_path / "run", run={"out": str(tmp_path / "run"), "checkpoint_every": 2})
    draw = random.Random()
    for step in sorted(draw.sample(range(11), 2)):
        process = start(config)
        wait_for_step(tmp_path / "run", step, process)
        time.sleep(draw.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(config, resume="auto")
    assert_equal_runs(straight, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_first(straight, tmp_path, number):
    config = settings(tmp_path / "run")  # saves only at the ends of epochs
    process = start(config)
    wait_for_step(tmp_path / "run", 6, process)
    process.send_signal(number)
    errors = process.wait()
    saved = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    step = saved["step"]
    assert 7 <= step < 12
    path = tmp_path / "run" / "checkpoints" / f"step-{step:08d}.pt"
    assert errors.strip().splitlines()[-1] == f"stopped by {number.name} after step {step}; saved {path}"
    run(config, resume=True)
    assert_equal_runs(straight, tmp_path / "run")


R3D = {"data": {"batch_size": 6, "frames": 8, "size": 16}, "model": {"arch": "r3d", "width": 0.125, "feature_dim": 8}}
IIC = {
    "data": R3D["data"],
    "model": R3D["model"] | {"shared": True},
    "memory": {"kind": "bank"},
    "loss": {"intra_negatives": "repeat"},
    # Progressive training [paper, Table 3]: cycle c mines the top c.
    "schedule": {"cycles": [{"view": "rgb", "other": "residual", "epochs": 2, "top_k": c} for c in (1, 2, 3)]},
}


RANDOM = {"schedule": {"cycles": [{"view": "rgb", "epochs": 4, "mining": "none"}]}}  # the queue is never full
MEMORIES = [{"memory": {"kind": "bank"}}, {"memory": {"kind": "batch"}}, {"memory": {"size": 99}} | RANDOM]


@pytest.mark.parametrize("method", MEMORIES, ids=["bank", "batch", "queue with random vectors"])
def test_every_memory_goes_on_where_it_was(tmp_path, method):
    """The run is killed within the first epoch, within a later one and at the start of a cycle; some steps are done
    twice.
    """
    folder, out = tmp_path / "straight", tmp_path / "run"
    sections = R3D | method
    run(settings(folder, **sections))
    config = settings(out, **sections, run={"out": str(out), "checkpoint_every": 2})
    for death in [(0, 2), (2, 0), (3, 2)]:
        with pytest.raises(Killed):
            pretrain(config, index=INDEX, make_loader=killed_at(*death, NoisyLoader), progress=False, resume="auto")
    run(config, resume=True)
    assert_equal_runs(folder, out)


def test_a_progressive_run_restarts_at_any_checkpoint(tmp_path):
    """Restarts within the first epoch, at the ends of cycles (steps 6 and 12 of 18) and within a later epoch."""
    folder = tmp_path / "straight"
    run(settings(folder, **IIC | {"run": {"out": str(folder), "checkpoint_every": 2, "keep_checkpoints": 18}}))
    mined = rows(folder, "mined")
    assert [max(len(row["mined"]) for row in mined if row["epoch"] == epoch) for epoch in (1, 3, 5)] == [1, 2, 3]
    for step in (2, 6, 10, 12):
        out = tmp_path / f"from-{step}"
        shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.pt"))
        shutil.copy(folder / "checkpoints" / f"step-{step:08d}.pt", out / "checkpoints" / "last.pt")
        run(settings(out, **IIC), resume=True)
        assert_equal_runs(folder, out)
        assert rows(out, "note")[-1]["text"] == f"resumed at step {step}"


def test_a_signal_within_the_process_and_what_it_leaves(tmp_path):
    class Asking(RandomLoader):
        def epoch(self, number, start_step=0):
            for batch in super().epoch(number, start_step):
                yield batch
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)  # SLURM signals every process, and torchrun passes it on as well

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM after step \d") as stopped:
        pretrain(settings(tmp_path), index=INDEX, make_loader=Asking, progress=False)
    assert stopped.value.signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt")["step"] == 2  # the request came after the first batch


def test_a_run_leaves_the_callers_generator_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(settings(tmp_path, schedule={"cycles": [{"view": "rgb", "epochs": 1, "mining": "none"}]}))
    assert torch.equal(torch.rand(3), expected)


def test_a_full_disk_stops_the_run_which_resumes(straight, tmp_path, monkeypatch):
    config = settings(tmp_path / "run")
    save, calls = torch.save, []

    def full(payload, file):
        calls.append(file)
        if len(calls) == 3:
            file.write(b"x" * 1000)
            raise OSError(errno.ENOSPC, "No space left on device")
        save(payload, file)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(
        CheckpointError, match=r"could not write '.*step-00000009.pt': .*No space left on device; nothing"
    ):
        run(config)
    monkeypatch.undo()
    run(config, resume=True)
    assert_equal_runs(straight, tmp_path / "run")


def test_settings_that_an_old_checkpoint_lacks_are_compared(straight, tmp_path):
    """Versions that did not have `mining.anchor` computed with its present default."""
    out = tmp_path / "run"
    config = settings(out)
    process = start(config)
    wait_for_step(out, 3, process)
    process.send_signal(signal.SIGTERM)
    process.wait()
    saved = load_checkpoint(out / "checkpoints" / "last.pt")
    saved["config"]["mining"].pop("anchor")
    checkpoint.save_checkpoint(out / "checkpoints" / "last.pt", saved)
    with pytest.raises(CheckpointError, match=r'mining.anchor: the run has no value, .* "query"'):
        run(settings(out, mining={"stages": 3, "top_k": 2, "anchor": "query"}), resume=True)
    run(config, resume=True)
    assert_equal_runs(straight, out)


def test_a_resumed_run_keeps_one_memory(tmp_path, monkeypatch):
    """What the checkpoint held is freed before the first step: with a large queue it would take its size again."""
    config = settings(tmp_path / "run")
    with pytest.raises(Killed):
        pretrain(config, index=INDEX, make_loader=killed_at(3, 1), progress=False)
    read, alive = [], []

    def opened(*arguments):
        saved = loop_open_run(*arguments)
        read.append(weakref.ref(saved["cycle_state"]["memory"]["features"]))
        return saved

    def cycle(*arguments):
        gc.collect()
        alive.append(read[0]() is not None)
        return loop_run_cycle(*arguments)

    loop_open_run, loop_run_cycle = loop.open_run, loop._run_cycle
    monkeypatch.setattr(loop, "open_run", opened)
    monkeypatch.setattr(loop, "_run_cycle", cycle)
    run(config, resume=True)
    assert alive == [False]
