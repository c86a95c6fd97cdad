"""Combines the published tables with the rows of our runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from cpr_fast.evaluate.retrieval.names import VIEW_NAMES
from cpr_fast.report.figures.table import Column, Table
from cpr_fast.report.run_folder.run import Run
from cpr_fast.report.sections.published import PublishedTable, published_tables

TASKS = ("probe", "finetune")


class Published(NamedTuple):
    """A published table with our rows, and whether a run was evaluated on its data set (otherwise the page shows the
    table collapsed)."""

    source: PublishedTable
    table: Table
    same_data: bool


def published_beside(runs: Sequence[Run]) -> list[Published]:
    """Returns every published table together with our rows for the same task, ours first, in percent."""
    blocks = []
    for source in published_tables().values():
        ours = [line for run in runs for line in _ours(run, source)]
        theirs = [(row.method, row.values) for row in source.rows]
        missing = "Not printed in the paper, or not measured by our run."
        columns = [Column("Method")] + [Column(name, "printed", missing) for name in source.columns.values()]
        rows = [(method, *(values.get(key) for key in source.columns)) for method, values in ours + theirs]
        table = Table(source.title, columns, rows, range(len(ours)))
        blocks.append(Published(source, table, any(data_set(_evaluated(run)) == source.data for run in runs)))
    return blocks


def data_set(indexes: Sequence[str]) -> str | None:
    """Returns "ucf101" or "hmdb51" where an index is named after one of them, else None."""
    named = " ".join(indexes).lower()
    return "hmdb51" if "hmdb" in named else "ucf101" if "ucf" in named else None


def _trained(run: Run) -> list[str]:
    return [str(run.config.get("data", {}).get("index", ""))]


def _evaluated(run: Run) -> list[str]:
    """Returns the indexes of a run's retrieval or, where they were not recorded, the one that it was trained on."""
    return run.evaluated_indexes or _trained(run)


def _ours(run: Run, table: PublishedTable) -> list[tuple[str, dict[str, float]]]:
    """Returns a run's rows for a published table: one per view for retrieval, else one for the view of the run's main
    result."""
    indexes = _evaluated(run)
    if table.name in ("retrieval_ucf101", "retrieval_hmdb51"):
        if (data_set(indexes) == "hmdb51") != (table.name == "retrieval_hmdb51"):
            return []
        trained = [row for row in run.retrieval if row["name"] == "trained"]
        values = [(VIEW_NAMES[row["view"]], {key: row.get(key) for key in table.columns}) for row in trained]
    elif table.name == "finetune":
        found = run.accuracy("finetune")
        indexes = found["indexes"] if found else []
        column = data_set(indexes) or "ucf101"
        values = [(VIEW_NAMES[found["view"]], {column: found["accuracy"]})] if found else []
    elif table.name == _ablation(run):
        accuracies = {task: (run.accuracy(task) or {}).get("accuracy") for task in TASKS}
        best = run.headline() or {}
        values = [(VIEW_NAMES.get(best.get("view"), ""), {key: best.get(key) for key in table.columns} | accuracies)]
    elif table.name == "mining":
        indexes = _trained(run)
        mined = next((row for row in reversed(run.epochs) if row.get("pmr") is not None), {})
        values = [(VIEW_NAMES.get(mined.get("view"), ""), {key: mined.get(key) for key in table.columns})]
    else:
        return []
    other = "" if data_set(indexes) else ", other data"
    return [
        (f"{run.name}, {view}{other}", percent)
        for view, rates in values
        if (percent := {key: 100 * rate for key, rate in rates.items() if rate is not None and key in table.columns})
    ]


def _ablation(run: Run) -> str:
    """Returns the ablation that has the settings of the run: progressive top-k, another ratio, or the number of
    stages."""
    if any(cycle.get("top_k") for cycle in run.config.get("schedule", {}).get("cycles", ())):
        return "progressive"
    return "ratio" if run.config.get("mining", {}).get("ratio") == 0.8 else "stages"
