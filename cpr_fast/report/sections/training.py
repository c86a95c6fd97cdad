"""Training: figures of losses, times and the health of the features; the tables of cycles and of the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from cpr_fast.config.sections import with_cycle
from cpr_fast.evaluate.retrieval.names import VIEW_NAMES
from cpr_fast.report.figures.chart import Chart
from cpr_fast.report.figures.curves import Band, Line, line_figure
from cpr_fast.report.figures.table import Column, Table
from cpr_fast.report.run_folder.run import VIEWS, Cycle, Run

SERIES = {"rgb": 0, "flow": 1, "two_stream": 2, "residual": 3}
SMOOTH_STEPS = 9  # window of the running medians


def cycle_bands(run: Run, only_mining: bool = False) -> list[Band]:
    """Returns the span of epochs of every cycle."""
    cycles = [c for c in run.cycles if c.epochs and (c.mining == "cascade" or not only_mining)]
    return [Band(c.epochs[0]["epoch"] + 0.5, c.epochs[-1]["epoch"] + 1.5, c.name) for c in cycles]


def curves(run: Run, key: str, label: str = "", dashed: bool = False) -> list[Line]:
    """Returns a line per cycle of a quantity of epochs, in the colour of the view; the legend names a view once."""
    lines: list[Line] = []
    for cycle in run.cycles:
        rows = [row for row in cycle.epochs if row.get(key) is not None]
        if rows:
            name = label.format(view=VIEW_NAMES[cycle.view]) or VIEW_NAMES[cycle.view]
            named = any(line.name == name for line in lines)
            x, y = [row["epoch"] + 1 for row in rows], [row[key] for row in rows]
            lines.append(Line(f"_{name}" if named else name, x, y, SERIES[cycle.view], dashed=dashed))
    return lines


def training_figures(run: Run) -> list[Chart]:
    """Draws the loss over epochs, seconds and clips per second over steps, and health where it was measured."""
    figures = []
    if losses := curves(run, "loss"):
        lines = _step_losses(run) + losses + curves(run, "loss_chance", "{view}, chance", dashed=True)
        figures.append(line_figure(lines, x="epoch", y="Loss", zero=False, bands=cycle_bands(run)))
    if len(run.steps) > 1:
        times = _over_steps(run, "step_time_s", "computing", 0) + _over_steps(run, "data_wait_s", "waiting for data", 1)
        figures.append(line_figure(times, x="step", y="Seconds per step, running median"))
        rate = _over_steps(run, "clips_per_s", "", 2, raw=True)
        figures.append(line_figure(rate, x="step", y="Clips per second, running median"))
    return figures + _health_figures(run)


def _over_steps(run: Run, key: str, label: str, series: int, raw: bool = False) -> list[Line]:
    """Returns the running median of a quantity of steps and, with `raw`, the quantity itself as a faint line."""
    rows = [row for row in run.steps if row.get(key) is not None]
    steps, values = [row["step"] + 1 for row in rows], [row[key] for row in rows]
    smooth = Line(label, steps, _running_median(values), series, marker=False)
    return [Line("_single steps", steps, values, series, faint=True, marker=False), smooth] if raw else [smooth]


def _running_median(values: Sequence[float]) -> list[float]:
    half = SMOOTH_STEPS // 2
    return [median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def _step_losses(run: Run) -> list[Line]:
    """Returns faint lines of the losses of single steps, spread over their epoch so that its mean is in the middle."""
    lines = []
    for cycle in run.cycles:
        per_epoch: dict[int, list[float | None]] = {}
        for row in cycle.steps:
            per_epoch.setdefault(row["epoch"], []).append(row["loss"])
        x = [epoch + 0.5 + (i + 0.5) / len(rows) for epoch, rows in per_epoch.items() for i in range(len(rows))]
        y = [loss for rows in per_epoch.values() for loss in rows]
        lines.append(Line("_single steps", x, y, SERIES[cycle.view], faint=True, marker=False))
    return lines


def _health_figures(run: Run) -> list[Chart]:
    """Draws the effective rank of the queries, and R@1 or the score without labels, where the run measured them."""
    known = [
        (view, row["epoch"], row["effective_rank"][view])
        for view in VIEWS
        for row in run.health
        if row["effective_rank"].get(view) is not None
    ]
    figures = _view_figures(known, "Effective rank of the queries")
    for measure, title in (("r@1", "R@1 while training, held-out videos"), ("score", "Score without labels")):
        known = [(row["view"], row["epoch"], row[measure]) for row in run.online if measure in row]
        figures += _view_figures(known, title, percent=measure == "r@1")
    return figures


def _view_figures(values: Sequence[tuple[str, int, float]], title: str, percent: bool = False) -> list[Chart]:
    """Draws values (view, epoch from 0, value) as a line for each view over the epochs; no figure without values."""
    lines = []
    for view in VIEWS:
        if own := [(epoch + 1, value) for of_view, epoch, value in values if of_view == view]:
            lines.append(Line(VIEW_NAMES[view], *map(list, zip(*own, strict=True)), SERIES[view]))
    return [line_figure(lines, x="epoch", y=title, percent=percent)] if lines else []


def cycle_table(run: Run, unlabelled: bool = False) -> Table | None:
    """Returns a row per cycle, with values of its last epoch and of the first epoch that has them.

    The first epochs may have none: a cascade waits until its queue is full. The losses of epochs that began with random
    vectors in the queue are left out if there are others: such negatives are easy, so that those losses are too low.
    Where a single epoch has a value, it is the last. Without labels the table has no columns of mining.
    """
    loss = "A cascade has no loss before its queue is full. Epochs that began with random entries in it do not count."
    mining = "PMR and mining R@1 need labels, and a cycle that mines positives."
    columns = [
        Column("Cycle"),
        Column("Epochs", "count"),
        Column("Loss, first", "number", f"{loss} A single epoch has one loss, the last.", "mean of the epoch"),
        Column("Loss, last", "number", loss, "mean of the epoch"),
        Column("Loss, chance", "number", "The loss if all candidates were equally similar to the query."),
        Column("PMR, first, %", "rate", f"{mining} A single epoch has one PMR, the last."),
        Column("PMR, last, %", "rate", mining),
        Column("Mining R@1, last, %", "rate", mining),
        Column("Time", "minutes"),
    ]
    rows = [(f"{number}. {cycle.name}", *_cycle_values(cycle)) for number, cycle in enumerate(run.cycles, 1)]
    if unlabelled:  # these columns would be empty
        kept = [place for place, column in enumerate(columns) if not column.heading.startswith(("PMR", "Mining"))]
        columns, rows = [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]
    return Table("Cycles", columns, rows) if rows else None


def _cycle_values(cycle: Cycle) -> list[Any]:
    values: list[Any] = [len(cycle.epochs)]
    for key in ("loss", "pmr", "mining_r1"):
        measured = [epoch for epoch in cycle.epochs if epoch.get(key) is not None]
        settled = [epoch for epoch in measured if not epoch.get("random_negatives")]
        known = [epoch[key] for epoch in settled or measured] or [None]
        first = known[0] if len(known) > 1 else None
        values += [known[-1]] if key == "mining_r1" else [first, known[-1]]
        if key == "loss":
            values.append(cycle.epochs[-1].get("loss_chance") if cycle.epochs else None)
    return [*values, sum(epoch.get("epoch_time_s") or 0 for epoch in cycle.epochs)]


def flat_config(config: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns (section, rows of key and value); a cycle is one row, and a nested section has keys with a dot."""
    sections = []
    for section, values in config.items():
        rows = [(key, str(value)) for key, value in values.items() if key != "cycles" and not isinstance(value, dict)]
        for key, value in values.items():
            rows += [(f"{key}.{k}", str(v)) for k, v in value.items()] if isinstance(value, dict) else []
        for number, cycle in enumerate(values.get("cycles", ())):
            name = with_cycle(f"schedule.cycles[{number}]").removeprefix("schedule.")
            rows.append((name, ", ".join(f"{k} = {v}" for k, v in cycle.items() if v not in (None, []))))
        sections.append((section, rows))
    return sections
