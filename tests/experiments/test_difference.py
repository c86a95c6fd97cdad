"""`cpr-fast diff`: the first step and the first tensor that differ between two runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.small_runs import run, settings, stopped

from cpr_fast.cli import main
from cpr_fast.errors import InputError
from cpr_fast.experiments.difference import compare_checkpoints, compare_runs
from cpr_fast.pretrain.ledger.chain import FILE, LedgerError, read_ledger
from cpr_fast.weights.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

TWO_EPOCHS = {"schedule": {"cycles": [{"view": "rgb", "epochs": 2, "mining": "none"}]}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 6 steps with checkpoints after steps 3 and 6."""
    return run(settings(tmp_path_factory.mktemp("diff") / "run", **TWO_EPOCHS))


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_two_runs_of_the_same_settings_are_equal(finished, tmp_path, capsys):
    other = run(settings(tmp_path / "other", **TWO_EPOCHS))
    result = compare_runs(finished, other)
    assert result["equal"] and result["steps"] == [6, 6] and result["checkpoints"] == 2 and result["settings"] == {}
    assert main(["diff", str(finished), str(other)]) == 0
    assert capsys.readouterr().out.startswith(f"equal: {finished} and {other}\n")


def test_a_run_that_ended_earlier_is_equal_as_far_as_it_goes(tmp_path):
    """Its ledger has the steps up to its death, of which one is not in a checkpoint."""
    long, short = run(settings(tmp_path / "long")), stopped(tmp_path / "short", (2, 1))
    result = compare_runs(long, short)
    assert result["equal"] and result["steps"] == [12, 7] and result["checkpoints"] == 0


@pytest.mark.parametrize(
    ("changes", "step", "fields", "setting"),
    [
        ({"optim": {"lr": 2e-3}}, 2, ["features", "loss"], {"optim.lr": [1e-3, 2e-3]}),
        ({"loss": {"temperature": 0.1}}, 1, ["loss"], {"loss.temperature": [0.07, 0.1]}),
    ],
)
def test_the_first_step_and_the_first_tensor_are_named(finished, tmp_path, capsys, changes, step, fields, setting):
    other = run(settings(tmp_path / "other", **TWO_EPOCHS | changes))
    result = compare_runs(finished, other)
    assert not result["equal"] and result["settings"] == setting
    assert (result["difference"]["step"], result["difference"]["fields"]) == (step, fields)
    assert result["tensors"]["steps"] == 3
    first = next(iter(load_checkpoint(finished / "checkpoints/step-00000003.pt")["encoders"]["rgb"]))
    assert result["tensors"]["name"] == f"encoders.rgb.{first}"
    with pytest.raises(SystemExit) as ended:
        main(["diff", str(finished), str(other)])
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert f"first difference: step {step}, in epoch 1 and cycle 1: the {fields[0]}" in said
    assert f"the first is encoders.rgb.{first}: " in said and " values differ, by at most " in said


def test_settings_and_origins_that_may_change_results_are_listed(copied, finished, capsys):
    """Those of run. that only say what is written are not."""
    config = json.loads((copied / "config.json").read_text())
    config["run"] |= {"device": "cuda", "shard": True, "compile": "default", "seed": 4, "log_every": 7,
                      "checkpoint_every": 2, "keep_checkpoints": 5, "stall_timeout_s": 3.0, "tensorboard": True,
                      "wandb": True, "trackio": True, "dump_memory": True, "out": "elsewhere"}  # fmt: skip
    (copied / "config.json").write_text(json.dumps(config))
    path = copied / "checkpoints" / "step-00000006.pt"
    saved = load_checkpoint(path)
    saved["environment"]["device"] = "cuda (another)"
    save_checkpoint(path, saved | {"processes": 3})
    result = compare_runs(finished, copied)
    assert result["equal"]
    assert set(result["settings"]) == {"run.device", "run.shard", "run.compile", "run.seed"}
    assert result["environment"]["processes"] == [1, 3] and set(result["environment"]) == {"device", "processes"}
    assert main(["diff", str(finished), str(copied)]) == 0
    said = capsys.readouterr().out
    assert "processes: first run with 1, second run with 3\n" in said and "second run with cuda (another)\n" in said


def test_one_changed_value_of_a_later_checkpoint(copied, finished):
    path = copied / "checkpoints" / "step-00000006.pt"
    saved = load_checkpoint(path)
    saved["cycle_state"]["memory"]["features"][0, 3, 2] += 0.25
    saved["cycle_state"]["health"]["count"] += 1
    save_checkpoint(path, saved)
    result = compare_runs(finished, copied)
    assert result["difference"] is None and not result["equal"]
    found = result["tensors"]
    assert (found["steps"], found["differing"], found["name"]) == (6, 2, "cycle_state.memory.features")
    assert found["largest"] == pytest.approx(0.25, abs=1e-6)
    assert found["text"].startswith("[1, 10, 8] float32: 1 of 80 values differ, by at most 0.25")


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2), "[2, 3] float32 and [3, 2] float32"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), "[2] float32 and [2] float64"),
        (torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), "[2] float32: 1 of 2 values differ, by at most 0"),
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), "1 of 2 values differ, in NaN or infinities"),
        (torch.tensor([1, 2**62]), torch.tensor([1, 2**62 + 1]), "[2] int64: 1 of 2 values differ"),
        (1.5, torch.tensor(1.5), "1.5 and tensor(1.5000)"),
        (True, 1, "True and 1"),
        ({"a": 1}, {}, "only the first run has it"),
    ],
)
def test_what_differs_is_told_for_every_kind_of_value(first, second, text):
    found = compare_checkpoints({"cycle_state": {"x": first}}, {"cycle_state": {"x": second}})
    assert text in found["text"] and found["name"].startswith("cycle_state.x")


def test_equal_nan_is_no_difference():
    nan = torch.tensor([float("nan"), 1.0])
    assert compare_checkpoints({"encoders": {"x": nan}}, {"encoders": {"x": nan.clone()}}) is None


def test_damaged_input_is_named(copied, finished):
    (copied / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"copy': expected the file config.json"):
        compare_runs(finished, copied)
    lines = (copied / FILE).read_text().splitlines(keepends=True)
    (copied / FILE).write_text("".join(lines[:3]))
    with pytest.raises(LedgerError, match="is cut off: it ends after 3 steps"):
        compare_runs(copied, finished)
    (copied / FILE).write_text("")
    assert read_ledger(copied) == []
    with pytest.raises(LedgerError, match="ends after 0 steps"):
        compare_runs(copied, finished)
    (copied / FILE).unlink()
    with pytest.raises(LedgerError, match="has no ledger.jsonl"):
        compare_runs(finished, copied)
