"""`cpr-fast mine`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from cpr_fast.commands.options import Flag, Json
from cpr_fast.commands.output import show


def mine(
    features: tyro.conf.Positional[Path],
    *,
    stages: tuple[int, ...] = (1, 3, 5, 7),
    ratio: tuple[float, ...] = (0.5,),
    top_k: tuple[int, ...] = (5,),
    query_view: tuple[Literal["rgb", "flow"], ...] = ("rgb",),
    order: tuple[str, ...] = (),
    details: Flag = False,
    raw: Flag = False,
    heatmap: Path | None = None,
    json: Json = False,
) -> None:
    """The mining lab: PMR, CMR and mining R@1 of any cascade on stored two-view features; sweeps every combination.

    Args:
        features: An .npz file of the arrays rgb, flow [N, D], label, group [N]; rows of the same label and the same
            group are siblings, never mined.
        stages: Numbers of stages.
        ratio: Shares of the rows that survive each stage before the last.
        top_k: How many entries the last stage keeps.
        query_view: The views whose training is imitated; the ranking ends in the other one.
        order: Views of the stages as letters, "frf" = flow, RGB, flow; in place of --stages and --query-view.
        details: Also what each stage keeps and loses, view agreement and mutual neighbours (these need no labels).
        raw: Take the features as they are, neither centred nor L2-normalised.
        heatmap: A PNG to write: PMR over stages and ratio.
    """
    from cpr_fast.mining.lab import load_two_view_features, results_table, survivors_table, sweep

    data = load_two_view_features(features, raw=raw)
    rows = sweep(
        data, stages=stages, ratios=ratio, top_ks=top_k, query_views=query_view, orders=order, details=details,
        progress=True,
    )  # fmt: skip
    if heatmap is not None:
        from cpr_fast.report.figures.heatmap import write_heatmap

        write_heatmap(rows, heatmap)
    if json:
        show({"features": str(features), "rows": len(data.labels), "results": rows}, json)
        return
    from rich.console import Console

    Console().print(results_table(rows))
    if details and rows[0]["pmr"] is not None:
        Console().print(survivors_table(rows))
