"""SIGTERM, SIGHUP and Ctrl-C stop a command in one line, leave no unfinished file, and the same command continues."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal

import pytest
from support.data_sets.flow import write_video
from support.small_runs import run, settings

import cpr_fast.data.flow.files as flow_files
import cpr_fast.data.video.transcode as transcode
from cpr_fast.cli import main
from cpr_fast.evaluate.features.cache import FeatureCache
from cpr_fast.runtime.files import TEMPORARY

pytestmark = pytest.mark.usefixtures("signals_as_in_a_terminal")

NAMES = {signal.SIGTERM: "stopped by SIGTERM", signal.SIGHUP: "stopped by SIGHUP", signal.SIGINT: "interrupted"}


@pytest.fixture
def made(tmp_path):
    """Six videos and their index, made apart so that every test changes its own."""
    for number, name in enumerate("abcdef"):
        write_video(
            tmp_path / "set" / ("train" if number % 3 else "test") / "AB"[number % 2] / f"{name}.mkv", 24, width=64
        )
    assert main(["index", str(tmp_path / "set"), "--out", str(tmp_path / "index.csv")]) == 0
    return tmp_path


def after(monkeypatch, owner, name, count, number):
    """The signal comes to the main thread while the function is called for the `count`-th time."""
    real, calls = getattr(owner, name), []

    def called(*arguments, **options):
        calls.append(name)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, called)


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def stopped(made, capsys, monkeypatch, command, owner, name, number, count=3, kept="what was finished is kept"):
    """Stops a command, which says what is `kept`, and returns the files that it left."""
    before = files(made)
    handlers = [signal.getsignal(each) for each in NAMES]
    with monkeypatch.context() as patch:
        after(patch, owner, name, count, number)
        try:
            code = main(command)
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    error = capsys.readouterr().err
    last = error.splitlines()[-1]
    assert code == 128 + number and "Traceback" not in error
    said = re.escape(f"cpr-fast: {NAMES[number]}; ") + kept + f"; to continue: cd .* && cpr-fast {command[0]} "
    assert re.match(said, last)
    assert [signal.getsignal(each) for each in NAMES] == handlers
    return files(made) - before


@pytest.mark.parametrize("number", NAMES)
def test_index_continues_after_a_signal(made, capsys, monkeypatch, number):
    command = ["index", str(made / "set"), "--out", str(made / "again.csv"), "--transcode", str(made / "small")]
    kept = r"the results of \d of 6 files are kept"
    left = stopped(made, capsys, monkeypatch, command, transcode, "open_video", number, kept=kept)
    assert "again.csv" not in left and not [name for name in left if TEMPORARY in name]
    assert main(command) == 0
    assert (made / "again.csv").read_text().count("\n") == 7 and not list(made.glob("*.jsonl"))


@pytest.mark.parametrize("number", NAMES)
def test_flow_continues_after_a_signal(made, capsys, monkeypatch, number):
    command = ["flow", str(made / "index.csv"), "--out", str(made / "flow")]
    kept = r"(none of 6 videos has|1 of 6 videos has|\d of 6 videos have) complete flow(, which is kept| yet)"
    left = stopped(made, capsys, monkeypatch, command, flow_files, "encode_video", number, kept=kept)
    assert all(name.endswith(".flow.mp4") for name in left)
    assert main(command) == 0
    assert (made / "index.csv").read_text().count(".flow.mp4") == len(list((made / "flow").rglob("*.flow.mp4"))) == 6


@pytest.mark.parametrize("labels", [True, False])
def test_retrieve_computes_nothing_twice_that_it_had_finished(made, capsys, monkeypatch, labels):
    """Neither the statistics of the untrained network, nor the two clips of videos compared without labels, nor
    the features of whole videos."""
    from cpr_fast.evaluate.retrieval import retrieve as module

    run(settings(made / "run", schedule={"cycles": [{"view": "rgb", "epochs": 1, "mining": "none"}]}))
    if not labels:
        assert main(["index", str(made / "set"), "--out", str(made / "index.csv"), "--no-classes"]) == 0
    opened, real = [], module.open_windows

    def open_windows(part, *arguments, **options):
        opened.append(sorted(video.path.stem for video in part))
        return real(part, *arguments, **options)

    monkeypatch.setattr(module, "open_windows", open_windows)
    command = ["retrieve", str(made / "run/checkpoints/last.pt"), "--index", str(made / "index.csv"), "--clips", "1"]
    stopped(made, capsys, monkeypatch, command, FeatureCache, "load", signal.SIGTERM, 3 if labels else 9)
    first = list(opened)
    assert len(first) == 1 + (not labels)
    opened.clear()
    assert main([*command, "--json"]) == 0
    result, second = json.loads(capsys.readouterr().out), list(opened)
    opened.clear()
    assert main([*command, "--json"]) == 0 and not opened
    shutil.rmtree(made / "run" / "features")
    assert main([*command, "--json"]) == 0
    assert sorted(opened) == sorted(first + second)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result


def test_retrieve_continues_after_a_signal(made, capsys, monkeypatch):
    run(settings(made / "run", schedule={"cycles": [{"view": "rgb", "epochs": 1, "mining": "none"}]}))
    command = ["retrieve", str(made / "run/checkpoints/last.pt"), "--index", str(made / "index.csv"), "--clips", "1"]
    left = stopped(made, capsys, monkeypatch, command, FeatureCache, "store", signal.SIGTERM)
    assert left and all(name.startswith("run/features/") and name.endswith(".safetensors") for name in left)
    assert main(command) == 0
    continued = (made / "run/evaluations").glob("*.json")
    first = next(continued).read_text()
    for path in (made / "run/features").iterdir():
        path.unlink()
    assert main(command) == 0
    assert next((made / "run/evaluations").glob("*.json")).read_text() == first
