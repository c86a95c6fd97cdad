"""Training on two processes (gloo): results equal those of one process, also if a worker is killed, one hangs or
the job is pre-empted.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from support.processes.two_processes import VIDEOS, torchrun
from support.small_runs import MODERN, assert_same, everything, rows, settings, wait_for_step
from support.stand_in_loader import RandomLoader, make_index

from cpr_fast.config import Config
from cpr_fast.pretrain.ledger.chain import read_ledger
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.runtime.metrics import read_metrics
from cpr_fast.weights.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(out: Path, batch_size: int, method: dict | None = None, **run) -> Config:
    sections = {
        "data": {"batch_size": batch_size, "frames": 5, "size": 20},
        # At .01 a barely trained frozen encoder maps all clips to one point, and rounding decides which clips are
        # mined.
        "model": {"arch": "s3d", "width": 0.125, "feature_dim": 8, "conv_std": 0.15},
        "memory": {"size": 50, "shuffle_bn_groups": 2},  # not a multiple of 32: the batch size need not divide it
        "optim": {"name": "sgd", "lr": 1e-3},  # Adam turns a rounding difference near zero into a full step
        "schedule": {"cycles": [{"view": "rgb", "epochs": 2, "mining": "none"}, {"view": "flow", "epochs": 2}]},
        "run": {"out": str(out), **run},
    }
    for name, changes in (method or {}).items():
        sections[name] = sections.get(name, {}) | changes
    return settings(out, **sections)


def run_on_two(folder: Path, method: dict | None = None) -> Path:
    """Trains on 2 processes of 16 videos each and returns the run folder."""
    process = torchrun(folder, config_of(folder / "two", 16, method), {})
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 0, errors
    return folder / "two"


def run_on_one(folder: Path, method: dict | None = None) -> Path:
    """Trains the same steps on one process with batches of 32 videos and returns the run folder."""
    config = config_of(folder / "one", 32, method)
    return pretrain(config, index=make_index(VIDEOS), make_loader=RandomLoader, progress=False)


def assert_equal_curves(one: Path, two: Path, weights: float = 1e-5) -> None:
    """Asserts that two runs are equal up to the order of sums.

    Losses agree within 1e-4, weights within `weights`; mined positives and memory entries are the same.
    """
    curves = [[row["loss"] for row in rows(folder, "step")] for folder in (one, two)]
    assert [loss is None for loss in curves[0]] == [loss is None for loss in curves[1]]
    learned = [[loss for loss in curve if loss is not None] for curve in curves]
    assert learned[0] == pytest.approx(learned[1], rel=1e-4)
    assert [row["pmr"] for row in rows(two, "step")] == [row["pmr"] for row in rows(one, "step")]
    a, b = everything(one), everything(two)
    assert a["encoders"].keys() == b["encoders"].keys()
    for view, encoder in a["encoders"].items():
        for name, tensor in encoder.items():
            if tensor.is_floating_point():  # not BatchNorm's counters: two groups of one process count twice
                torch.testing.assert_close(b["encoders"][view][name], tensor, rtol=1e-3, atol=weights)
    memories = [payload["cycle_state"]["memory"] for payload in (a, b)]
    for column in ("video", "source", "label", "start", "enqueued_at"):  # every rank's keys, in the same slots
        assert torch.equal(memories[0][column], memories[1][column])
    torch.testing.assert_close(memories[0]["features"], memories[1]["features"], rtol=0, atol=1e-4)
    assert b["processes"] == 2


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_on_two(tmp_path_factory.mktemp("two"))


def test_two_processes_of_16_have_the_curve_of_one_of_32(two, tmp_path):
    """Both runs have two BatchNorm groups."""
    one = run_on_one(tmp_path)
    assert_equal_curves(one, two)
    waits = [False] * 6 + [True] * 2 + [False] * 4  # the cascade
    assert [row["loss"] is None for row in rows(one, "step")] == waits
    ledgers = [[row for row in read_ledger(folder) if "plan" in row] for folder in (one, two)]
    for name in ("step", "plan", "mined"):  # of the videos of all ranks, in the same order
        assert [row[name] for row in ledgers[0]] == [row[name] for row in ledgers[1]]


@pytest.mark.slow
def test_two_processes_replay_what_two_have_computed(two, tmp_path):
    """From the checkpoint after the third epoch; and with another pixel in the second process, at step 11."""
    for plan, step in (({}, 0), ({"pixel": 10}, 11)):
        process = torchrun(tmp_path, config_of(two, 16), {**plan, "verify": 10})
        errors = process.communicate(timeout=600)[1]
        assert process.returncode == 0, errors
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["equal"] == (step == 0) and result["first_step"] == 10, result
        if step:
            assert result["difference"]["step"] == step and result["difference"]["fields"][0] == "features"


# Residual blocks: rounding does not grow from step to step as in a small S3D, where all videos take part in every loss.
R3D = {"data": {"frames": 8, "size": 16}, "model": {"arch": "r3d"}}
BATCH = R3D | {
    "memory": {"kind": "batch", "shuffle_bn_groups": 2},
    "schedule": {"cycles": [{"view": "rgb", "epochs": 1}]},
}
IIC = R3D | {
    "memory": {"kind": "bank", "shuffle_bn_groups": 2},
    "model": {"arch": "r3d", "shared": True},
    "loss": {"intra_negatives": "repeat"},
    "schedule": {"cycles": [{"view": "rgb", "other": "residual", "epochs": 2}]},  # mines in the second one
    "optim": {"lr": 1e-4},  # the bank keeps every step's rounding: at 1e-3 six steps can make 2.4e-4 of it
}


RANDOM = R3D | {
    "memory": {"size": 99, "shuffle_bn_groups": 2},  # two of its entries stay random vectors
    "schedule": {"cycles": [{"view": "rgb", "epochs": 1, "mining": "label"}]},
}


# The gradient of all ranks is limited, not that of each. SGD, because AdamW makes a step of a rounding difference.
SCHEDULED = R3D | {
    "optim": {name: value for name, value in MODERN["optim"].items() if name != "betas"} | {"name": "sgd", "lr": 1e-3},
    "memory": {"final_ema_momentum": 1.0},
    "schedule": {"cycles": [{"view": "rgb", "epochs": 2, "mining": "none"}]},
}


# Chooses when the queue is full, in the third of its steps, and before the next epoch.
CHOSEN = R3D | {"mining": {"stages": "auto"}}
METHODS = {"batch": BATCH, "iic": IIC, "random queue": RANDOM, "schedules": SCHEDULED, "chosen cascade": CHOSEN}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_other_memories_have_the_curve_of_one_too(tmp_path, method):
    """The batch of all ranks, with gradients between ranks; the bank of IIC, which every rank holds completely; a queue
    that starts with the same random vectors on every rank; and schedules of every value with limited gradients.
    """
    one, two = run_on_one(tmp_path, method), run_on_two(tmp_path, method)
    assert_equal_curves(one, two, weights=5e-6 if method is IIC else 5e-5)  # they move by about 1e-4 and 1e-3
    assert (rows(one, "step")[-1]["pmr"] is None) == (method in (RANDOM, SCHEDULED))
    if method is CHOSEN:
        choices = [
            [(row["step"], row["order"], row["keep"]) for row in rows(folder, "cascade")] for folder in (one, two)
        ]
        assert choices[0] == choices[1] and len(choices[0]) == 2
        mined = [[row["mined"] for row in read_ledger(folder) if "plan" in row] for folder in (one, two)]
        assert mined[0] == mined[1] and sum(row is not None for row in mined[0]) == 4
    if method is SCHEDULED:
        norms = [[row["grad_norm"] for row in rows(folder, "step")] for folder in (one, two)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3) and max(norms[0]) > MODERN["optim"]["clip_norm"]


ADAMW = MODERN | R3D | {"memory": {"size": 50, "shuffle_bn_groups": 2, "final_ema_momentum": 1.0}}


@pytest.fixture(scope="module")
def two_with_adamw(tmp_path_factory):
    return run_on_two(tmp_path_factory.mktemp("adamw"), ADAMW)


@pytest.mark.slow
@pytest.mark.parametrize("death", [1, 5])
def test_schedules_resume_on_two_processes_bit_for_bit(two_with_adamw, tmp_path, death):
    """AdamW with every schedule, and a worker that is killed in the middle of the warm-up or of the cosine."""
    process = torchrun(tmp_path, config_of(tmp_path / "run", 16, ADAMW, checkpoint_every=1), {"die": death})
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 0, errors
    assert rows(tmp_path / "run", "note")[-1]["text"] == f"resumed at step {death}"
    assert_same(everything(two_with_adamw), everything(tmp_path / "run"))
    assert rows(two_with_adamw, "step") == rows(tmp_path / "run", "step")


@pytest.mark.slow
def test_a_pre_empted_job_and_a_killed_and_a_sleeping_worker(two, tmp_path):
    """torchrun receives SIGTERM; then a worker is killed and torchrun restarts it; then a rank sleeps and is reported.

    The final state is equal to that of an undisturbed run, bit for bit.
    """
    config = config_of(tmp_path / "run", 16, checkpoint_every=1, stall_timeout_s=1.0)
    process = torchrun(tmp_path, config, {"each": 0.2})
    wait_for_step(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=600)[1]
    saved = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["step"]
    assert f"stopped by SIGTERM after step {saved}; saved" in errors
    assert 3 <= saved < 8
    process = torchrun(tmp_path, config, {"die": 8, "sleep": 10})
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 0, errors
    assert_same(everything(two), everything(tmp_path / "run"))
    for kind in ("step", "epoch", "mined"):
        assert rows(two, kind) == rows(tmp_path / "run", kind)
    notes = [row["text"] for row in read_metrics(tmp_path / "run") if row["kind"] == "note"]
    assert [text for text in notes if "resumed" in text] == [f"resumed at step {saved}", "resumed at step 8"]
    (stall,) = (text for text in notes if "of step 11" in text)  # a busy machine may have stalled elsewhere, too
    assert stall in errors
    assert stall.startswith("rank 1 has been waiting for the batch of step 11 (in worker.py:")
    assert stall.endswith("s, and the run waits for it")
