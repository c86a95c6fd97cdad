"""Retrieval: a table and figures for every protocol and recipe that a run was evaluated with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpr_fast.evaluate.retrieval.names import (
    MEASURES,
    MODEL_NAMES,
    VIEW_NAMES,
    interval,
    signed,
    signed_interval,
    with_copies,
)
from cpr_fast.evaluate.retrieval.ranking import TOGETHER
from cpr_fast.report.figures.bars import Bar, bar_figure
from cpr_fast.report.figures.chart import Chart
from cpr_fast.report.figures.table import Column, Table
from cpr_fast.report.run_folder.run import Run
from cpr_fast.report.sections.header import evaluated_on

RANKS = (1, 5, 10, 20, 50)
PROTOCOLS = {
    "train_test": "Test videos are the queries, training videos of other sources are the gallery.",
    "leave_source_out": "Every video whose class has videos of other sources is a query; all those are its gallery.",
}


def retrieval_blocks(run: Run) -> list[dict[str, Any]]:
    """Returns a block for every protocol and recipe: "measured" (whether the videos have labels), "table", "figures",
    "protocol", "copies" and "views" (sentences), "recipe", "evaluated_on", "chance" (R@1), "chance_map" and "left_out"
    (of mAP)."""
    return [
        {
            "measured": any(row.get("r@1") is not None for row in rows),
            "views": _views_note(rows),
            "table": _table(rows),
            "figures": _figures(rows),
            "protocol": PROTOCOLS.get(rows[0]["protocol"], rows[0]["protocol"]),
            "recipe": rows[0]["recipe"],
            "evaluated_on": evaluated_on(rows),
            "copies": with_copies(rows[0].get("queries_with_copy")),
            "chance": rows[0].get("chance_r@1"),
            "chance_map": rows[0].get("chance_map"),
            "left_out": rows[0].get("map_left_out"),
        }
        for rows in run.evaluations
    ]


def same_video_table(run: Run) -> Table | None:
    """Returns the comparison with the untrained network that needs no labels; None where it was not made."""
    if not run.same_video:
        return None
    columns = [
        Column("Network"),
        Column("View"),
        Column("Same video, %", "rate", "", "the nearest clip is of the same video"),
        Column("95 % interval"),
        Column("Minus untrained, points"),
        Column("95 % interval of the difference"),
    ]
    cells = [
        (MODEL_NAMES[row["name"]], VIEW_NAMES[row["view"]], row["r@1"], interval(row["r@1_ci95"]),
         signed(row.get("difference")), signed_interval(row.get("difference_ci95")))
        for row in run.same_video
    ]  # fmt: skip
    ours = [place for place, row in enumerate(run.same_video) if row["name"] == "trained"]
    return Table("Nearest clip of the same video", columns, cells, ours)


def _views_note(rows: Sequence[dict[str, Any]]) -> str:
    """Returns why there is no row of two views together, or what it is; "" where only one view was trained."""
    views = [row["view"] for row in rows if row["name"] == "trained"]
    together = [view for view in views if view in TOGETHER]
    if together:
        parts = [f"“{VIEW_NAMES[view]}” compares videos by {' and '.join(VIEW_NAMES[v] for v in TOGETHER[view])}"
                 for view in together]  # fmt: skip
        how = (
            "the cosine of the features of both, one after the other"
            if rows[0]["recipe"] == "iic"
            else ("the sum of the similarities of both")
        )
        return f"{'; '.join(parts)}: {how}."
    if len(views) > 1:
        named = " and ".join(VIEW_NAMES[view] for view in views)
        if any(set(pair) <= set(views) for pair in TOGETHER.values()):
            return f"There is no row of {named} together: an older version measured them; run `cpr-fast retrieve`."
        return f"There is no row of {named} together: as published, only RGB is combined with another view."
    return ""


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    """Returns the table: the trained network's rows first, two views together before one, the others by mAP and R@1."""
    order = {
        id(row): (row["name"] != "trained", _rank(row), -(row.get("map") or 0), -(row.get("r@1") or 0)) for row in rows
    }
    ordered = sorted(rows, key=lambda row: order[id(row)])
    small = f"R@k needs a gallery of at least k videos; this one has {rows[0]['gallery']}."
    if all("map" in row for row in rows):
        old = "The gallery has no video of any query's class."
    else:
        old = "Mean average precision was not measured when this row was written."
    # The intervals are in the figures beside the table; with them it would not fit the page.
    columns = [Column("Network"), Column("View"), Column("mAP, %", "rate", old, "mean average precision")]
    columns += [Column(f"R@{k}, %", "rate", small, f"one of the {k} nearest has the query's class") for k in RANKS]
    keys = ["map", *(f"r@{k}" for k in RANKS)]
    cells = [(MODEL_NAMES[row["name"]], VIEW_NAMES[row["view"]], *(row.get(key) for key in keys)) for row in ordered]
    ours = [place for place, row in enumerate(ordered) if row["name"] == "trained"]
    return Table(f"Retrieval {rows[0]['protocol']} {rows[0]['recipe']}", columns, cells, ours)


def _rank(row: dict[str, Any]) -> bool:
    return row["name"] == "trained" and row["view"] not in TOGETHER


def _figures(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    """Draws the bars of mAP and of R@1, best first, where any row has them."""
    figures = []
    for measure, name in MEASURES.items():
        measured = [row for row in rows if row.get(measure) is not None]
        bars = [
            Bar(
                f"{MODEL_NAMES[row['name']].split(',')[0]} · {VIEW_NAMES[row['view']]}",
                row[measure],
                tuple(row[f"{measure}_ci95"]) if row.get(f"{measure}_ci95") else None,
                0 if row["name"] == "trained" else 5,
            )
            for row in sorted(measured, key=lambda row: -row[measure])
        ]
        if bars:
            figures.append(bar_figure(bars, title=f"{name}, % (line: 95 % interval)"))
    return figures
