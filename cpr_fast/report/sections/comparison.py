"""Compares several runs: their headline numbers, mining curves, true positives and classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpr_fast.errors import InputError
from cpr_fast.evaluate.retrieval.names import MEASURES, VIEW_NAMES, signed_interval
from cpr_fast.report.figures.bars import group_figure, profile_figure
from cpr_fast.report.figures.curves import Line, line_figure
from cpr_fast.report.figures.table import Column, Table
from cpr_fast.report.run_folder.pairs import compare_runs
from cpr_fast.report.run_folder.run import Run
from cpr_fast.report.sections.mining import class_rates, count_shares, counted_epochs
from cpr_fast.report.sections.retrieval import RANKS
from cpr_fast.wording import listed


def comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns what compares the runs, each in its own colour.

    Returns:
        `names`: of the runs, distinct. `table`: headline numbers. `figures`: charts. `classes`: for two runs, in how
        many classes the first has the higher and the lower CMR [paper, Fig. 5], else None. `differences`: the table of
        the differences of retrieval of the first run from each other run, or None; `undecided`: sentences without a
        full stop that say why runs have none.
    """
    names = _distinct([run.name for run in runs])
    figures, curves, counts, profiles = [], [], {}, {}
    for number, (name, run) in enumerate(zip(names, runs, strict=True)):
        mined = [row for row in run.epochs if row.get("pmr") is not None]
        if mined:
            curves.append(Line(name, range(1, len(mined) + 1), [row["pmr"] for row in mined], number))
        if counted := counted_epochs(run):
            counts[number] = (name, count_shares(counted[-1]))
        if found := class_rates(run):
            profiles[number] = (name, [(label, rate) for label, rate, _ in found["classes"]])
    if curves:
        figures.append(line_figure(curves, x="mining epoch, all cycles", y="PMR", percent=True))
    if counts:
        title = "Queries by true positives, last epoch"
        figures.append(
            group_figure(dict(counts.values()), x="correct among the mined", title=title, colours=list(counts))
        )
    if profiles:
        title = "CMR of every class, last epoch"
        figures.append(
            profile_figure(dict(profiles.values()), x="classes, best first", title=title, colours=list(profiles))
        )
    classes = _class_by_class(runs, names)
    differences, reasons = _differences(runs, names)
    return {"names": names, "table": _table(runs, names), "figures": figures, "classes": classes,
            "differences": differences, "undecided": reasons}  # fmt: skip


def _table(runs: Sequence[Run], names: Sequence[str]) -> Table:
    retrieval = "R@k needs an evaluation by `cpr-fast retrieve` and a gallery of at least k videos."
    mining = "PMR and CMR need labels and an epoch that mined positives."
    columns = [
        Column("Run"),
        Column("Retrieval on", "text", "No evaluation, or an older version did not record its index."),
        Column("mAP, %", "rate", "mAP was not measured by `cpr-fast retrieve`.", "mean average precision"),
        *(Column(f"R@{k}, %", "rate", retrieval) for k in RANKS),
        Column("Probe, %", "rate", "This run was not evaluated by `cpr-fast probe`.", "accuracy of a linear probe"),
        Column("Finetune, %", "rate", "This run was not evaluated by `cpr-fast finetune`."),
        Column("PMR, %", "rate", mining, "positive mining ratio"),
        Column("CMR, %", "rate", mining, "class mining ratio, median"),
        Column("Clips/s", "number", "No step was logged."),
        Column("Last cycle", "text", "No step was logged."),
    ]
    return Table("Runs", columns, [(name, *_line(run)) for name, run in zip(names, runs, strict=True)])


def _line(run: Run) -> tuple:
    last = next((row for row in reversed(run.epochs) if row.get("pmr") is not None), {})
    best = run.headline() or {}
    accuracies = [(run.accuracy(task) or {}).get("accuracy") for task in ("probe", "finetune")]
    rate = (run.speed() or {}).get("clips_per_s")
    method = run.cycles[-1].name if run.cycles else None
    rates = [best.get(key) for key in ("map", *(f"r@{k}" for k in RANKS))]
    on = listed(run.evaluated_indexes) or None
    return (on, *rates, *accuracies, last.get("pmr"), last.get("cmr_median"), rate, method)


def _differences(runs: Sequence[Run], names: Sequence[str]) -> tuple[Table | None, list[str]]:
    """Returns the differences of the first run from each other run, and the reasons why runs cannot be compared."""
    rows, reasons = [], []
    for name, run in zip(names[1:], runs[1:], strict=True):
        try:
            blocks = compare_runs(runs[:1], [run])
        except InputError as error:
            reasons.append(str(error))
            continue
        for block in blocks:
            how = f"{block['protocol']}, {block['recipe']}"
            rows += [
                (
                    f"{names[0]} – {name}",
                    how,
                    VIEW_NAMES[row["view"]],
                    MEASURES[row["measure"]],
                    row["first"],
                    row["second"],
                    row["difference"],
                    signed_interval(row["ci95"]) if row["ci95"] else None,
                    None if row["p"] is None else f"{row['p']:.2g}",
                    row["queries"],
                    row["sources"],
                )
                for row in block["rows"]
            ]
    single = "All queries are of one source, or none has a value."
    columns = [Column("Runs"), Column("Protocol, test-time recipe"), Column("View"), Column("Measure")]
    columns += [Column("First, %", "rate", single), Column("Second, %", "rate", single)]
    columns += [Column("Difference, %", "signed", single, "first – second, in percentage points")]
    columns += [Column("95 % interval, %", "text", single, "paired bootstrap over sources"),
                Column("p", "text", single, "two-sided"),
                Column("Queries", "count"), Column("Sources", "count")]  # fmt: skip
    return Table("Differences of retrieval", columns, rows) if rows else None, reasons


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
    """Appends a number to names that occur more than once."""
    return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]
