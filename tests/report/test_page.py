"""The report page of complete run folders, alone and side by side."""

from __future__ import annotations

import re

import numpy as np
import pytest
from support.report.run_folders import (
    LABELS,
    SOURCES,
    Text,
    classification_rows,
    health_rows,
    retrieval_rows,
    start_row,
    text_of,
    training_rows,
    write_run,
)

from cpr_fast.evaluate.retrieval.names import VIEW_NAMES
from cpr_fast.report.page import write_report
from cpr_fast.report.run_folder.run import Run


def test_a_complete_run_shows_its_numbers(run):
    page = write_report([run], run / "report.html")
    text = text_of(page)
    for piece in (
        "R@1, RGB + flow 62.5 % best of the others: 30.0 %, mean flow Recall at 1",
        "Date started 2026-03-01 12:00 UTC",
        "Command cpr-fast pretrain c.toml",
        "6 of 5 sources, 3 classes, split 'train'",
        "Training time 3 min 03 s for 3 epochs in 2 cycles",
        "PMR, RGB, last epoch 60.0 %",
        "first mining epoch 50.0 %",
        "Trained RGB + flow – 62.5 72.5 82.5 100.0 –",
        "16 queries, 30 gallery videos",
        "Chance R@1 is 6.2 %",
        "25.0 % of a step waits for data",
        "1 of 2 classes at 100 %",
        "2. RGB CPR 2 3 2 4.5 50.0 60.0 50.0 2:02 min",
        "Videos skipped as unreadable: 2",
        "IIC + CPR 46.9 63.3 71.5 – 73.1",
        "abc123",
    ):
        assert piece in text


def test_the_page_is_whole_and_alone(run):
    page = write_report([run, run], run / "report.html").read_text(encoding="utf-8")
    assert not re.search(
        r"""(src|href)\s*=\s*["']?(https?:|//)|@import|url\(\s*["']?(https?:|//)|<script|<link""", page
    )
    ids = Text(page).ids
    assert len(ids) > 20
    referenced = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page))
    assert {a or b for a, b in referenced} <= set(ids)
    assert not list(run.glob(".*"))


def test_cascades_that_were_chosen_in_training_are_listed(tmp_path, index):
    common = {"kind": "cascade", "cycle": 1, "view": "rgb", "order": ["flow", "rgb", "flow"], "ratio": 0.3, "top_k": 3}
    choices = [
        common | {"epoch": 1, "step": 3, "criteria": {"siblings": 2.0, "mined_agree": 1.0}},
        common | {"epoch": 2, "step": 6, "criteria": {"siblings": 3.0, "mined_agree": 2.0}},
        common | {"epoch": 3, "step": 9, "order": ["rgb"], "criteria": {"siblings": None, "mined_agree": 1.25}},
    ]
    folder = write_run(tmp_path / "auto", [start_row(index, stages="auto"), *training_rows(), *choices])
    text = text_of(write_report([folder], tmp_path / "report.html"))
    assert "Chosen cascades" in text
    assert "2 to 3 RGB Flow, RGB, Flow 0.3 3 2.5 1.5 55.0" in text  # PMR of the two epochs: 50 and 60 %
    assert "4 RGB RGB – 3 – 1.25 –" in text


def test_names_are_escaped(run):
    page = write_report([run], run / "report.html").read_text(encoding="utf-8")
    assert "push&lt;up&gt;" in page and "push<up>" not in page


def test_wrong_positives_are_marked_by_more_than_colour(run):
    page = write_report([run], run / "report.html").read_text(encoding="utf-8")
    mined = page[page.index(">Mined positives</h2>") :]
    assert '<span class="mark" aria-hidden="true">✓</span>' in mined and "same class:" in mined
    assert mined.count('class="clip query"') == 1
    assert mined.count('class="clip right"') == mined.count("✓</span>") == 1
    assert mined.count('class="clip wrong"') == mined.count("✗</span>") == 1


def test_a_repeated_evaluation_replaces_the_earlier_one(tmp_path, index):
    first, again = retrieval_rows(index), retrieval_rows(index)
    again[2]["r@1"] = 0.75
    run = write_run(tmp_path / "run", [start_row(index), *first, *again])
    text = text_of(write_report([run], tmp_path / "r.html"))
    assert "R@1, RGB + flow 75.0 %" in text and "62.5" not in text


def test_several_runs_stand_beside_each_other(tmp_path, index):
    cpr = write_run(tmp_path / "cpr", [start_row(index), *training_rows(), *retrieval_rows(index)])
    coclr = write_run(tmp_path / "coclr", [start_row(index, stages=1), *training_rows()])
    text = text_of(write_report([cpr, coclr], tmp_path / "r.html"))
    assert "2 runs" in text and "cpr – – 62.5 72.5 82.5 100.0 –" in text and "coclr – – – – – – –" in text
    assert "Not compared query by query: expected evaluations with the same protocol and test-time recipe, got" in text
    assert "2. RGB CoCLR" in text and "2. RGB CPR" in text


