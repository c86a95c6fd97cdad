"""`cpr-fast explain`: settings on the command line, JSON, mistakes, and an answer without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cpr_fast.cli import main

ROOT = Path(__file__).resolve().parents[2]


def explained(capsys, *arguments: str) -> dict:
    assert main(["explain", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_settings_are_changed_as_in_pretrain(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = explained(capsys, "cpr_ucf101")
    changed = explained(capsys, "--data.batch-size", "32", "cpr_ucf101", "--mining.stages=3", "--epochs", "14")
    assert (plain["schedule"]["steps_per_epoch"], changed["schedule"]["steps_per_epoch"]) == (596, 298)
    assert [len(row["keep"]) for row in changed["mining"]["cascades"]] == [3, 3]
    assert [cycle["epochs"] for cycle in changed["schedule"]["cycles"]] == [3, 3, 4, 4]
    assert changed["config"]["data"]["batch_size"] == 32


def test_text_ends_with_the_command_that_trains_it(capsys):
    assert main(["explain", "table1_n3", "--run.out", "runs/a b"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("table1_n3: Table 1, number of stages, row n = 3")
    assert text.endswith("\nnext: cpr-fast pretrain table1_n3 --run.out 'runs/a b'\n")


def test_a_file_is_explained_by_its_path(capsys, tmp_path):
    (tmp_path / "own.toml").write_text('[data]\nindex = "mine.csv"\n')
    assert main(["explain", str(tmp_path / "own.toml")]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{tmp_path}/own.toml\n") and "'mine.csv' does not exist here" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "CONFIG: expected a TOML file or the name of a recipe, got none; see `cpr-fast recipes`"),
        ("cpr_ucf11", "got 'cpr_ucf11', which is neither; did you mean the recipe 'cpr_ucf101'?"),
        ("cpr_ucf101 --data.batchsize 8", "unknown option --data.batchsize; did you mean --data.batch-size?"),
        ("cpr_ucf101 --resume", "unknown option --resume"),
        ("cpr_ucf101 --data.batch-size 9538 --memory.size 9538", "data.batch_size: expected at most 9537, the"),
    ],
)
def test_mistakes_are_named(capsys, words, message):
    assert main(["explain", *words.split()]) == 2
    assert message in capsys.readouterr().err


def test_torch_is_not_imported():
    program = (
        "import sys; from cpr_fast.cli import main; main(['explain', 'cpr_ucf101']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nFalse\n")
