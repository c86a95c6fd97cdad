"""Two commands that write the same files at the same time: the second is refused, or both leave whole files."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from support.data_sets.flow import write_video
from support.small_runs import run, settings

import cpr_fast.data.index.build as build
import cpr_fast.data.synthetic.videos as synthetic
import cpr_fast.evaluate.classify.classify as classify
from cpr_fast.cli import main
from cpr_fast.data.flow.write import write_flow
from cpr_fast.data.index.build import IndexOptions, write_index
from cpr_fast.errors import InputError
from cpr_fast.runtime.files import one_writer

HOLDER = f"process {os.getpid()} on {socket.gethostname()}"


@pytest.fixture
def root(tmp_path):
    for name in "abc":
        write_video(tmp_path / "set/A" / f"{name}.mkv", 18, width=64)
    return tmp_path / "set"


def test_one_process_at_a_time_holds_a_lock(tmp_path):
    lock = tmp_path / "new/.lock"
    with one_writer(lock, "busy"):
        with pytest.raises(InputError, match="^busy "), one_writer(lock, "busy"):
            pass
        assert lock.exists()
    assert not lock.exists()
    lock.write_text("left by a process that was killed")
    with one_writer(lock, "busy"):
        pass


def test_a_refusal_names_the_process_that_holds_the_lock(tmp_path):
    with one_writer(tmp_path / ".lock", "busy"):
        said = rf"^busy \({HOLDER}\); wait until it has ended$"
        with pytest.raises(InputError, match=said), one_writer(tmp_path / ".lock", "busy"):
            pass
        with pytest.raises(InputError, match="; go$"), one_writer(tmp_path / ".lock", "busy", "go"):
            pass


def test_a_writer_without_a_refusal_waits(tmp_path):
    order = []

    def second():
        with one_writer(tmp_path / ".lock", None):
            order.append("second")

    thread = threading.Thread(target=second)
    with one_writer(tmp_path / ".lock", None):
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"] and not os.listdir(tmp_path)


def test_a_lock_that_the_block_removed_is_not_taken_from_the_next_writer(tmp_path):
    lock = tmp_path / ".lock"
    with one_writer(lock, "busy"):
        lock.unlink()
        second = one_writer(lock, "busy")
        second.__enter__()
    with pytest.raises(InputError, match="^busy "), one_writer(lock, "busy"):
        pass
    second.__exit__(None, None, None)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("storage", ["video", "lmdb"])
def test_a_file_system_without_locks_is_warned_of(tmp_path, root, caplog, monkeypatch, storage):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    index, out = tmp_path / "i.csv", tmp_path / ("flow" if storage == "video" else "flow.lmdb")
    assert main(["index", str(root), "--out", str(index)]) == 0
    assert main(["flow", str(index), "--out", str(out), "--storage", storage]) == 0
    assert index.read_text().count(",flow") == 4  # one is in the first line
    warned = [record.message for record in caplog.records if record.message.startswith("Cannot lock")]
    assert len(warned) >= 3 and all("No locks available" in message for message in warned)


@pytest.mark.parametrize(
    ("second", "refusal"),
    [
        (["--out", "{0}/i.csv"], "--out: another `cpr-fast index` is writing '{0}/i.csv' ({1})"),
        (
            ["--out", "{0}/other.csv", "--transcode", "{0}/small"],
            "--transcode: another `cpr-fast index` is writing '{0}/small' ({1})",
        ),
        (["--out", "{0}/other.csv"], None),
        (["--out", "{0}/i.csv", "--shard", "1/2"], None),
    ],
)
def test_a_second_index_is_refused_while_the_first_runs(tmp_path, root, capsys, monkeypatch, second, refusal):
    codes, real = [], build.transcode_video

    def transcode(*arguments):
        if not codes and arguments[0].stem == "b":
            codes.append(None)
            codes[0] = main(["index", str(root), *(part.format(tmp_path) for part in second)])
        return real(*arguments)

    monkeypatch.setattr(build, "transcode_video", transcode)
    write_index(root, tmp_path / "i.csv", IndexOptions(transcode=tmp_path / "small"))
    assert codes == [2 if refusal else 0]
    assert refusal is None or refusal.format(tmp_path, HOLDER) in capsys.readouterr().err
    assert (tmp_path / "i.csv").read_text().count("small/A/") == 3
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()]


def test_flow_that_is_filled_while_the_index_is_made_again_is_kept(tmp_path, root, monkeypatch):
    """`cpr-fast flow` ends after `cpr-fast index` has read the previous index, and before it replaces it."""
    index = tmp_path / "i.csv"
    write_index(root, index, IndexOptions())
    write_flow(index, tmp_path / "flow")
    index.unlink()
    write_index(root, index, IndexOptions())  # the flow is stored, and only to be filled in
    real, flow = build.assemble, []

    def assemble(*arguments):
        made = real(*arguments)
        flow.append(threading.Thread(target=write_flow, args=(index, tmp_path / "flow")))
        flow[0].start()
        flow[0].join(2.0)
        return made

    monkeypatch.setattr(build, "assemble", assemble)
    write_index(root, index, IndexOptions())
    flow[0].join()
    assert index.read_text().count(",flow/") == 3


def test_a_second_synth_does_not_remove_the_videos_of_the_first(tmp_path, capsys, monkeypatch):
    codes, real = [], synthetic._write_source

    def write(*arguments):
        if not codes:
            codes.append(None)
            codes[0] = main(["synth", str(tmp_path / "s"), "--videos", "4", "--classes", "4"])
        return real(*arguments)

    monkeypatch.setattr(synthetic, "_write_source", write)
    synthetic.write_synthetic(tmp_path / "s", videos=4, classes=4)
    assert codes == [2] and "OUT: another command is writing the data set" in capsys.readouterr().err
    assert main(["synth", str(tmp_path / "s"), "--videos", "4", "--classes", "4"]) == 0


def test_two_evaluations_that_end_together_leave_a_whole_result(tmp_path):
    program = (
        "from pathlib import Path\nfrom cpr_fast.evaluate.features.results import write_result\n"
        f"for _ in range(200): write_result(Path({str(tmp_path)!r}), 'r', {{'numbers': list(range(2000))}})"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert json.loads((tmp_path / "r.json").read_text()) == {"numbers": list(range(2000))}


def test_a_second_finetuning_is_refused_while_the_first_runs(tmp_path, capsys, monkeypatch):
    for number, name in enumerate("abcdefgh"):
        folder = tmp_path / "set" / ("train" if number % 4 else "test") / "AB"[number // 4]
        write_video(folder / f"{name}.mkv", 18, width=64)
    index, run_folder = tmp_path / "i.csv", tmp_path / "run"
    assert main(["index", str(tmp_path / "set"), "--out", str(index)]) == 0
    run(settings(run_folder, schedule={"cycles": [{"view": "rgb", "epochs": 1, "mining": "none"}]}))
    command = ["finetune", str(run_folder / "checkpoints/last.pt"), "--index", str(index), "--epochs", "1"]
    codes = []

    def train(*_arguments):
        codes.append(None)
        codes.append(main(command) if len(codes) == 1 else None)
        raise KeyboardInterrupt

    monkeypatch.setattr(classify, "train_on_clips", train)
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert main(command) == 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGINT, handler)
    assert codes == [None, 2] and "another process is training in" in capsys.readouterr().err
