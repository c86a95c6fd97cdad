"""Rows of metrics.jsonl reach TensorBoard, Weights & Biases and trackio under the names that they have there."""

from __future__ import annotations

import json
import logging

import pytest
from support.recorded.recording import recorded

from cpr_fast.config import RunConfig
from cpr_fast.errors import InputError
from cpr_fast.runtime.metrics import MetricsWriter, read_metrics
from cpr_fast.runtime.writers import open_writers, opening, require_packages

STEP = {"kind": "step", "step": 4, "epoch": 1, "view": "rgb", "loss": 2.5, "pmr": None, "mining": "none"}
EPOCH = {"kind": "epoch", "epoch": 1, "loss": 2.0, "cmr_per_class": [0.5, None], "skipped": 0}
HEALTH = {"kind": "health", "epoch": 1, "step": 5, "feature_std": {"rgb": 0.5, "flow": float("nan")}, "queries": 96}
ONLINE = {"kind": "online", "epoch": 1, "step": 5, "r@1": 0.25, "r@1_ci95": [0.1, 0.4], "best": True}
OUTCOME = {"kind": "outcome", "step": 6, "learnt": None, "text": "It is not certain.", "warnings": ["a"], "cycles": []}
RETRIEVAL = {"kind": "retrieval", "recipe": "coclr", "name": "trained", "view": "rgb", "r@1": 0.5, "map_ci95": [0, 1]}
PROBE = {"kind": "classification", "task": "probe", "recipe": "coclr", "view": "rgb", "split": 1, "seed": 0,
         "accuracy": 0.25, "accuracy_by_crops": {"1": 0.2, "10": 0.25}}  # fmt: skip
SILENT = [{"kind": kind, "text": "x", "epoch": 1, "step": 5} for kind in ("run", "note", "alarm", "mined", "cascade")]
ROWS = [STEP, EPOCH, HEALTH, ONLINE, OUTCOME, RETRIEVAL, PROBE, *SILENT]

LOGGED = [
    {"step/step": 4, "step/epoch": 1, "step/loss": 2.5},
    {"epoch/epoch": 1, "epoch/loss": 2.0, "epoch/skipped": 0},
    {"health/epoch": 1, "health/step": 5, "health/feature_std/rgb": 0.5, "health/queries": 96},
    {"online/epoch": 1, "online/step": 5, "online/r@1": 0.25, "online/best": 1},
]
CONCLUDED = [
    {"outcome/step": 6, "outcome/text": "It is not certain."},
    {"retrieval/coclr/trained/rgb/r@1": 0.5},
    {"classification/probe/coclr/rgb/split-1/seed-0/accuracy": 0.25,
     "classification/probe/coclr/rgb/split-1/seed-0/accuracy_by_crops/1": 0.2,
     "classification/probe/coclr/rgb/split-1/seed-0/accuracy_by_crops/10": 0.25},
]  # fmt: skip


def write(folder, rows=ROWS, resumed=False, about=None, **which):
    writers = open_writers(RunConfig(**which), folder, about or {"run": {"seed": 3}}, resumed=resumed)
    with MetricsWriter(folder, writers=writers) as writer:
        for row in rows:
            writer.write(row)


def test_wandb_gets_every_number_under_its_name(tmp_path, calls, capsys):
    write(tmp_path / "cpr", wandb=True)
    assert [row["data"] for row in recorded(calls, "log")] == LOGGED
    assert [row["d"] for row in recorded(calls, "summary.update")] == CONCLUDED
    (about,) = recorded(calls, "config.update")
    assert about["d"] == {"run": {"seed": 3}} and about["allow_val_change"]  # a resumed run may have other settings
    (init,) = recorded(calls, "init")
    assert (init["project"], init["name"], init["dir"]) == ("cpr_fast", "cpr", str(tmp_path / "cpr"))
    axes = {row["name"]: row["step_metric"] for row in recorded(calls, "define_metric")}
    for values in LOGGED:  # the first name is the axis of all of them
        assert axes[f"{next(iter(values)).partition('/')[0]}/*"] == next(iter(values))
    assert recorded(calls)[-1]["call"] == "finish" and recorded(calls)[-1]["exit_code"] == 0
    printed = capsys.readouterr()
    assert not printed.out and "must not be on stdout" in printed.err


def test_trackio_gets_every_number_under_its_name(tmp_path, calls, capsys):
    write(tmp_path / "cpr", trackio=True)
    assert [row["data"] for row in recorded(calls, "log")] == LOGGED + CONCLUDED
    assert [row["step"] for row in recorded(calls, "log")] == [4] * 4 + [None] * 3
    (init,) = recorded(calls, "init")
    assert init["config"] == {"run": {"seed": 3}} and init["name"].startswith("cpr-") and init["project"] == "cpr_fast"
    assert recorded(calls)[-1]["call"] == "finish" and not capsys.readouterr().out


