"""The rows of the ledger: what a digest depends on, and that a step is observed without waiting for the device."""

from __future__ import annotations

import dataclasses
import hashlib
import struct

import numpy as np
import pytest
import torch
from support.small_runs import run, settings
from torch.nn import functional as F

from cpr_fast.pretrain.ledger.chain import read_ledger, step_files
from cpr_fast.pretrain.ledger.rows import checksum, differing, observe, saved_weights, step_row
from cpr_fast.pretrain.run.log import StepLog
from cpr_fast.pretrain.step.result import StepResult
from cpr_fast.weights.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

AT = {"step": 7, "epoch": 2, "cycle": 1}


def result(**changes) -> StepResult:
    """Returns the result of a step of 5 clips, of which 3 entries each were mined."""
    torch.manual_seed(3)
    values = {
        "loss": torch.tensor(1.375), "rates": {}, "finite": torch.tensor(True), "video": torch.arange(5),
        "start": torch.arange(5), "plan": torch.tensor([3, -(2**63), 2**63 - 1, 0, -1]),
        "queries": F.normalize(torch.randn(1, 5, 6), dim=2), "keys": F.normalize(torch.randn(2, 5, 6), dim=2),
        "mined": torch.arange(15).view(5, 3),
    }  # fmt: skip
    return StepResult(**values | changes)


def row_of(seen: StepResult) -> dict:
    return step_row(observe(seen).numpy(), len(seen.video), **AT)


def blake2b(*values: int) -> str:
    return hashlib.blake2b(struct.pack(f"<{len(values)}q", *values), digest_size=8).hexdigest()


def sum_of_bits(tensor: torch.Tensor) -> int:
    """Returns the checksum by integers of Python, as a signed number of 64 bits."""
    total = sum(bits * (2 * bits + 1) for bits in struct.unpack(f"<{tensor.numel()}i", tensor.numpy().tobytes()))
    return (total + 2**63) % 2**64 - 2**63


def test_a_row_holds_the_digests_that_the_standard_library_computes():
    seen = result()
    assert row_of(seen) == AT | {
        "plan": blake2b(*seen.plan.tolist()),
        "features": blake2b(sum_of_bits(torch.cat([seen.queries.flatten(), seen.keys.flatten()]))),
        "mined": blake2b(*range(15)),
        "loss": 1.375,
    }


def test_a_step_that_neither_learns_nor_mines():
    row = row_of(result(loss=torch.tensor(float("nan")), mined=None))
    assert row["loss"] is None and row["mined"] is None
    assert row_of(result(loss=torch.tensor(float("-inf"))))["loss"] is None


@pytest.mark.parametrize("field", ["plan", "features", "mined", "loss"])
def test_every_field_sees_its_smallest_change_and_no_other(field):
    first = result()
    keys = first.keys.clone()
    keys[1, 4, 5] = torch.nextafter(keys[1, 4, 5], torch.tensor(2.0))
    changed = {
        "plan": {"plan": first.plan + torch.tensor([0, 0, 0, 1, 0])},
        "features": {"keys": keys},
        "mined": {"mined": first.mined.flip(1)},
        "loss": {"loss": torch.nextafter(first.loss, torch.tensor(2.0))},
    }
    assert differing(row_of(first), row_of(dataclasses.replace(first, **changed[field]))) == [field]
    assert differing(row_of(first), row_of(result())) == []


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_a_checksum_sees_one_bit_of_any_type_in_any_layout(dtype):
    tensor = torch.randn(3, 5, 2, 4, 7).to(dtype)
    last = tensor.contiguous(memory_format=torch.channels_last_3d)
    assert checksum(tensor) == checksum(last) == checksum(last.transpose(1, 2))
    assert checksum(tensor).dtype is torch.int64 and checksum(tensor).dim() == 0
    last[1, 3, 1, 2, 6] = 0 if last[1, 3, 1, 2, 6] else 1
    assert checksum(tensor) != checksum(last)
    assert checksum(torch.zeros((), dtype=dtype)) == 0 and checksum(torch.zeros(0, dtype=dtype)) == 0


@pytest.mark.parametrize(
    ("dtype", "first", "second"),
    [(torch.float32, 2.0, -2.0), (torch.float64, 1.0, 0.25), (torch.int64, 2**62, 0), (torch.bfloat16, 2.0, -2.0)],
)
def test_a_checksum_sees_every_change_of_one_element(dtype, first, second):
    """The squares of these bit patterns are equal modulo 2^64 or as signed numbers."""
    assert checksum(torch.tensor([3, first], dtype=dtype)) != checksum(torch.tensor([3, second], dtype=dtype))


