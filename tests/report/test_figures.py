"""Figures: colours, hover values and CSV files, film strips, and the confusion matrix."""

from __future__ import annotations

import base64
import csv
import io
import re
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image
from support.report.run_folders import FRAMES, Text

from cpr_fast.data.index.index import Index
from cpr_fast.report.figures.bars import Bar, bar_figure, group_figure, histogram_figure, profile_figure
from cpr_fast.report.figures.chart import MAX_CSV_ROWS, csv_uri
from cpr_fast.report.figures.curves import Band, Line, line_figure
from cpr_fast.report.figures.film_strip import STRIP_FRAMES, film_strip
from cpr_fast.report.figures.matrix import NAMED, confusion_figure
from cpr_fast.report.figures.table import Column, Table
from cpr_fast.report.sections import sheets


def levels(uri: str) -> list[float]:
    """Returns the mean grey level of each frame of a film strip."""
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("L"), dtype=float)
    return [part.mean() for part in np.split(strip, STRIP_FRAMES, axis=1)]


def test_a_film_strip_holds_the_clips_frames_in_order(index):
    uri = film_strip(index.parent / "1.mp4", FRAMES, start=4, length=8)
    assert levels(uri) == pytest.approx([8 * f + 10 for f in range(4, 12)], abs=4)


@pytest.mark.parametrize(("sampling", "frames"), [({}, range(1, 9)), ({"fps": 12.5, "pictures_fps": 0.0},
                                                                       range(2, 18, 2))])  # fmt: skip
def test_the_film_strip_of_a_clip_shows_the_frames_at_the_times_of_its_samples(index, sampling, frames):
    run = SimpleNamespace(config={"data": {"frames": 4, "stride": 2} | sampling})
    strip = sheets._clip(run, Index.load(index)[1], start=1)["strip"]
    assert levels(strip) == pytest.approx([8 * f + 10 for f in frames], abs=4)


def test_a_clip_beyond_the_end_repeats_the_last_frame(index):
    uri = film_strip(index.parent / "0.mp4", FRAMES, start=20, length=16)
    strip = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("L"), dtype=float)
    assert strip[:, -100:].mean() == pytest.approx(8 * (FRAMES - 1), abs=4)


def test_figures_leave_their_colours_to_the_page():
    lines = line_figure(
        [Line("a & b", range(3), [0.1, None, 0.3], 0), Line("c", range(3), [0.2] * 3, 5, dashed=True)],
        x="epoch", y="rate <1>", percent=True, bands=[Band(-0.5, 1.5, "RGB CPR"), Band(1.5, 2.5, "Flow CPR")],
    )  # fmt: skip
    svg = lines.svg + bar_figure([Bar("x", 0.5, (0.4, 0.6), 0), Bar("y", 0.0, None, 5)], title="R@1").svg
    Text(svg)
    assert "var(--s1)" in svg and "var(--s6)" in svg and "var(--ink-soft)" in svg
    assert not re.search(r"#0[12]0[0-9]0[0-9]", svg)


def rows_of(item) -> list[list[str]]:
    """Returns the rows of the CSV link of a figure or table."""
    head, _, data = item.csv.partition(",")
    assert head == "data:text/csv;charset=utf-8"
    return list(csv.reader(io.StringIO(unquote(data))))


def test_curves_show_their_values_and_give_them_as_csv():
    lines = [Line("a & b", [0, 1, 2], [0.1, None, 0.3], 0), Line("_hidden", [0, 1], [0.2, 0.4], 1)]
    chart = line_figure(lines, x="epoch", y="rate", percent=True)
    assert (
        "<title>a &amp; b, epoch 2: 30.0 %</title>" in chart.svg
        and "<title>hidden, epoch 1: 40.0 %</title>" in chart.svg
    )
    assert chart.svg.count("<circle") == 4 and ">hidden</text>" not in chart.svg
    expected = [["series", "epoch", "rate"], ["a & b", "0", "0.1"], ["a & b", "1", ""], ["a & b", "2", "0.3"]]
    assert rows_of(chart) == [*expected, ["hidden", "0", "0.2"], ["hidden", "1", "0.4"]]


