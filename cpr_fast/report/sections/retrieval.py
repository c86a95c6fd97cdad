"""Retrieval: a table and a figure for every protocol and recipe that a run was evaluated with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpr_fast.report.figures.bars import Bar, bar_figure
from cpr_fast.report.figures.chart import Chart
from cpr_fast.report.figures.table import Column, Table
from cpr_fast.report.run_folder.run import MODEL_NAMES, VIEW_NAMES, Run

RANKS = (1, 5, 10, 20, 50)
PROTOCOLS = {
    "train_test": "Test videos are the queries, training videos of other sources are the gallery.",
    "leave_source_out": "Every video is a query, and its gallery is all videos of other sources.",
}


def retrieval_blocks(run: Run) -> list[dict[str, Any]]:
    """Returns "table", "figure", "protocol" (a sentence), "recipe", "queries", "gallery" and "chance" of each."""
    return [
        {
            "table": _table(rows),
            "figure": _figure(rows),
            "protocol": PROTOCOLS.get(rows[0]["protocol"], rows[0]["protocol"]),
            "recipe": rows[0]["recipe"],
            "queries": rows[0]["queries"],
            "gallery": rows[0]["gallery"],
            "chance": rows[0].get("chance_r@1"),
        }
        for rows in run.evaluations
    ]


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    """Returns the table: the trained network's rows first, the others by R@1; with mean average precision if any row
    has it."""
    ordered = sorted(rows, key=lambda row: (row["name"] != "trained", -(row.get("r@1") or 0)))
    small = f"R@k needs a gallery of at least k videos; this one has {rows[0]['gallery']}."
    if all(row.get("r@1") is None for row in rows):
        small = "R@k needs labels, which these videos do not have."
    columns = [Column("Method"), Column("View")]
    columns += [Column(f"R@{k}, %", "rate", small, f"one of the {k} nearest has the query's class") for k in RANKS]
    keys = [f"r@{k}" for k in RANKS]
    if any(row.get("map") is not None for row in rows):
        keys.append("map")
        old = "Mean average precision was not measured when this row was written."
        columns.append(Column("mAP, %", "rate", old, "mean average precision"))
    cells = [(MODEL_NAMES[row["name"]], VIEW_NAMES[row["view"]], *(row.get(key) for key in keys)) for row in ordered]
    ours = [place for place, row in enumerate(ordered) if row["name"] == "trained"]
    return Table(f"Retrieval {rows[0]['protocol']} {rows[0]['recipe']}", columns, cells, ours)


def _figure(rows: Sequence[dict[str, Any]]) -> Chart | None:
    rows = [row for row in rows if row.get("r@1") is not None]
    bars = [
        Bar(
            f"{MODEL_NAMES[row['name']].split(',')[0]} · {VIEW_NAMES[row['view']]}",
            row["r@1"],
            tuple(row["r@1_ci95"]) if row.get("r@1_ci95") else None,
            0 if row["name"] == "trained" else 5,
        )
        for row in sorted(rows, key=lambda row: -row["r@1"])
    ]
    return bar_figure(bars, title="R@1, % (line: 95 % interval)") if bars else None