def test_a_run_of_residual_frames_is_shown_as_any_other(tmp_path, index):
    rows = [*training_rows(), *retrieval_rows(index)]
    rows = [row | {"view": "residual"} for row in rows if row.get("view") not in ("flow", "two_stream")]
    run = write_run(tmp_path / "run", [start_row(index), *rows])
    text = text_of(write_report([run], tmp_path / "r.html"))
    assert "R@1, Residual 40.0 %" in text and "2. Residual CPR" in text and "Residual queries" in text


@pytest.mark.parametrize(
    ("views", "said"),
    [
        (
            ("rgb", "flow", "two_stream"),
            "“RGB + flow” compares videos by RGB and Flow: the sum of the similarities of both.",
        ),
        (("rgb", "residual", "merged"), "“RGB + residual” compares videos by RGB and Residual: the sum of"),
        (
            ("rgb", "residual"),
            "There is no row of RGB and Residual together: an older version measured them; run `cpr-fast",
        ),
        (("flow", "residual"), "There is no row of Flow and Residual together: as published, only RGB is combined"),
        (("rgb",), None),
    ],
)
def test_two_views_together_lead_or_the_page_says_why_there_is_no_such_row(tmp_path, index, views, said):
    row = retrieval_rows(index)[0]
    rows = [row | {"view": view, "r@1": 0.5 - number / 10, "r@1_ci95": None} for number, view in enumerate(views)]
    text = text_of(write_report([write_run(tmp_path / "run", [start_row(index), *rows])], tmp_path / "r.html"))
    assert said in text if said else "together:" not in text and "compares videos by" not in text
    first = {"two_stream": "RGB + flow", "merged": "RGB + residual"}.get(views[-1], VIEW_NAMES[views[0]])
    assert f" Retrieval, {first}: mAP not measured" in text
    table = text[text.index("Network View mAP") :]
    assert table.index(f"Trained {first} ") == table.index("Trained")


def test_chance_pmr_is_what_random_mining_gives(tmp_path, index):
    run = Run(write_run(tmp_path / "run", [start_row(index)]))
    rates = []
    for label, source in zip(LABELS, SOURCES, strict=True):
        others = [other for other, s in zip(LABELS, SOURCES, strict=True) if s != source]
        rates.append(sum(other == label for other in others) / len(others))
    assert run.chance_pmr == pytest.approx(np.mean(rates))


def test_both_protocols_and_all_tasks_have_their_tables(tmp_path, index):
    paper, iic = retrieval_rows(index), [row | {"recipe": "iic"} for row in retrieval_rows(index)]
    run = write_run(tmp_path / "run", [start_row(index), *iic, *paper, *classification_rows(), *health_rows()])
    text = text_of(write_report([run], tmp_path / "r.html"))
    assert text.index("Test-time recipe paper.") < text.index("Test-time recipe iic.")
    assert "Linear probe, RGB + flow 75.0 %" in text and "Finetuned, RGB 85.0 %" in text
    assert "Linear probe RGB + flow 75.0 50.0 – 90.0 60.0 33.3 paper 10 1 a.csv 1 16" in text
    assert "Finetune RGB 85.0 – 60.0 33.3 paper 10 1 a.csv 2 16" in text
    assert "epoch 3: the rgb features may have collapsed" in text


def test_ours_stands_beside_the_published_row(run, tmp_path):
    text = text_of(write_report([run], tmp_path / "r.html"))
    stages = text[text.index("How many stages") : text.index("How much each stage keeps")]
    assert "run, RGB + flow, other data 62.5 72.5 82.5 – –" in stages and "CPR on CoCLR, n = 7 47.8" in stages
    mining = text[text.index("Mining quality") : text.index("CPR on two methods")]
    assert "run, RGB, other data 60.0 75.0" in mining and "38.9 83.3" in mining
    long = text[text.index("Retrieval on UCF101") : text.index("Retrieval on HMDB51")]
    assert "run, Flow, other data 50.0 60.0 70.0 100.0" in long and "56.7 75.5 82.2 88.2" in long
    assert "run," not in text[text.index("Retrieval on HMDB51") :]


def test_runs_are_compared_class_by_class(tmp_path, index):
    better, worse = training_rows(), training_rows()
    for row in worse:
        if row.get("cmr_per_class"):
            row["cmr_per_class"] = [0.5, 0.5, None]
    runs = [write_run(tmp_path / name, [start_row(index), *rows]) for name, rows in (("a", better), ("b", worse))]
    text = text_of(write_report(runs, tmp_path / "r.html"))
    assert "CMR of a is higher in 1 and lower in 0 of 2 classes than that of b" in text


