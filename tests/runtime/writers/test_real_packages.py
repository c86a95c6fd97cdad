"""The real packages, where they are installed: their calls have the parameters that the stand-ins have, and what a run
writes offline can be read back."""

from __future__ import annotations

import importlib.util
import inspect
import json
import struct
import sys
import time
from pathlib import Path

import pytest

from cpr_fast.config import RunConfig
from cpr_fast.runtime.metrics import MetricsWriter
from cpr_fast.runtime.writers import open_writers

RECORDED = Path(__file__).parents[2] / "support" / "recorded"
STEPS = [{"kind": "step", "step": step, "epoch": 0, "view": "rgb", "loss": 2.0 - step} for step in range(3)]
RESULT = {"kind": "retrieval", "recipe": "coclr", "name": "trained", "view": "rgb", "r@1": 0.5}


def stand_in(name: str):
    sys.path.insert(0, str(RECORDED))
    try:
        spec = importlib.util.spec_from_file_location(f"recorded_{name}", RECORDED / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(RECORDED))


def parameters(function) -> list[str]:
    """Returns the parameters of a call, without those that a package keeps only to warn about them."""
    return [name for name in inspect.signature(function).parameters if name != "anonymous"]


def records(file: Path) -> list:
    """Returns the records of wandb's file: blocks of 32 KiB in the format of LevelDB's log, after 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, part, found = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return found


def finished_records(file: Path) -> list:
    """Returns the records of a run that has ended: wandb's own process writes the last ones after `finish`."""
    for _ in range(200):
        found = records(file)
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{file} has no end: {found}")


def history(record) -> dict[str, float]:
    """Returns the values of a row, without wandb's own."""
    values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
    return {name: value for name, value in values.items() if not name.startswith("_")}


def write(folder, rows, resumed, **which):
    about = {"run": {"seed": 3}, "data": {"index": "a.csv"}}
    with MetricsWriter(folder, writers=open_writers(RunConfig(**which), folder, about, resumed=resumed)) as writer:
        for row in rows:
            writer.write(row)


def test_wandb_offline(tmp_path, monkeypatch, caplog):
    wandb = pytest.importorskip("wandb")
    recorded = stand_in("wandb")
    assert parameters(recorded.init) == parameters(wandb.init)
    for name in ("log", "define_metric", "finish"):
        theirs = parameters(getattr(wandb.Run, name))
        assert [parameter for parameter in parameters(getattr(recorded.Run, name)) if parameter != "goal"] == theirs
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "60")
    folder = tmp_path / "cpr"
    write(folder, STEPS[:2], False, wandb=True)
    time.sleep(1.1)  # wandb names the folder of each part by the second of its start
    write(folder, [*STEPS[1:], RESULT], True, wandb=True)
    wandb.teardown()  # as at the end of a process; otherwise the last records are written about 10 s later
    assert not caplog.records
    name = (folder / "wandb" / "run_id").read_text().strip()
    files = sorted((folder / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert len(files) == 2 and sum(1 for _ in (folder / "wandb").glob("offline-run-*")) == 2
    first, second = map(finished_records, files)
    assert [history(record) for record in first if record.WhichOneof("record_type") == "history"] == [
        {"step/step": 0, "step/epoch": 0, "step/loss": 2}, {"step/step": 1, "step/epoch": 0, "step/loss": 1}
    ]  # fmt: skip
    assert "retrieval/coclr/trained/rgb/r@1" in str(second) and '\\"seed\\":3' in str(first)
    assert {(r.run.run_id, r.run.project) for r in [*first, *second] if r.HasField("run")} == {(name, "cpr_fast")}


def test_trackio_on_this_machine(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("TRACKIO_PROJECT", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        monkeypatch.delitem(sys.modules, name)  # it reads TRACKIO_DIR when it is imported
    trackio = pytest.importorskip("trackio")
    recorded = stand_in("trackio")
    assert parameters(recorded.init) == parameters(trackio.init)
    assert parameters(recorded.Run.log)[1:] == parameters(trackio.Run.log)[1:]
    folder = tmp_path / "cpr"
    write(folder, STEPS[:2], False, trackio=True)
    write(folder, [*STEPS[1:], RESULT], True, trackio=True)
    assert not caplog.records
    run = f"cpr-{(folder / 'trackio' / 'run_id').read_text().strip()}"
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("cpr_fast", run)
    losses = [(row["step"], row["step/loss"]) for row in rows if "step/loss" in row]
    assert losses == [(0, 2.0), (1, 1.0), (1, 1.0), (2, 0.0)]
    assert [row["retrieval/coclr/trained/rgb/r@1"] for row in rows if "retrieval/coclr/trained/rgb/r@1" in row] == [0.5]
    assert SQLiteStorage.get_run_config("cpr_fast", run)["run"] == {"seed": 3}
