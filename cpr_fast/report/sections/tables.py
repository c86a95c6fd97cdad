"""Tables of the page: retrieval, classification, cycles, the configuration, and the published numbers beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from cpr_fast.report.figures.bars import Bar, bar_figure
from cpr_fast.report.sections.published import PublishedTable, published_tables
from cpr_fast.report.sections.runs import MODEL_NAMES, VIEW_NAMES, Cycle, Run

TASK_NAMES = {"probe": "Linear probe", "finetune": "Finetune"}
PROTOCOLS = {
    "train_test": "Test videos query training videos of other sources.",
    "leave_source_out": "Every video queries all others but those of its own source.",
}


def retrieval_blocks(run: Run) -> list[dict[str, Any]]:
    """A table and a figure for every protocol and recipe that the run was evaluated by."""
    return [
        {
            "rows": _retrieval_rows(rows),
            "figure": _retrieval_figure(rows),
            "protocol": PROTOCOLS.get(rows[0]["protocol"], rows[0]["protocol"]),
            "recipe": rows[0]["recipe"],
        }
        for rows in run.evaluations
    ]


def _retrieval_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trained first, then by R@1."""
    ordered = sorted(rows, key=lambda row: (row["name"] != "trained", -(row.get("r@1") or 0)))
    return [row | {"method": MODEL_NAMES[row["name"]], "view_name": VIEW_NAMES[row["view"]]} for row in ordered]


def _retrieval_figure(rows: Sequence[dict[str, Any]]) -> str | None:
    rows = [row for row in rows if row.get("r@1") is not None]
    bars = [
        Bar(
            f"{MODEL_NAMES[row['name']].split(',')[0]} · {VIEW_NAMES[row['view']]}",
            row["r@1"],
            tuple(row["r@1_ci95"]) if row.get("r@1_ci95") else None,
            0 if row["name"] == "trained" else 5,
        )
        for row in sorted(rows, key=lambda row: -row["r@1"])
    ]
    return bar_figure(bars, title="R@1, % (line: 95 % interval)") if bars else None


def classification_rows(run: Run) -> list[dict[str, Any]]:
    """A row per task, recipe, crops and view: means over splits and seeds."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in run.classified:
        groups.setdefault((row["task"], row["recipe"], row["crops"], row["view"]), []).append(row)
    table = []
    for (task, recipe, crops, view), rows in groups.items():
        line = {"task": TASK_NAMES[task], "recipe": recipe, "crops": crops, "view": VIEW_NAMES[view]}
        line |= {"accuracy": mean(row["accuracy"] for row in rows), "videos": rows[0]["videos"]}
        line |= {"class_accuracy": mean(row["mean_class_accuracy"] for row in rows)}
        line |= {"splits": len({row["index"] for row in rows}), "seeds": len({row["seed"] for row in rows})}
        table.append(line | {"interval": rows[0]["accuracy_ci95"] if len(rows) == 1 else None})
    return table


def cycle_row(cycle: Cycle) -> dict[str, Any]:
    """A line of the table of cycles: values of the first epoch that has them (the memory fills first) and the last."""
    row: dict[str, Any] = {"name": cycle.name, "epochs": len(cycle.epochs)}
    for key in ("loss", "pmr", "mining_r1"):
        values = [epoch[key] for epoch in cycle.epochs if epoch.get(key) is not None] or [None]
        row |= {f"{key}_first": values[0], f"{key}_last": values[-1]}
    return row | {"seconds": sum(epoch.get("epoch_time_s") or 0 for epoch in cycle.epochs)}


def flat_config(config: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Sections of (key, value); cycles as one line each, sections within sections with a dot."""
    sections = []
    for section, values in config.items():
        rows = [(key, str(value)) for key, value in values.items() if key != "cycles" and not isinstance(value, dict)]
        for key, value in values.items():
            rows += [(f"{key}.{k}", str(v)) for k, v in value.items()] if isinstance(value, dict) else []
        for number, cycle in enumerate(values.get("cycles", ())):
            rows.append((f"cycles[{number}]", ", ".join(f"{k} = {v}" for k, v in cycle.items() if v not in (None, []))))
        sections.append((section, rows))
    return sections


def published_beside(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Every published table with the rows of ours that belong there, ours first; values in percent or None."""
    blocks = []
    for table in published_tables().values():
        ours = [line for run in runs for line in _ours(run, table)]
        lines = [{"method": row.method, "ours": False, "values": row.values} for row in table.rows]
        blocks.append({"table": table, "rows": ours + lines})
    return blocks


def _ours(run: Run, table: PublishedTable) -> list[dict[str, Any]]:
    """A run's lines of a published table: one for retrieval by view, else one of the view that it leads with."""
    index = str(run.config.get("data", {}).get("index", "")).lower()
    hmdb51 = "hmdb" in index
    elsewhere = not hmdb51 and "ucf" not in index
    if table.name in ("retrieval_ucf101", "retrieval_hmdb51"):
        if hmdb51 != (table.name == "retrieval_hmdb51"):
            return []
        trained = [row for row in run.retrieval if row["name"] == "trained"]
        values = [(VIEW_NAMES[row["view"]], {key: row.get(key) for key in table.columns}) for row in trained]
    elif table.name == "finetune":
        found = run.accuracy("finetune")
        values = [(VIEW_NAMES[found["view"]], {"hmdb51" if hmdb51 else "ucf101": found["accuracy"]})] if found else []
    elif table.name == _ablation(run):
        accuracies = {task: (run.accuracy(task) or {}).get("accuracy") for task in TASK_NAMES}
        best = run.headline() or {}
        values = [(VIEW_NAMES.get(best.get("view"), ""), {key: best.get(key) for key in table.columns} | accuracies)]
    elif table.name == "mining":
        mined = next((row for row in reversed(run.epochs) if row.get("pmr") is not None), {})
        values = [(VIEW_NAMES.get(mined.get("view"), ""), {key: mined.get(key) for key in table.columns})]
    else:
        return []
    return [
        {"method": f"{run.name}, {view}{', other data' if elsewhere else ''}", "ours": True, "values": percent}
        for view, rates in values
        if (percent := {key: 100 * rate for key, rate in rates.items() if rate is not None and key in table.columns})
    ]


def _ablation(run: Run) -> str:
    """The ablation whose setting the run has: progressive top-k, another ratio, or the number of stages."""
    if any(cycle.get("top_k") for cycle in run.config.get("schedule", {}).get("cycles", ())):
        return "progressive"
    return "ratio" if run.config.get("mining", {}).get("ratio") == 0.8 else "stages"
