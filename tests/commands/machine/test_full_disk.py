"""Every command that writes files reports a full disk in one sentence: the file, what happened and what is kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.data_sets.flow import write_video
from support.machine.full_disk import files_end_at

from cpr_fast.cli import main
from cpr_fast.runtime.files import TEMPORARY


@pytest.fixture
def index(tmp_path):
    """Eight videos of two classes, and their index."""
    for name in "abcdefgh":
        write_video(tmp_path / "set" / ("A" if name < "e" else "B") / f"{name}.mkv", 12, width=64)
    assert main(["index", str(tmp_path / "set"), "--out", str(tmp_path / "index.csv")]) == 0
    return tmp_path / "index.csv"


COMMANDS = [
    (300, "index {set} --out {new}.csv", "new.probe.jsonl", "the results so far are kept, and the same command conti"),
    (
        300,
        "index {set} --out {new}.csv --transcode {new}",
        ".mp4",
        "complete videos are kept, and the same command cont",
    ),
    (300, "init {index} --out {new}.toml --seconds 0", "new.toml", "nothing was left behind"),
    (300, "synth {new} --videos 2 --classes 4", ".mp4", "the set is unfinished, and the same command writes it"),
    (300, "show-sample {index} --out {new}.png", "new.png", "nothing was left behind"),
    (
        300,
        "flow {index} --out {new}",
        ".flow.mp4",
        "complete flow is kept, so free some space and run the same command again",
    ),
    (
        16384,
        "flow {index} --out {new}.lmdb --storage lmdb",
        "new.lmdb.part",
        "complete in it, and the same command conti",
    ),
]


@pytest.mark.parametrize(("size", "command", "file", "kept"), COMMANDS, ids=lambda value: str(value).split(" --")[0])
def test_a_full_disk_is_one_sentence(tmp_path, index, capsys, size, command, file, kept):
    values = {"set": tmp_path / "set", "index": index, "new": tmp_path / "new"}
    arguments = [part.format(**values) for part in command.split()]
    before = index.read_bytes()
    with files_end_at(size):
        code = main(arguments)
    last = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and last.startswith("cpr-fast: ")
    assert f"{file}'" in last and kept in last
    assert any(reason in last for reason in ("File too large", "Input/output error"))
    assert index.read_bytes() == before
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(TEMPORARY)]
    assert main(arguments) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_to_a_full_disk_is_one_sentence(index):
    command = [sys.executable, "-m", "cpr_fast", "recipes"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "cpr-fast: could not write a file or the output: No space left on device; complete files are kept\n"
    )
