"""Pages of incomplete runs: a sentence gives the reason for each missing part."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
from support.report.run_folders import (
    health_rows,
    retrieval_rows,
    start_row,
    text_of,
    training_rows,
    unlabelled_index,
    write_run,
)

from cpr_fast.config.recipes import retrieve_command
from cpr_fast.errors import InputError
from cpr_fast.report import unlabelled
from cpr_fast.report.page import write_report
from cpr_fast.report.run_folder.run import Run


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
    assert "2. RGB CPR 2 – 2 4.5 – 60.0 50.0" in text_of(write_report([run], tmp_path / "r.html"))


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
    assert "R@k and mAP need labels, which these videos do not have. The comparison with the untrained" in text
    assert "Network View mAP" not in text  # a table without a number


def test_a_run_that_was_not_evaluated_says_so_first(tmp_path, index):
    run = write_run(tmp_path / "run", [start_row(index), *training_rows()])
    text = text_of(write_report([run], tmp_path / "r.html"))
    assert "run Retrieval has not been measured yet, so this page cannot say whether the run learnt" in text
    assert f"no evaluation of this run has finished. Run {retrieve_command(run, index)}" in text


def test_why_there_is_no_pmr(tmp_path, index):
    """Each sentence gives the reason of its own run."""
    unknown = dict.fromkeys(("pmr", "mining_r1", "cmr_median", "cmr_per_class", "right_counts"))
    mined = [row | unknown if row["kind"] in ("epoch", "step") else row for row in training_rows()]
    infonce = [row for row in training_rows() if row.get("cycle") == 0]
    bare = [row for row in mined if row["kind"] != "mined"]
    only = start_row(index)
    only["config"]["schedule"]["cycles"] = [{"view": "rgb", "epochs": 1, "mining": "none"}]
    labels = unlabelled_index(tmp_path / "bare", index)
    cases = {
        "This run mines no positives.": [only, *infonce],
        "No cycle that mines positives has begun yet.": [start_row(index), *infonce],
        "No epoch of this run has mined positives yet.": [start_row(index), *bare],
        "The videos have no labels, so PMR and CMR, which judge what was mined, cannot": [start_row(labels), *mined],
        "PMR and CMR were not computed for what this run mined": [start_row(index), *mined],
    }
    for number, (sentence, rows) in enumerate(cases.items()):
        text = text_of(write_report([write_run(tmp_path / f"run{number}", rows)], tmp_path / "r.html"))
        assert [other for other in cases if other in text] == [sentence]


def test_a_page_without_labels_speaks_of_no_class(tmp_path, index):
    rows = [*training_rows(), *health_rows()]
    for row in rows:
        row |= dict.fromkeys(set(row) & {"pmr", "mining_r1", "cmr_median", "cmr_per_class", "right_counts"})
    run = write_run(tmp_path / "run", [start_row(unlabelled_index(tmp_path / "bare", index)), *rows])
    text = text_of(write_report([run], tmp_path / "r.html"))
    head = text[: text.index("Date")]
    assert "retrieval cannot be measured; the signs below do not decide whether this run learnt." in head
    assert "Mean loss of the last epoch: RGB 2.000 (chance 4.500) – better than chance" in head
    assert "Nearest neighbours: not known yet. Run `cpr-fast retrieve" in head
    assert "not compared with the untrained network, because no evaluation of this run has finished. Run `" in head
    rank = "the number of dimensions that the last training clips use: RGB 5.0 of 128, and no view is below the limit"
    assert f"Effective rank, {rank} of 4." in head
    assert "another class" not in text and "Mining R@1, last" not in text and "without labels it is not known" in text


@pytest.mark.parametrize(
    ("loss", "random", "said"),
    [(4.6, 0, "not better than chance: it does not show that anything was learnt"), (2.0, 0.5, "cannot be compared")],
)
def test_the_first_line_without_labels_compares_the_loss_with_chance(tmp_path, index, loss, random, said):
    rows = training_rows()
    rows[-2] |= {"loss": loss, "random_negatives": random}
    run = write_run(tmp_path / "run", [start_row(unlabelled_index(tmp_path / "bare", index)), *rows])
    assert f"RGB {loss:.3f} (chance 4.500) – {said}" in text_of(write_report([run], tmp_path / "r.html"))


def same_video_rows(**differences: tuple[float, float]) -> list[dict]:
    """Rows of `retrieve` for views whose trained network is better by a difference, and its interval begins at low."""
    rows = []
    for view, (difference, low) in differences.items():
        common = {"kind": "same_video", "recipe": "paper", "view": view, "chance_r@1": 0.05, "videos": 20}
        rows.append(common | {"name": "untrained", "r@1": 0.4, "r@1_ci95": [0.3, 0.5]})
        better = {"difference": difference, "difference_ci95": [low, difference + 0.1]}
        rows.append(common | {"name": "trained", "r@1": 0.4 + difference, "r@1_ci95": [0.3, 0.6]} | better)
    return rows


@pytest.mark.parametrize(
    ("loss", "level", "views", "said"),
    [
        (2.0, "high", {"rgb": (0.2, 0.1)}, "the signs below suggest that this run learnt (RGB)"),
        (2.0, "moderate", {"rgb": (0.2, 0.1), "flow": (0.0, -0.1)}, "suggest that this run learnt (RGB)"),
        (2.0, "unknown", {"rgb": (0.2, 0.1), "flow": (0.1, 0.02)}, "suggest that this run learnt (RGB and Flow)"),
        (None, "high", {"rgb": (0.2, 0.1)}, "suggest that this run learnt (RGB)"),
        (2.0, "high", {"rgb": (0.2, -0.1)}, "the signs below do not decide"),
        (2.0, "high", {"rgb": (0.0, -0.1), "flow": (-0.1, -0.2)}, "nothing below shows that this run learnt"),
        (2.0, "high", {}, "the signs below do not decide"),  # random weights give such a loss and such neighbours, too
        (2.0, "low", {"rgb": (0.2, 0.1)}, "the signs below do not decide"),  # they contradict each other
        (4.5, "high", {"rgb": (0.2, 0.1)}, "the signs below do not decide"),
        (2.0, "low", {"rgb": (0.2, -0.1)}, "nothing below shows that this run learnt"),
        (2.0, "low", {}, "nothing below shows that this run learnt"),
        (4.5, "high", {}, "nothing below shows that this run learnt"),
        (2.0, "unknown", {}, "the signs below do not decide"),
        (None, "high", {}, "the signs below do not decide"),
    ],
)
def test_the_verdict_without_labels(tmp_path, index, monkeypatch, loss, level, views, said):
    found = SimpleNamespace(level=level, reasons=["A reason."])
    monkeypatch.setattr(unlabelled, "compare_videos", lambda run: found)
    rows = [row | {"loss": loss} if row["kind"] == "epoch" else row for row in training_rows()]
    retrieval = [row | {"r@1": None, "map": None} for row in retrieval_rows(index)]
    rows = [start_row(index), *rows, *retrieval, *same_video_rows(**views)]
    lines = unlabelled.signs(Run(write_run(tmp_path / "run", rows)))
    assert said in lines[0] and f"Nearest neighbours, confidence {level}: A reason." in lines
    if views:
        difference = views["rgb"][0]
        expected = f"RGB {40 + 100 * difference:.1f} %, untrained 40.0 % (difference {100 * difference:+.1f} points"
        assert lines[1].startswith("Nearest clip of the same video, 20 videos, chance 5.0 %: ") and expected in lines[1]
    else:
        assert "not compared with the untrained network. `cpr-fast retrieve` does so where less" in lines[1]


def test_the_page_without_labels_has_the_comparison_with_the_untrained_network(tmp_path, index):
    bare = unlabelled_index(tmp_path / "bare", index)
    missing = dict.fromkeys(("r@1", "r@1_ci95", "map", "map_ci95", "chance_r@1"))
    retrieval = [row | missing for row in retrieval_rows(index) if row.get("name") == "trained"]
    for number, rows in enumerate([same_video_rows(rgb=(0.2, 0.1)), []]):
        run = write_run(tmp_path / f"run{number}", [start_row(bare), *training_rows(), *retrieval, *rows])
        text = text_of(write_report([run], tmp_path / "r.html"))
        assert ("Untrained network RGB 40.0 30.0 – 50.0" in text) == bool(rows)
        assert ("Trained RGB 60.0 30.0 – 60.0 +20.0 +10.0 to +30.0" in text) == bool(rows)
        assert "may be with random weights, too" in text  # a loss better than chance is not praised
        assert ("that needs no labels was not made: too few videos hold two clips" in text) != bool(rows)
