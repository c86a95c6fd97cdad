"""Pages of incomplete runs: a sentence gives the reason for each missing part."""

from __future__ import annotations

import shutil

import pytest
from support.report.run_folders import (
    retrieval_rows,
    start_row,
    text_of,
    training_rows,
    write_run,
)

from cpr_fast.errors import InputError
from cpr_fast.report.page import write_report


def test_missing_pieces_become_sentences(tmp_path, index):
    only_start = write_run(tmp_path / "a", [start_row(index)])
    text = text_of(write_report([only_start], tmp_path / "a.html"))
    for sentence in ("No retrieval yet", "No epoch of this run has mined positives yet", "No step has been logged yet"):
        assert sentence in text
    bare = write_run(tmp_path / "b", [{"kind": "note", "text": "imported elsewhere"}])
    assert "imported elsewhere" in text_of(write_report([bare], tmp_path / "b.html"))


def test_the_first_values_of_a_cycle_are_those_after_the_memory_is_full(tmp_path, index):
    rows = training_rows()
    filling = next(row for row in rows if row["kind"] == "epoch" and row["mining"] == "cascade")
    filling |= {"loss": None, "pmr": None, "mining_r1": None}
    run = write_run(tmp_path / "run", [start_row(index), *rows])
    assert "2. RGB CPR 2 2 2 4.5 60.0 60.0" in text_of(write_report([run], tmp_path / "r.html"))


def test_a_torn_last_line_and_a_half_epoch_are_survived(tmp_path, index):
    torn = write_run(tmp_path / "run", [start_row(index), *training_rows()[:2]], tail='{"kind": "st')
    assert "25.0 % of a step waits" in text_of(write_report([torn], tmp_path / "r.html"))


def test_moved_videos_leave_labels_without_pictures(tmp_path, index):
    data = shutil.copytree(index.parent, tmp_path / "data")
    run = write_run(
        tmp_path / "run", [start_row(data / "index.csv"), *training_rows(), *retrieval_rows(data / "index.csv")]
    )
    for video in data.glob("*.mp4"):
        video.write_bytes(b"gone")
    text = text_of(write_report([run], tmp_path / "r.html"))
    assert "not readable" in text and "jump" in text
    shutil.rmtree(data)
    assert "no longer where they were" in text_of(write_report([run], tmp_path / "r.html"))


def test_an_index_that_changed_shape_is_not_shown_as_the_old_one(tmp_path, index):
    rows = training_rows()
    for row in rows:
        if row["kind"] == "mined":
            row["mined"][0]["video"] = 99
    run = write_run(tmp_path / "run", [start_row(index), *rows])
    assert "RGB queries" in text_of(write_report([run], tmp_path / "r.html"))


@pytest.mark.parametrize("content", [None, ""])
def test_a_folder_without_metrics_is_named(tmp_path, content):
    folder = tmp_path / "not_a_run"
    folder.mkdir()
    if content is not None:
        (folder / "metrics.jsonl").write_text(content)
    with pytest.raises(InputError, match="not_a_run"):
        write_report([folder], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_retrieval_without_labels_says_so(tmp_path, index):
    rows = retrieval_rows(index)
    for row in rows[:-1]:
        row |= dict.fromkeys(("r@1", "r@5", "r@10", "r@20", "r@50", "r@1_ci95", "chance_r@1"))
    text = text_of(write_report([write_run(tmp_path / "run", [start_row(index), *rows])], tmp_path / "r.html"))
    assert "R@k and mAP need labels, which these videos do not have." in text and "no rate can be measured" in text
