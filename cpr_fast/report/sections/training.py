"""Figures of a run's training: losses, times, and how sound the features and the memory are."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from cpr_fast.report.figures.curves import Band, Line, line_figure
from cpr_fast.report.sections.runs import VIEW_NAMES, VIEWS, Run

SERIES = {"rgb": 0, "flow": 1, "two_stream": 2, "residual": 3}
SMOOTH_STEPS = 9  # of the running medians


def cycle_bands(run: Run, only_mining: bool = False) -> list[Band]:
    """The span of epochs of every cycle."""
    cycles = [c for c in run.cycles if c.epochs and (c.mining == "cascade" or not only_mining)]
    return [Band(c.epochs[0]["epoch"] - 0.5, c.epochs[-1]["epoch"] + 0.5, c.name) for c in cycles]


def curves(run: Run, key: str, label: str = "", dashed: bool = False) -> list[Line]:
    """One line per cycle of an epoch quantity, coloured by view; a view is named once."""
    lines: list[Line] = []
    for cycle in run.cycles:
        rows = [row for row in cycle.epochs if row.get(key) is not None]
        if rows:
            name = label.format(view=VIEW_NAMES[cycle.view]) or VIEW_NAMES[cycle.view]
            named = any(line.label == name for line in lines)
            x, y = [row["epoch"] for row in rows], [row[key] for row in rows]
            lines.append(Line("_" if named else name, x, y, SERIES[cycle.view], dashed=dashed))
    return lines


def training_figures(run: Run) -> list[str]:
    """Loss over epochs, seconds and clips per second over steps, and health where it was measured."""
    figures = []
    if losses := curves(run, "loss"):
        lines = _step_losses(run) + losses
        figures.append(line_figure(lines, x="epoch", y="Loss", zero=False, bands=cycle_bands(run)))
    if len(run.steps) > 1:
        times = _over_steps(run, "step_time_s", "computing", 0) + _over_steps(run, "data_wait_s", "waiting for data", 1)
        figures.append(line_figure(times, x="step", y="Seconds per step, running median"))
        rate = _over_steps(run, "clips_per_s", "", 2, raw=True)
        figures.append(line_figure(rate, x="step", y="Clips per second, running median"))
    return figures + _health_figures(run)


def _over_steps(run: Run, key: str, label: str, series: int, raw: bool = False) -> list[Line]:
    """A running median of a step quantity, and the quantity itself, faint, with `raw`."""
    rows = [row for row in run.steps if row.get(key) is not None]
    steps, values = [row["step"] for row in rows], [row[key] for row in rows]
    smooth = Line(label, steps, _running_median(values), series, marker=False)
    return [Line("", steps, values, series, faint=True, marker=False), smooth] if raw else [smooth]


def _running_median(values: Sequence[float]) -> list[float]:
    half = SMOOTH_STEPS // 2
    return [median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _step_losses(run: Run) -> list[Line]:
    """Losses of single steps, faint, spread over their epoch so that its mean lies in the middle of them."""
    lines = []
    for cycle in run.cycles:
        per_epoch: dict[int, list[float | None]] = {}
        for row in cycle.steps:
            per_epoch.setdefault(row["epoch"], []).append(row["loss"])
        x = [epoch - 0.5 + (i + 0.5) / len(rows) for epoch, rows in per_epoch.items() for i in range(len(rows))]
        y = [loss for rows in per_epoch.values() for loss in rows]
        lines.append(Line("", x, y, SERIES[cycle.view], faint=True, marker=False))
    return lines


def _health_figures(run: Run) -> list[str]:
    """Effective rank of the queries and retrieval while training, where the run measured them."""
    figures = []
    ranks = []
    for view in VIEWS:
        rows = [row for row in run.health if row["effective_rank"].get(view) is not None]
        if rows:
            values = [row["effective_rank"][view] for row in rows]
            ranks.append(Line(VIEW_NAMES[view], [row["epoch"] for row in rows], values, SERIES[view]))
    if ranks:
        figures.append(line_figure(ranks, x="epoch", y="Effective rank of the queries"))
    online = []
    for view in VIEWS:
        rows = [row for row in run.online if row["view"] == view]
        if rows:
            values = [row["r@1"] for row in rows]
            online.append(Line(VIEW_NAMES[view], [row["epoch"] for row in rows], values, SERIES[view]))
    if online:
        figures.append(line_figure(online, x="epoch", y="R@1 while training, held-out videos", percent=True))
    return figures
