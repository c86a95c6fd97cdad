"""Files that may not be read and folders that may not be written: one line that names them, before any long work."""

from __future__ import annotations

import os
import stat

import pytest
from support.data_sets.flow import write_video
from support.machine.permissions import without_permission
from support.small_runs import run, settings

from cpr_fast.cli import main


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Twelve videos of two classes, their index, and a run on them."""
    folder = tmp_path_factory.mktemp("permissions")
    for number, name in enumerate("abcdefghijkl"):
        write_video(
            folder / "set" / ("train" if number % 4 else "test") / "AB"[number % 2] / f"{name}.mkv", 24, width=64
        )
    assert main(["index", str(folder / "set"), "--out", str(folder / "index.csv")]) == 0
    run(settings(folder / "run", schedule={"cycles": [{"view": "rgb", "epochs": 1, "mining": "none"}]}))
    (folder / "locked").mkdir()
    return folder


RUN = "{0}/run/checkpoints/last.pt"
WRITING = [
    ("index {0}/set --out {0}/locked/i.csv", "--out: cannot write to '{0}/locked/i.csv': Permission denied"),
    ("init {0}/index.csv --out {0}/locked/i.toml --seconds 0", "--out: cannot write to '{0}/locked/i.toml': Perm"),
    ("show-sample {0}/index.csv --out {0}/locked/x.png", "--out: cannot write to '{0}/locked/x.png': Permission"),
    (f"export {RUN} --out {{0}}/locked/x.st", "--out: cannot write to '{0}/locked/x.st': Permission denied"),
    ("report {0}/run --out {0}/locked/r.html", "--out: cannot write to '{0}/locked/r.html': Permission denied"),
    (f"retrieve {RUN} --index {{0}}/index.csv", "CHECKPOINT: cannot write to '{0}/run/evaluations': Permission denied"),
    (f"probe {RUN} --index {{0}}/index.csv", "CHECKPOINT: cannot write to '{0}/run/evaluations': Permission denied"),
    (f"finetune {RUN} --index {{0}}/index.csv", "CHECKPOINT: cannot write to '{0}/run/evaluations': Permission denied"),
    (f"search {{0}}/set/test/A/a.mkv --index {{0}}/index.csv --checkpoint {RUN}",
     "--out: cannot write to '{0}/run/search': Permission denied"),
    ("flow {0}/index.csv --out {0}/locked/flow", "--out: cannot write to '{0}/locked/flow': Permission denied"),
    ("index {0}/set --out {0}/i.csv --transcode {0}/locked/t",
     "--transcode: cannot write to '{0}/locked/t': Permission denied"),
    ("synth {0}/locked/s", "OUT: cannot write to '{0}/locked/s': Permission denied"),
    ("quickstart --out {0}/locked/q", "--out: cannot write to '{0}/locked/q': Permission denied"),
    ("reproduce table1 --index {0}/index.csv --out {0}/locked/r", "--out: cannot write to '{0}/locked/r': Permission"),
    ("import-checkpoint {0}/run/checkpoints/last.pt --out {0}/locked/i.pt",
     "--out: cannot write to '{0}/locked/i.pt': Permission denied"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "message"), WRITING, ids=lambda text: text.split()[0])
def test_a_folder_that_may_not_be_written_is_named_first(made, capsys, command, message):
    with without_permission(made / "locked", made / "run", mode=0o555):
        code = main([part.format(made) for part in command.split()])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and lines[-1].startswith(f"cpr-fast: {message.format(made)}")
    assert not any("features" in line for line in lines)  # nothing was computed for nothing
    assert os.listdir(made / "locked") == [] and sorted(os.listdir(made / "run")) == [
        "checkpoints", "config.json", "ledger.jsonl", "metrics.jsonl"
    ]  # fmt: skip


def test_a_folder_that_may_not_be_entered_is_not_called_missing(made, capsys):
    with without_permission(made / "set/test/A"):
        assert main(["init", f"{made}/index.csv", "--out", f"{made}/x.toml", "--seconds", "0"]) == 2
        assert "set/test/A/a.mkv' cannot be reached: Permission denied" in capsys.readouterr().err
        assert main(["search", f"{made}/set/test/A/a.mkv", "--index", f"{made}/index.csv", "--checkpoint", "x"]) == 2
        error = capsys.readouterr().err
        assert "QUERIES: expected a file" in error and "cannot be reached: Permission denied" in error


def test_files_are_readable_for_whoever_the_umask_allows(made):
    before = os.umask(0o022)
    try:
        assert main(["retrieve", RUN.format(made), "--index", f"{made}/index.csv", "--clips", "1"]) == 0
        assert main(["export", RUN.format(made), "--out", f"{made}/x.safetensors"]) == 0
    finally:
        os.umask(before)
    written = [path for path in (made / "run").rglob("*") if path.is_file()] + [made / "x.safetensors"]
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in written} == {
        path.name: "0o644" for path in written
    }