def test_changes_in_the_last_place_do_not_cancel():
    values = torch.rand(1000)
    moved = values.clone()
    up, down = torch.tensor(2.0), torch.tensor(-1.0)
    moved[::2], moved[1::2] = torch.nextafter(values[::2], up), torch.nextafter(values[1::2], down)
    bits, other = (x.view(torch.int32).long() for x in (values, moved))
    assert bits.sum() == other.sum()  # what a plain sum would compare
    assert checksum(values) != checksum(moved)


def test_a_step_is_observed_without_waiting_for_the_device():
    """Tensors on the meta device have no values: reading one raises."""
    seen = dataclasses.replace(
        result(), **{name: getattr(result(), name).to("meta") for name in ("loss", "queries", "keys", "plan", "mined")}
    )
    assert observe(seen).is_meta and observe(seen).shape == (2 + 5 + 15,)


def test_reading_loss_and_ledger_is_one_copy_from_the_device(tmp_path, monkeypatch):
    """Per step; the rows of the epoch are read separately."""
    count, counts = [0], []
    for name in ("tolist", "cpu", "item", "numpy"):
        function = getattr(torch.Tensor, name)

        def counted(tensor, *args, function=function, name=name):
            count[0] += name != "numpy"
            return function(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    check = StepLog.check

    def checked(log):
        before, pending = count[0], len(log.pending)
        found = check(log)
        counts.append((pending, count[0] - before))
        return found

    monkeypatch.setattr(StepLog, "check", checked)
    run(settings(tmp_path / "run", schedule={"cycles": [{"view": "rgb", "epochs": 1, "mining": "none"}]}))
    assert [copies for pending, copies in counts if pending] == [1] * 3


def test_the_plan_is_that_of_the_videos_of_the_batch():
    row = step_row(np.arange(19, dtype=np.int64), 5, **AT)
    assert row["plan"] == blake2b(*range(2, 7)) and row["mined"] == blake2b(*range(7, 19))


def test_a_run_writes_a_row_of_every_step_however_often_it_reads_the_loss(tmp_path):
    """Rows of steps 4 and 7 of 12 are read with the checkpoints at the ends of epochs, those of step 10 at the end."""
    schedule = {"cycles": [{"view": "rgb", "epochs": 2, "mining": "none"}, {"view": "flow", "epochs": 2}]}
    folders = []
    for every in (1, 5):
        out = tmp_path / str(every)
        folders.append(run(settings(out, schedule=schedule, run={"out": str(out), "log_every": every})))
    first, second = map(read_ledger, folders)
    assert first == second
    assert [row["step"] for row in first if "plan" in row] == list(range(12))
    weights = [row for row in first if "weights" in row]
    assert [row["step"] for row in weights] == [2, 5, 8, 11] and len({row["weights"] for row in weights}) == 4
    assert [row["loss"] is None for row in first if "plan" in row] == [False] * 6 + [True] * 2 + [False] * 4
    assert [row["mined"] is None for row in first if "plan" in row] == [True] * 8 + [False] * 4


@pytest.mark.parametrize(
    "sections",
    [
        {"memory": {"kind": "queue"}},
        {"memory": {"kind": "batch"}, "schedule": {"cycles": [{"view": "rgb", "epochs": 2, "mining": "none"}]}},
        {"memory": {"kind": "bank", "shuffle_bn_groups": 1}},
        {"model": {"shared": True}, "memory": {"kind": "bank", "shuffle_bn_groups": 1}},
    ],
    ids=["queue", "batch", "bank", "shared"],
)
def test_the_weights_of_a_checkpoint_have_the_digest_of_their_row(tmp_path, sections):
    """After two epochs, whichever encoders the run has. The row was computed from the encoders that trained."""
    schedule = {"cycles": [{"view": "flow", "epochs": 2, "milestones": [1]}]}
    folder = run(settings(tmp_path / "run", **{"schedule": schedule, **sections}))
    recorded = [row["weights"] for row in read_ledger(folder) if "weights" in row]
    saved = [load_checkpoint(path) for _, path in step_files(folder)]
    assert [saved_weights(payload) for payload in saved] == recorded and len(set(recorded)) == 2
