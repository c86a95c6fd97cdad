"""The top of a page reports a run that learnt nothing, and does so only for such a run."""

from __future__ import annotations

import pytest
from support.report.run_folders import retrieval_rows, start_row, text_of, training_rows, write_run

from cpr_fast.report.page import write_report
from cpr_fast.report.run_folder.outcome import verdict
from cpr_fast.report.run_folder.run import Run


def changed(rows: list[dict], kinds: tuple[str, ...] = ("step", "epoch"), **values) -> list[dict]:
    return [row | values if row["kind"] in kinds else row for row in rows]


def texts(folder, rows) -> str:
    return " ".join(verdict(Run(write_run(folder, rows))))


def test_a_run_that_learnt_has_no_alarm(tmp_path, index):
    assert texts(tmp_path / "run", [start_row(index), *training_rows(), *retrieval_rows(index)]) == ""
    assert texts(tmp_path / "new", [start_row(index)]) == ""
    assert texts(tmp_path / "step", [start_row(index), *training_rows()[:1]]) == ""


@pytest.mark.parametrize(("loss", "reason"), [(None, "memory.size = 2048) was never full"), (0.0, "the loss was 0")])
def test_a_run_without_a_loss(tmp_path, index, loss, reason):
    run = write_run(tmp_path / "run", [start_row(index), *changed(training_rows(), loss=loss)])
    text = text_of(write_report([run], tmp_path / "r.html"))
    head = text[: text.index("Date")]
    assert "This run learnt nothing" in head and reason in head


def test_a_cascade_that_mined_nothing(tmp_path, index):
    signs = dict.fromkeys(("pmr", "mining_r1", "cmr_median", "view_agreement", "hubness", "mutual_neighbours"))
    text = texts(tmp_path / "run", [start_row(index), *changed(training_rows(), ("epoch",), **signs)])
    assert "Cycle 2 (RGB CPR) mined no positives" in text


@pytest.mark.parametrize(
    ("untrained", "pixels", "said"),
    [
        (0.625, 0.1, "not above the 62.5 % of the same network before training"),
        (0.2, 0.7, "single frame"),
        (0.6, 0.6, ""),
    ],
)
def test_retrieval_no_better_than_without_learning(tmp_path, index, untrained, pixels, said):
    rows = retrieval_rows(index)
    for row in rows:
        if row.get("name") == "untrained":
            row |= {"r@1": untrained, "view": "two_stream"}
        if row.get("name") == "single_frame":
            row["r@1"] = pixels
    text = texts(tmp_path / "run", [start_row(index), *training_rows(), *rows])
    assert (said in text and "learnt nothing" in text) if said else text == ""


def test_what_the_trainer_says_is_repeated(tmp_path, index):
    said = {
        "kind": "outcome",
        "learnt": False,
        "text": "This run has learnt nothing: so it is.",
        "warnings": ["cycle 1 …"],
    }
    text = texts(tmp_path / "run", [start_row(index), *training_rows(), said])
    assert text == "This run has learnt nothing: so it is. cycle 1 …"
    good = {"kind": "outcome", "learnt": True, "text": "Fine.", "warnings": []}
    assert texts(tmp_path / "good", [start_row(index), *training_rows(), good]) == ""
