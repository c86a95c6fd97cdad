"""Figures of what a run mined: Figs. 3 to 6 of the paper, the stages of the cascade, and measures that need no
labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpr_fast.evaluate.retrieval.names import VIEW_NAMES
from cpr_fast.report.figures.bars import Bar, bar_figure, group_figure, profile_figure
from cpr_fast.report.figures.chart import Chart
from cpr_fast.report.figures.curves import Line, line_figure
from cpr_fast.report.figures.table import Column, Table
from cpr_fast.report.run_folder.run import VIEWS, Run
from cpr_fast.report.sections.training import SERIES, curves, cycle_bands

FIRST = 5  # position of grey among the colours, for the first mining epoch
EXTREMES = 3  # classes shown at either end [paper, Fig. 6]


def mining_figures(run: Run) -> list[Chart]:
    """Draws PMR [Fig. 4], mining R@1 and CMR over the mining epochs, true positives per query [Fig. 3], and the CMR of
    classes."""
    bands = cycle_bands(run, only_mining=True)
    figures = []
    for key, title in (
        ("pmr", "PMR: mined clips of the query's class"),
        ("mining_r1", "Mining R@1: first mined clip is correct"),
        ("cmr_median", "CMR: sources of a class mined, median"),
    ):
        lines = curves(run, key)
        if lines and key == "pmr" and run.chance_pmr is not None:
            lines.append(Line("chance", [bands[0].start, bands[-1].end], [run.chance_pmr] * 2, 5, dashed=True))
        if lines:
            figures.append(line_figure(lines, x="epoch", y=title, percent=True, bands=bands))
    return figures + _count_figures(run) + _class_figures(run)


def no_rates(run: Run, unlabelled: bool) -> str:
    """Returns a sentence that says why a run has no PMR and CMR."""
    if run.cycles and all(cycle.mining != "cascade" for cycle in run.cycles):
        planned = any(cycle.get("mining") == "cascade" for cycle in run.config.get("schedule", {}).get("cycles", ()))
        return "No cycle that mines positives has begun yet." if planned else "This run mines no positives."
    if not run.mined and not any(row.get("mined_share") is not None for row in run.epochs):
        return "No epoch of this run has mined positives yet."
    if unlabelled:
        return (
            "The videos have no labels, so PMR and CMR, which judge what was mined, cannot be computed. The clips that "
            "were mined are shown below."
        )
    return "PMR and CMR were not computed for what this run mined; they need labels."


def inside_figures(run: Run) -> list[Chart]:
    """Draws what each stage keeps, and measures of the mined clips that need no labels."""
    figures = [figure for figure in (_survivors(run),) if figure]
    signs = curves(run, "view_agreement", "{view}: agreement") + curves(
        run, "mutual_neighbours", "{view}: mutual", dashed=True
    )
    bands = cycle_bands(run, only_mining=True)
    if signs:
        title = "Agreement of the views, mutual neighbours"
        figures.append(line_figure(signs, x="epoch", y=title, percent=True, bands=bands))
    for key, title in (
        ("hubness", "Hubness: skewness of times mined"),
        ("mined_age_steps", "Age of mined clips, steps"),
    ):
        if lines := curves(run, key):
            figures.append(line_figure(lines, x="epoch", y=title, zero=key != "hubness", bands=bands))
    return figures


def chosen_cascades(run: Run) -> Table | None:
    """Returns the cascades that a run with mining.stages = "auto" chose, with the means of their criteria and of the
    PMR of their epochs; successive equal choices are one row. None if the run chose none."""
    groups: list[list[dict[str, Any]]] = []
    for row in run.choices:
        if groups and all(row[key] == groups[-1][-1][key] for key in ("cycle", "order", "ratio", "top_k")):
            groups[-1].append(row)
        else:
            groups.append([row])
    rates = {row["epoch"]: row.get("pmr") for row in run.epochs}
    rows = []
    for group in groups:
        first, epochs = group[0], [row["epoch"] for row in group]
        number = f"{epochs[0] + 1}" if len(epochs) == 1 else f"{epochs[0] + 1} to {epochs[-1] + 1}"
        criteria = [_mean([row["criteria"][name] for row in group]) for name in ("siblings", "mined_agree")]
        views = ", ".join(VIEW_NAMES[view] for view in first["order"])
        ratio = first["ratio"] if len(first["order"]) > 1 else None
        rate = _mean([rates.get(epoch) for epoch in epochs])
        rows.append((number, VIEW_NAMES[first["view"]], views, ratio, first["top_k"], *criteria, rate))
    columns = [
        Column("Epochs"),
        Column("Queries"),
        Column("Views of the stages"),
        Column("Ratio", "number", "A cascade of one stage has no ratio."),
        Column("Top-k", "count"),
        Column("Near siblings", "number", "Too few entries of the memory had a sibling."),
        Column("Near each other", "number", "The mined entries could not be compared."),
        Column("PMR, %", "rate", "PMR needs labels and a finished epoch."),
    ]
    return Table("Chosen cascades", columns, rows) if rows else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def class_rates(run: Run) -> dict[str, Any] | None:
    """Returns CMR and true positives of every class in the last mining epoch, the best class first.

    Returns:
        `epoch` (from 1), `full` (how many classes are at 100 %), `classes` (name, CMR, true positives or None) and
        `table`; None if the index no longer exists or no epoch has a CMR.
    """
    row = next((row for row in reversed(run.epochs) if row.get("cmr_per_class")), None)
    if row is None or run.index is None or len(run.index.classes) != len(row["cmr_per_class"]):
        return None
    right = row.get("right_per_class") or [None] * len(row["cmr_per_class"])
    rates = [c for c in zip(run.index.classes, row["cmr_per_class"], right, strict=True) if c[1] is not None]
    rates.sort(key=lambda item: -item[1])
    old = "True positives per class were not recorded when this row was written."
    columns = [Column("Class"), Column("CMR, %", "rate"), Column("True positives mined", "count", old)]
    table = Table("CMR of every class", columns, rates)
    full = sum(rate == 1 for _, rate, _ in rates)
    return {"epoch": row["epoch"] + 1, "full": full, "classes": rates, "table": table}


def extremes(rates: Sequence[tuple]) -> tuple[Sequence[tuple], Sequence[tuple]]:
    """Returns the first EXTREMES classes, and the last EXTREMES of the others."""
    return rates[:EXTREMES], rates[EXTREMES:][-EXTREMES:]


def count_shares(row: dict[str, Any]) -> list[float]:
    """Returns the share of the queries of an epoch row that had 0, 1, … P true positives."""
    return [count / sum(row["right_counts"]) for count in row["right_counts"]]


def counted_epochs(run: Run, view: str | None = None) -> list[dict[str, Any]]:
    """Returns the epoch rows that counted true positives per query."""
    return [row for row in run.epochs if sum(row.get("right_counts") or ()) and view in (None, row["view"])]


def _count_figures(run: Run) -> list[Chart]:
    figures = []
    for view in VIEWS:
        if rows := counted_epochs(run, view):
            same = [row for row in rows if len(row["right_counts"]) == len(rows[-1]["right_counts"])]  # of equal top-k
            groups = {f"epoch {row['epoch'] + 1}": count_shares(row) for row in (same[0], same[-1])}
            title = f"{VIEW_NAMES[view]} queries by true positives"
            colours = [FIRST, SERIES[view]][-len(groups) :]
            figures.append(group_figure(groups, x="correct among the mined", title=title, colours=colours))
    return figures


def _class_figures(run: Run) -> list[Chart]:
    """Draws the CMR of every class, sorted [Fig. 5], and of the best and the worst classes [Fig. 6]."""
    if (found := class_rates(run)) is None or not found["classes"]:
        return []
    rates = [(name, rate) for name, rate, _ in found["classes"]]
    every = profile_figure({"CMR": rates}, x="classes, best first", title="CMR of every class", colours=[0])
    best, worst = extremes(found["classes"])
    bars = [Bar(name, rate, None, 2) for name, rate, _ in best] + [Bar(name, rate, None, 1) for name, rate, _ in worst]
    return [every, bar_figure(bars, title=f"CMR, best and worst {EXTREMES} classes, %")]


def _survivors(run: Run) -> Chart | None:
    """Draws precision and recall after every stage in the last epoch of each view."""
    lines = []
    for view in VIEWS:
        rows = [r for r in run.epochs if r["view"] == view and r.get("survivor_precision_1") is not None]
        if not rows:
            continue
        row = rows[-1]
        measured = sum(key.startswith("survivor_precision_") and value is not None for key, value in row.items())
        stages = range(1, 1 + measured)  # a row has keys for the largest number of stages that could be chosen
        for name, before, dashed in (("precision", row.get("pmr_chance"), False), ("recall", 1.0, True)):
            values = [before, *(row[f"survivor_{name}_{stage}"] for stage in stages)]
            lines.append(Line(f"{VIEW_NAMES[view]}: {name}", [0, *stages], values, SERIES[view], dashed=dashed))
    return line_figure(lines, x="stage", y="What each stage keeps", percent=True) if lines else None