def test_the_confusion_matrix_is_the_sum_over_seeds(tmp_path, index):
    run = write_run(tmp_path / "run", [start_row(index), *classification_rows()])
    page = write_report([run], tmp_path / "r.html")
    text = text_of(page)
    assert "Confusion matrix: finetune, RGB, the sum of 2 evaluations" in text
    assert "push<up>, predicted as jump: 6 of 16 (38 %)" in text  # two seeds of 3 in 8
    assert "push<up> jump 6 37.5" in text and "jump push<up> 2 16.7" in text


def test_a_run_that_was_evaluated_before_map_was_measured_can_be_opened(run):
    text = text_of(write_report([run], run / "r.html"))
    assert "Trained RGB + flow – 62.5" in text
    assert "Mean average precision was not measured when this row was written." in text
    assert "Retrieval, RGB + flow: mAP not measured, R@1 62.5 % (52.5 – 72.5)." in text
    text = text_of(write_report([run, run], run / "r.html"))
    assert f"Not compared query by query: {run}: expected the measures of every query, but none are stored" in text


def test_the_first_line_has_map_and_r1_with_intervals_beside_what_they_must_beat(tmp_path, index):
    rows = retrieval_rows(index)
    for row, precision in zip(rows, (0.4, 0.5, 0.456, 0.2, 0.3, 0.25), strict=False):
        row |= {"map": precision, "map_ci95": [precision - 0.1, precision + 0.1], "chance_map": 0.08, "map_left_out": 2}
    page = write_report([write_run(tmp_path / "run", [start_row(index), *training_rows(), *rows])], tmp_path / "r.html")
    text = text_of(page)
    assert (
        " Retrieval, RGB + flow: mAP 45.6 % (35.6 – 55.6), R@1 62.5 % (52.5 – 72.5). "
        "Flow: mAP 50.0 % (40.0 – 60.0), R@1 50.0 % (40.0 – 60.0). "
        "RGB: mAP 40.0 % (30.0 – 50.0), R@1 40.0 % (30.0 – 50.0). "
        "Untrained network: mAP 20.0 % (10.0 – 30.0), R@1 20.0 % (10.0 – 30.0). "
        "Learnt: mAP +20.0 points (95 % interval +10.0 to +30.0). "
        "Best pixel baseline (single frame, 16 × 16): mAP 30.0 % (20.0 – 40.0), R@1 25.0 % (15.0 – 35.0). Date"
    ) in text
    assert "mAP, RGB + flow 45.6 % best of the others: 30.0 %, single frame, 16 × 16" in text
    assert "Trained RGB + flow 45.6 62.5 72.5 82.5 100.0 –" in text and "mAP leaves out 2 queries" in text
    assert "Chance mAP is 8.0 %." in text
    drawn = page.read_text(encoding="utf-8")
    assert "Single frame · RGB: 30.0 %, 95 % interval 20.0 to 40.0 %" in drawn


def test_over_several_splits_the_first_line_gives_deviations(tmp_path, index):
    rows = retrieval_rows(index)
    for row in rows[:-1]:
        row |= {"map": 0.5, "map_ci95": None, "map_std": 0.012, "r@1_ci95": None, "r@1_std": 0.03, "splits": 3}
    text = text_of(write_report([write_run(tmp_path / "run", [start_row(index), *rows])], tmp_path / "r.html"))
    assert "mAP 50.0 % (standard deviation of 3 splits 1.2), R@1 62.5 % (standard deviation of 3 splits 3.0)" in text


@pytest.mark.parametrize(("name", "opened"), [("data", 0), ("ucf101", 7), ("hmdb51", 1)])
def test_published_tables_are_open_on_their_own_data_only(tmp_path, index, name, opened):
    start = start_row(index)
    start["config"]["data"]["index"] = f"{name}/index.csv"
    page = write_report([write_run(tmp_path / "run", [start, *training_rows()])], tmp_path / "r.html").read_text()
    published = page[page.index('id="published"') :]
    assert published.count('<details class="card" open>') == opened and published.count("<details") == 8


def test_queries_with_an_exact_copy_are_told_at_the_top_and_below_the_table(tmp_path, index):
    rows = [row | {"queries_with_copy": 2} for row in retrieval_rows(index)]
    run = write_run(tmp_path / "run", [start_row(index), *training_rows(), *rows])
    text = text_of(write_report([run], tmp_path / "r.html"))
    said = "2 queries have an exact copy in the gallery, found whatever the network has learnt."
    assert text.count(said) == 2 and text.index(said) < text.index("Date")
    among = "exact copies of other videos are among them"
    assert among in text
    run = write_run(tmp_path / "without", [start_row(index), *training_rows(), *retrieval_rows(index)])
    assert among not in text_of(write_report([run], tmp_path / "r.html"))
