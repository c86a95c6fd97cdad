"""A report says in its first lines that a run has not reached its last epoch, and how it is continued."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from support.report.run_folders import (
    retrieval_rows,
    start_row,
    text_of,
    training_rows,
    unlabelled_index,
    write_index,
    write_run,
)

from cpr_fast.cli import main
from cpr_fast.commands.output import about_unfinished
from cpr_fast.commands.training.pretrain import parse
from cpr_fast.report.page import write_report
from cpr_fast.runtime.files import RUN_LOCK, one_writer


def write_stopped(folder, epochs: int, *, extra=()):
    """Writes a run of 3 planned epochs of which `epochs` are finished, and one more has begun."""
    index = write_index(folder.parent)
    rows = [
        row for row in training_rows() if row["epoch"] < epochs or (row["kind"] == "step" and row["epoch"] == epochs)
    ]
    return write_run(folder, [start_row(index), *extra, *rows, *retrieval_rows(index)])


def first_lines(page) -> str:
    """Returns the text above the facts of the run."""
    return text_of(page).split("Date", 1)[0]


@pytest.mark.parametrize(
    ("epochs", "said"), [(0, "0 of 3 epochs are"), (1, "1 of 3 epochs is"), (2, "2 of 3 epochs are")]
)
def test_a_stopped_run_is_named_with_the_command_that_continues_it(tmp_path, monkeypatch, epochs, said):
    """The command works from any folder, also where the report was written with a relative path."""
    run = write_stopped(tmp_path / "my run", epochs)
    monkeypatch.chdir(tmp_path)
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / "last.pt").touch()
    text = first_lines(write_report([Path("my run")], tmp_path / "report.html"))
    assert f"This run is unfinished: {said} finished" in text
    assert text.index("unfinished") < text.index("Retrieval, ")  # before the results
    command = shlex.split(re.search(r"To continue it: (.*--resume)", text)[1])
    assert command[:2] == ["cpr-fast", "pretrain"]
    given = parse(command[2:])
    assert given.config == str(run / "config.json") and given.flags == {"--resume"}
    assert given.overrides == ["--run.out", str(run)]


def test_without_a_checkpoint_the_command_starts_again(tmp_path):
    run = write_stopped(tmp_path / "run", 1)
    assert "--auto-resume" in first_lines(write_report([run], tmp_path / "report.html"))


def test_a_run_that_is_training_is_called_so_and_not_continued(tmp_path):
    run = write_stopped(tmp_path / "run", 2)
    with one_writer(run / RUN_LOCK, "held"):
        text = first_lines(write_report([run], tmp_path / "report.html"))
    assert "This run is still training: 2 of 3 epochs are finished" in text and "To continue" not in text


def test_a_finished_run_is_not_called_unfinished_until_it_is_continued_with_more_epochs(tmp_path):
    run = write_stopped(tmp_path / "run", 3)
    assert "unfinished" not in text_of(write_report([run], tmp_path / "report.html"))
    assert about_unfinished([run]) == []
    longer = start_row(write_index(tmp_path))
    longer["config"]["schedule"]["cycles"][1]["epochs"] = 4
    run = write_stopped(tmp_path / "longer", 3, extra=[longer | {"kind": "note", "text": "resumed at step 9"}])
    assert "3 of 5 epochs are finished" in first_lines(write_report([run], tmp_path / "report.html"))


def test_several_runs_and_other_commands_name_the_unfinished_one(tmp_path):
    done, stopped = write_stopped(tmp_path / "done", 3), write_stopped(tmp_path / "stopped", 1)
    text = text_of(write_report([done, stopped], tmp_path / "report.html")).split("Differences", 1)[0]
    assert "stopped: This run is unfinished: 1 of 3 epochs is finished" in text.split("epochs", 1)[0] + text
    assert [line for line in about_unfinished([done, stopped]) if line][0].startswith(
        f"note: {stopped}: This run is unf"
    )


@pytest.mark.parametrize("labels", [True, False])
def test_an_unfinished_run_is_to_be_finished_and_is_not_judged(tmp_path, labels):
    """Its trained network is worse than the untrained one, its queue was not full, and it mined nothing so far."""
    index = write_index(tmp_path)
    index = index if labels else unlabelled_index(tmp_path / "bare", index)
    bare = dict.fromkeys(("pmr", "mining_r1", "view_agreement", "mutual_neighbours", "hubness"))
    rows = [row | bare | {"loss": None} if row["kind"] in ("step", "epoch") else row for row in training_rows()]
    rates = {name: {"map": value, "map_ci95": [value - 0.1, value + 0.1], "r@1": value}
             for name, value in (("trained", 0.2), ("untrained", 0.6))}  # fmt: skip
    retrieval = [row | rates[row["name"]] for row in retrieval_rows(index) if row.get("name") in rates]
    texts = {}
    for epochs in (2, 3):
        known = [row for row in rows if row["epoch"] < epochs]
        run = write_run(tmp_path / f"run{epochs}", [start_row(index), *known, *(retrieval if labels else [])])
        texts[epochs] = first_lines(write_report([run], tmp_path / "report.html"))
    for said in ("cpr-fast init", "learnt nothing", "more epochs"):
        assert said not in texts[2] and said in texts[3], said
    judged = "So far worse than before training: mAP" if labels else "so far the signs below do not decide"
    assert texts[2].index("To continue it: cpr-fast pretrain") < texts[2].index(judged) and judged not in texts[3]


def test_the_report_command_says_that_a_run_is_unfinished(tmp_path, capsys):
    run = write_stopped(tmp_path / "run", 1)
    assert main(["report", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"report: {run}/report.html\n" in out
    assert f"note: {run}: This run is unfinished: 1 of 3 epochs is finished" in out