def test_tensorboard_gets_every_number_under_its_name(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path, tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    expected = {}
    for values in LOGGED:
        (_, at), *rest = values.items()
        expected |= {name: (at, value) for name, value in rest}
    expected |= {name: (0, v) for row in CONCLUDED for name, v in row.items() if not isinstance(v, str)}
    found = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert found == {name: [pytest.approx(point)] for name, point in expected.items()}
    (text,) = events.Tensors("run/text_summary")
    assert json.loads(text.tensor_proto.string_val[0].decode().strip("`json\n ")) == {"run": {"seed": 3}}


def test_the_file_is_the_same_with_and_without_writers(tmp_path, calls):
    write(tmp_path / "with", wandb=True, trackio=True)
    write(tmp_path / "without")
    assert read_metrics(tmp_path / "with") == read_metrics(tmp_path / "without")


@pytest.mark.parametrize(("name", "key"), [("wandb", "id"), ("trackio", "name")])
def test_a_resumed_run_continues_the_same_run(tmp_path, calls, name, key):
    for resumed in (False, True, True, False):
        write(tmp_path / "cpr", rows=[STEP], resumed=resumed, **{name: True})
    first, second, third, new = (row[key] for row in recorded(calls, "init"))
    assert first == second == third != new
    assert {row["resume"] for row in recorded(calls, "init")} == {"allow"}


def test_a_run_that_gets_a_writer_when_it_is_resumed_is_a_new_one(tmp_path, calls):
    write(tmp_path / "cpr", rows=[STEP], resumed=True, wandb=True)
    (init,) = recorded(calls, "init")
    assert init["id"] == (tmp_path / "cpr" / "wandb" / "run_id").read_text().strip() != ""


def test_the_environment_of_a_sweep_decides(tmp_path, calls, monkeypatch):
    for name, value in {"PROJECT": "p", "NAME": "n", "RUN_ID": "sweep7"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("TRACKIO_PROJECT", "q")
    write(tmp_path / "cpr", rows=[STEP], wandb=True, trackio=True)
    wandb, trackio = recorded(calls, "init")
    assert (wandb["project"], wandb["name"], wandb["id"]) == ("p", "n", "sweep7") and trackio["project"] == "q"


def test_a_run_that_was_offline_stays_offline_unless_the_user_decides(tmp_path, calls, monkeypatch):
    write(tmp_path / "cpr", rows=[STEP], wandb=True)
    name = (tmp_path / "cpr" / "wandb" / "run_id").read_text().strip()
    (tmp_path / "cpr" / "wandb" / f"offline-run-20260101_000000-{name}").mkdir()
    write(tmp_path / "cpr", rows=[STEP], resumed=True, wandb=True)
    monkeypatch.setenv("WANDB_MODE", "online")
    write(tmp_path / "cpr", rows=[STEP], resumed=True, wandb=True)
    assert [row["mode"] for row in recorded(calls, "init")] == [None, "offline", None]


@pytest.mark.parametrize("failing", ["init", "log", "summary.update", "finish", "config.update"])
def test_a_failure_is_one_warning(tmp_path, calls, monkeypatch, caplog, failing):
    monkeypatch.setenv("FAILING_CALLS", failing)
    with caplog.at_level(logging.WARNING):
        write(tmp_path, rows=ROWS * 2, wandb=True)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "Weights & Biases" in message and f"{failing}: the network is down" in message
    assert "metrics.jsonl" in message
    assert len(read_metrics(tmp_path)) == 2 * len(ROWS)
    assert len(recorded(calls, failing)) == 1


def test_an_exception_in_the_run_reaches_the_writer_and_the_caller(tmp_path, calls):
    writers = open_writers(RunConfig(wandb=True), tmp_path, {}, resumed=False)
    with pytest.raises(KeyboardInterrupt), MetricsWriter(tmp_path, writers=writers) as writer:
        writer.write(STEP)
        raise KeyboardInterrupt
    assert recorded(calls, "finish")[0]["exit_code"] == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named(monkeypatch, name):
    monkeypatch.setattr(opening, "is_installed", lambda module: module != name)
    with pytest.raises(InputError, match=rf"run\.{name}: expected the package {name} .* pip install {name}"):
        require_packages(RunConfig(**{name: True}))
    require_packages(RunConfig(**{other: True for other in opening.WRITERS if other != name}))
