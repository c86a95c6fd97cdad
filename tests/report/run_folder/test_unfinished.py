"""A report says in its first lines that a run has not reached its last epoch, and how it is continued."""

from __future__ import annotations

import re
import shlex

import pytest
from support.report.run_folders import retrieval_rows, start_row, text_of, training_rows, write_index, write_run

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
def test_a_stopped_run_is_named_with_the_command_that_continues_it(tmp_path, epochs, said):
    run = write_stopped(tmp_path / "my run", epochs)
    (run / "checkpoints").mkdir(exist_ok=True)
    (run / "checkpoints" / "last.pt").touch()
    text = first_lines(write_report([run], tmp_path / "report.html"))
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