def test_hover_marks_lie_on_the_points():
    """The circle of a value is at the marker of the curve."""
    svg = line_figure([Line("a", [0, 5, 10], [0.0, 0.5, 1.0], 0)], x="epoch", y="rate").svg
    markers = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*var\(--s1\)', svg)[:3]
    circles = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert len(markers) == len(circles) == 3
    for marker, circle in zip(markers, circles, strict=True):
        assert [float(v) for v in circle] == pytest.approx([float(v) for v in marker], abs=0.6)


def test_every_bar_shows_its_value():
    charts = [
        bar_figure([Bar("x <1>", 0.5, (0.4, 0.6), 0), Bar("y", 0.25, None, 5)], title="R@1"),
        group_figure({"first": [0.5, 0.5], "last": [0.1, 0.9]}, x="correct", title="Counts", colours=[5, 0]),
        profile_figure(
            {"CMR": [("b", 0.2), ("a", 0.9)], "other": [("a", 0.1)]}, x="class", title="All", colours=[0, 1]
        ),
        histogram_figure([0.1, 0.2, 0.2, 0.9], x="similarity", title="Spread", bins=4),
    ]
    for chart, marks in zip(charts, (2, 4, 2, 4), strict=True):
        Text(chart.svg)
        assert chart.svg.count("<title>") == marks
    assert "x &lt;1&gt;: 50.0 %, 95 % interval 40.0 to 60.0 %" in charts[0].svg
    assert rows_of(charts[0])[1:] == [["x <1>", "0.5", "0.4", "0.6"], ["y", "0.25", "", ""]]
    assert "last, 1 correct: 90.0 %" in charts[1].svg and "<title>a: 90.0 %</title>" in charts[2].svg
    assert rows_of(charts[2])[1:] == [["CMR", "1", "a", "0.9"], ["CMR", "2", "b", "0.2"], ["other", "1", "a", "0.1"]]
    assert [row[2] for row in rows_of(charts[3])[1:]] == ["3", "0", "0", "1"]


@pytest.mark.parametrize("count", [1, 3, NAMED + 1, 101])
def test_a_confusion_matrix_of_any_size(count):
    classes = [f"class <{i}>" for i in range(count)]
    counts = np.random.default_rng(0).integers(0, 2, (count, count))
    counts[:, 0] = 1  # no empty row
    chart = confusion_figure(counts.tolist(), classes, title="Confusion")
    Text(chart.svg)
    assert chart.svg.count("<title>") == np.count_nonzero(counts)
    assert rows_of(chart) == [["true class / predicted", *classes]] + [
        [name, *map(str, row)] for name, row in zip(classes, counts.tolist(), strict=True)
    ]


def test_a_table_says_why_values_are_missing():
    columns = [Column("Name"), Column("R@1, %", "rate", "No labels."), Column("Time", "minutes", "Not run.")]
    table = Table("Rates", columns, [("a", 0.5, 125), ("b", None, None), ("c", None, 3)])
    assert [[cell.text for cell in row] for row in table.cells] == [
        ["a", "50.0", "2:05 min"],
        ["b", "–", "–"],
        ["c", "–", "0:03 min"],
    ]
    assert table.reasons == ["No labels.", "Not run."]
    assert rows_of(table) == [["Name", "R@1", "Time"], ["a", "0.5", "125"], ["b", "", ""], ["c", "", "3"]]


def test_a_long_csv_is_thinned():
    rows = [(i,) for i in range(3 * MAX_CSV_ROWS + 1)]
    lines = unquote(csv_uri(["step"], rows).partition(",")[2]).splitlines()
    assert MAX_CSV_ROWS / 2 < len(lines) <= MAX_CSV_ROWS + 1 and lines[:3] == ["step", "0", "4"]
