"""The rows of a retrieval result: of every index, means over several indexes, and those of a run's metrics."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cpr_fast.evaluate.features.results import run_metrics
from cpr_fast.evaluate.retrieval.ranking import RANKS

COUNTS = ("map_left_out", "queries_with_copy")  # of several splits the sum


def no_rates(queries: int, gallery: int) -> dict[str, Any]:
    """Returns the row of `cpr_fast.evaluate.retrieval.ranking.rates` for videos without labels."""
    missing = [*(f"r@{k}" for k in RANKS), "r@1_ci95", "map", "map_ci95", "chance_r@1", "chance_map"]
    return dict.fromkeys(missing) | dict.fromkeys(COUNTS, 0) | {"gallery": gallery, "queries": queries}


def results(found: Sequence[Sequence[dict[str, Any]]], paths: Sequence[str | Path], how: dict[str, Any]
            ) -> dict[str, Any]:  # fmt: skip
    """Returns the entries of a result that follow from the rows of every index.

    Args:
        found: The rows of every index, see `cpr_fast.evaluate.retrieval.retrieve.Evaluated`.
        paths: The indexes.
        how: Protocol and recipe, which are added to each row.
    Returns:
        `results`, `summary`, `index`, and view and rates of the last row of the trained network, or of the stored
        features without one, which is two-stream if it has both views.
    """
    named = [str(path) for path in paths]
    rows = [
        row | how | {"index": path, "split": number}
        for number, (path, each) in enumerate(zip(named, found, strict=True), 1)
        for row in each
    ]
    summary = [row | {"indexes": [os.path.abspath(path) for path in named]} for row in _summary(rows)]
    last = [row for row in summary if row["name"] == summary[0]["name"]][-1]
    headline = {key: last[key] for key in ("view", *(f"r@{k}" for k in RANKS), "map")}
    return headline | how | {"index": " ".join(named), "summary": summary, "results": rows}


def write_metrics(
    run_dir: str | Path | None,
    summary: Sequence[dict[str, Any]],
    examples: Sequence[dict[str, Any]],
    same_video: Sequence[dict[str, Any]],
    queries_file: Path | None,
) -> None:
    """Writes an evaluation to the metrics of a run, if there is one; the rows of `examples` and `same_video` belong to
    the rows of the summary that they follow."""
    if run_dir is None:
        return
    # relative, so that the run folder can be moved
    place = None if queries_file is None else os.path.relpath(queries_file, run_dir)
    with run_metrics(run_dir) as writer:
        for row in summary:
            writer.write({"kind": "retrieval", **row, "queries_file": place})
        for row in examples:
            writer.write({"kind": "retrieved", **row})
        for row in same_video:
            writer.write({"kind": "same_video", "recipe": summary[0]["recipe"], **row})


def _summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row per name and view: the row of a single split, or means and standard deviations over several."""
    summary = []
    for name, view in dict.fromkeys((row["name"], row["view"]) for row in rows):
        same = [row for row in rows if (row["name"], row["view"]) == (name, view)]
        line = {key: value for key, value in same[0].items() if key not in ("index", "split")} | {"splits": len(same)}
        for key in [*(f"r@{k}" for k in RANKS), "map"]:
            values = [row[key] for row in same]
            several = len(values) > 1 and None not in values
            line[f"{key}_std"] = stdev(values) if several else None
            line[key] = mean(values) if None not in values else None
        if len(same) > 1:
            for key in ("chance_r@1", "chance_map"):
                chances = [row[key] for row in same]
                line[key] = None if None in chances else mean(chances)
            line |= {"r@1_ci95": None, "map_ci95": None} | {key: sum(row[key] for row in same) for key in COUNTS}
            line |= {key: round(mean(row[key] for row in same)) for key in ("gallery", "queries")}
        summary.append(line)
    return summary
