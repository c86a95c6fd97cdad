"""Training runs and evaluations with writers: who writes, what survives a failure, and what the results do not depend
on."""

from __future__ import annotations

import json
import logging

import pytest
from support.processes.two_processes import torchrun
from support.recorded.recording import recorded
from support.small_runs import Killed, assert_same, everything, killed_at, rows, run, settings

from cpr_fast.errors import InputError
from cpr_fast.evaluate.retrieval.summary import write_metrics
from cpr_fast.runtime.files import RUN_LOCK, one_writer
from cpr_fast.runtime.writers import opening

pytestmark = pytest.mark.usefixtures("one_thread")


def with_writers(out, **sections):
    return settings(out, run={"out": str(out), "device": "cpu", "wandb": True, "trackio": True}, **sections)


@pytest.fixture
def evaluated():
    """Returns a function that writes the result of `retrieve` to a run."""
    row = {"recipe": "coclr", "name": "trained", "view": "rgb", "r@1": 0.5}
    return lambda folder: write_metrics(folder, [row], [], [], None)


def test_a_killed_and_resumed_run_is_one_run_with_the_numbers_of_the_file(tmp_path, calls, evaluated):
    """Also with writers that fail at once, a run has the bits of one without writers."""
    with pytest.raises(Killed):
        run(with_writers(tmp_path / "run"), killed_at(2, 1))
    run(with_writers(tmp_path / "run"), resume=True)
    straight = run(settings(tmp_path / "straight"))
    assert_same(everything(straight), everything(tmp_path / "run"))
    inits = recorded(calls, "init")
    assert len({row["id"] for row in inits if "id" in row}) == 1 and len(inits) == 4
    assert [row["exit_code"] for row in recorded(calls, "finish") if "exit_code" in row] == [1, 0]
    losses = {}
    for row in recorded(calls, "log"):
        if "step/step" in row["data"]:
            losses.setdefault(row["data"]["step/step"], set()).add(row["data"].get("step/loss"))
    expected = {row["step"]: {row["loss"]} for row in rows(straight, "step")}
    assert losses == expected and len(losses) == 12  # the steps that were computed twice have one value
    config = recorded(calls, "config.update")[-1]["d"]
    assert config["mining"]["stages"] == 3 and config["run"]["seed"] == 0 and config["command"] and config["versions"]
    (outcome,) = [row["d"] for row in recorded(calls, "summary.update")]
    assert outcome["outcome/step"] == 12 and outcome["outcome/text"]
    evaluated(tmp_path / "run")
    assert recorded(calls, "summary.update")[-1]["d"] == {"retrieval/coclr/trained/rgb/r@1": 0.5}
    assert recorded(calls, "init")[-2]["id"] == inits[0]["id"]


def test_an_evaluation_of_a_run_that_still_trains_leaves_the_writers_to_it(tmp_path, calls, evaluated):
    folder = tmp_path / "run"
    for name in opening.WRITERS:
        (folder / name).mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"run": {"wandb": True}}))
    with one_writer(folder / RUN_LOCK, None):
        evaluated(folder)
    assert not recorded(calls) and len(rows(folder, "retrieval")) == 1
    evaluated(folder)
    assert len(recorded(calls, "init")) == 1


@pytest.mark.parametrize("config", ["", "{", '{"run": {"wandb": 3}}', '{"run": {"out": "x"}}'])
def test_a_folder_without_settings_of_writers_has_none(tmp_path, calls, evaluated, config):
    (tmp_path / "wandb").mkdir()
    if config:
        (tmp_path / "config.json").write_text(config)
    evaluated(tmp_path)
    assert not recorded(calls) and len(rows(tmp_path, "retrieval")) == 1


def test_a_lost_network_does_not_stop_the_training(tmp_path, calls, monkeypatch, caplog):
    monkeypatch.setenv("FAILING_CALLS", "log")
    with caplog.at_level(logging.WARNING):
        folder = run(with_writers(tmp_path / "run"))
    assert len(rows(folder, "step")) == 12 and len(rows(folder, "outcome")) == 1
    lost = [record.getMessage() for record in caplog.records if "the network is down" in record.getMessage()]
    assert len(lost) == 2 and "Weights & Biases" in lost[0] and "trackio" in lost[1]


def test_a_missing_package_is_named_before_the_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "is_installed", lambda module: module != "trackio")
    with pytest.raises(InputError, match="run.trackio: expected the package trackio"):
        run(with_writers(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_only_the_first_of_two_processes_writes(tmp_path, calls):
    cycle = {"view": "rgb", "epochs": 1, "mining": "none"}
    config = with_writers(tmp_path / "run", data={"batch_size": 16}, memory={"size": 32}, schedule={"cycles": [cycle]})
    process = torchrun(tmp_path, config, {})
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    made = recorded(calls, "init")
    assert len(made) == 2 and len({row["process"] for row in recorded(calls)}) == 1
