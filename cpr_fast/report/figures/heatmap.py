"""The heat map of a mining sweep: PMR by views of the stages and ratio, a panel for every query view and top-k."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cpr_fast.runtime.files import replacing

CELL_INCHES = 0.75


def write_heatmap(rows: Sequence[dict[str, Any]], out: Path) -> Path:
    """Writes the PMR of `cpr_fast.mining.lab.sweep` rows as a PNG; cells are in percent, on one colour scale."""
    views, top_ks, ratios = (
        list(dict.fromkeys(row[name] for row in rows)) for name in ("query_view", "top_k", "ratio")
    )
    orders = {view: list(dict.fromkeys(row["order"] for row in rows if row["query_view"] == view)) for view in views}
    cells = {tuple(row[name] for name in ("order", "top_k", "ratio")): row["pmr"] for row in rows}
    known = [pmr for pmr in cells.values() if pmr is not None]
    scale = {"vmin": min(known, default=0), "vmax": max(known, default=1), "cmap": "viridis"}
    widest = max(map(len, orders.values()))
    size = (len(top_ks) * (max(3, widest) * CELL_INCHES + 1), len(views) * (len(ratios) * CELL_INCHES + 1.4))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(views), len(top_ks), squeeze=False)
    for row_of_panels, view in zip(panels, views, strict=True):
        for axes, top_k in zip(row_of_panels, top_ks, strict=True):
            _draw(axes, [[cells[order, top_k, ratio] for order in orders[view]] for ratio in ratios], scale)
            axes.set_xticks(range(len(orders[view])), [f"{len(order)}\n{order}" for order in orders[view]], fontsize=8)
            axes.set_yticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
            axes.set(xlabel="stages, views in order (r: RGB, f: flow)", ylabel="ratio")
            axes.set_title(f"PMR [%], {view} query, top-{top_k}", fontsize=10)
    with replacing(out) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return out


def _draw(axes: Axes, pmr: list[list[float | None]], scale: dict[str, Any]) -> None:
    image = axes.imshow([[float("nan") if rate is None else rate for rate in line] for line in pmr], **scale)
    for y, line in enumerate(pmr):
        for x, rate in enumerate(line):
            if rate is None:
                continue
            ink = "black" if image.norm(rate) > 0.55 else "white"
            axes.text(x, y, f"{100 * rate:.1f}", ha="center", va="center", color=ink, fontsize=10)
