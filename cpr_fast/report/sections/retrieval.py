"""Retrieval: a table and figures for every protocol and recipe that a run was evaluated with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpr_fast.report.figures.bars import Bar, bar_figure
from cpr_fast.report.figures.chart import Chart
from cpr_fast.report.figures.table import Column, Table
from cpr_fast.report.run_folder.run import MODEL_NAMES, VIEW_NAMES, Run

RANKS = (1, 5, 10, 20, 50)
MEASURES = {"map": "mAP", "r@1": "R@1"}
PROTOCOLS = {
    "train_test": "Test videos are the queries, training videos of other sources are the gallery.",
    "leave_source_out": "Every video is a query, and its gallery is all videos of other sources.",
}


def retrieval_blocks(run: Run) -> list[dict[str, Any]]:
    """Returns "table", "figures", "protocol" (a sentence), "recipe", "queries", "gallery", "chance" (R@1), "chance_map"
    and "left_out" (of mAP) of each."""
    return [
        {
            "table": _table(rows),
            "figures": _figures(rows),
            "protocol": PROTOCOLS.get(rows[0]["protocol"], rows[0]["protocol"]),
            "recipe": rows[0]["recipe"],
            "queries": rows[0]["queries"],
            "gallery": rows[0]["gallery"],
            "chance": rows[0].get("chance_r@1"),
            "chance_map": rows[0].get("chance_map"),
            "left_out": rows[0].get("map_left_out"),
        }
        for rows in run.evaluations
    ]


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    """Returns the table: the trained network's rows first, the others by mAP and R@1."""
    order = {id(row): (row["name"] != "trained", -(row.get("map") or 0), -(row.get("r@1") or 0)) for row in rows}
    ordered = sorted(rows, key=lambda row: order[id(row)])
    small = f"R@k needs a gallery of at least k videos; this one has {rows[0]['gallery']}."
    if all(row.get("r@1") is None for row in rows):
        small = old = "R@k and mAP need labels, which these videos do not have."
    elif all("map" in row for row in rows):
        old = "The gallery has no video of any query's class."
    else:
        old = "Mean average precision was not measured when this row was written."
    columns = [Column("Method"), Column("View"), Column("mAP, %", "rate", old, "mean average precision")]
    columns += [Column(f"R@{k}, %", "rate", small, f"one of the {k} nearest has the query's class") for k in RANKS]
    keys = ["map", *(f"r@{k}" for k in RANKS)]
    cells = [(MODEL_NAMES[row["name"]], VIEW_NAMES[row["view"]], *(row.get(key) for key in keys)) for row in ordered]
    ours = [place for place, row in enumerate(ordered) if row["name"] == "trained"]
    return Table(f"Retrieval {rows[0]['protocol']} {rows[0]['recipe']}", columns, cells, ours)


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
