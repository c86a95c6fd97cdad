"""Several runs side by side: their headline numbers, mining curves, true positives and classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpr_fast.report.figures.bars import group_figure, profile_figure
from cpr_fast.report.figures.curves import Line, line_figure
from cpr_fast.report.sections.mining import class_rates, count_shares, counted_epochs
from cpr_fast.report.sections.runs import Run


def comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """Rows of headline numbers and figures that draw every run in its colour.

    Returns `rows`: name, method, best (headline row of retrieval), pmr, cmr, clips_per_s; `figures`; `classes`: for
    two runs in how many classes the first has the higher and the lower CMR [paper, Fig. 5], else None.
    """
    names = _distinct([run.name for run in runs])
    rows = [{"name": name, **_line(run)} for name, run in zip(names, runs, strict=True)]
    figures, curves, counts, profiles = [], [], {}, {}
    for number, (name, run) in enumerate(zip(names, runs, strict=True)):
        mined = [row for row in run.epochs if row.get("pmr") is not None]
        if mined:
            curves.append(Line(name, range(len(mined)), [row["pmr"] for row in mined], number))
        if counted := counted_epochs(run):
            counts[number] = (name, count_shares(counted[-1]))
        if found := class_rates(run):
            profiles[number] = (name, [rate for _, rate, _ in found["classes"]])
    if curves:
        figures.append(line_figure(curves, x="mining epoch, all cycles", y="PMR", percent=True))
    if counts:
        title = "Queries by true positives, last epoch"
        figures.append(
            group_figure(dict(counts.values()), x="right ones among the mined", title=title, colours=list(counts))
        )
    if profiles:
        title = "CMR of every class, last epoch"
        figures.append(
            profile_figure(dict(profiles.values()), x="classes, best first", title=title, colours=list(profiles))
        )
    return {"rows": rows, "figures": figures, "classes": _class_by_class(runs, names)}


def _line(run: Run) -> dict[str, Any]:
    last = next((row for row in reversed(run.epochs) if row.get("pmr") is not None), {})
    accuracies = {task: (run.accuracy(task) or {}).get("accuracy") for task in ("probe", "finetune")}
    rate = (run.speed() or {}).get("clips_per_s")
    method = run.cycles[-1].name if run.cycles else "–"
    return {"method": method, "best": run.headline() or {}, "pmr": last.get("pmr"), "cmr": last.get("cmr_median"),
            "clips_per_s": rate, **accuracies}  # fmt: skip


def _class_by_class(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any] | None:
    found = [class_rates(run) for run in runs]
    if len(runs) != 2 or None in found:
        return None
    first, second = ({name: rate for name, rate, _ in rates["classes"]} for rates in found)
    shared = first.keys() & second.keys()
    if not shared:
        return None
    return {
        "first": names[0],
        "second": names[1],
        "better": sum(first[name] > second[name] for name in shared),
        "worse": sum(first[name] < second[name] for name in shared),
        "classes": len(shared),
    }


def _distinct(names: Sequence[str]) -> list[str]:
    """Equal names with a number behind them."""
    return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]
