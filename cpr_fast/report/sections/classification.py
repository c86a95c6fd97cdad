"""Classification by a linear probe or finetuning: accuracies, confusion matrices and the most common confusions."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from cpr_fast.evaluate.retrieval.names import VIEW_NAMES, interval
from cpr_fast.report.figures.chart import Chart
from cpr_fast.report.figures.matrix import confusion_figure
from cpr_fast.report.figures.table import Column, Table
from cpr_fast.report.run_folder.run import Run
from cpr_fast.wording import listed

TASK_NAMES = {"probe": "Linear probe", "finetune": "Finetune"}
CONFUSIONS = 10  # pairs of classes in the table below a matrix
SINGLE = "An interval is given for a single split and seed only."


def classification_table(run: Run) -> Table | None:
    """Returns a row per task, recipe, crops and view, means over splits and seeds; None where there is none."""
    rows = [_line(key, rows) for key, rows in _groups(run).items()]
    columns = [
        Column("Task"),
        Column("View"),
        Column("Accuracy, %", "rate"),
        Column("95 % interval, %", "text", SINGLE),
        Column("Mean of classes, %", "rate", meaning="every class counts the same, however many videos it has"),
        Column("Chance, %", "rate", "The number of classes was not recorded.", "one of the classes at random"),
        Column("Test-time recipe"),
        Column("Crops", "count", meaning="views of each clip that are averaged"),
        Column("Splits", "count"),
        Column("Index"),
        Column("Seeds", "count"),
        Column("Videos", "count"),
    ]
    return Table("Classification", columns, rows) if rows else None


def confusions(run: Run) -> list[dict[str, Any]]:
    """Returns for every task the "figure" and the "table" of confusions, for the view of the run's main result."""
    blocks = []
    for task, name in TASK_NAMES.items():
        lead = run.accuracy(task)
        if lead is None:
            continue
        same = [(key, rows) for key, rows in _groups(run).items()
                if (key[0], key[1], key[3]) == (task, lead["recipe"], lead["view"])]  # fmt: skip
        known = [row for _, rows in same[:1] for row in rows if row.get("confusion") and row.get("per_class")]
        classes = list(known[0]["per_class"]) if known else []
        known = [row for row in known if list(row["per_class"]) == classes and len(row["confusion"]) == len(classes)]
        if known:
            total = [[sum(cell) for cell in zip(*lines, strict=True)]
                     for lines in zip(*(row["confusion"] for row in known), strict=True)]  # fmt: skip
            title = f"Confusion matrix: {name.lower()}, {VIEW_NAMES[lead['view']]}"
            figure: Chart = confusion_figure(total, classes, title=title)
            blocks.append({"figure": figure, "table": _most_confused(total, classes, title), "count": len(known)})
    return blocks


def _groups(run: Run) -> dict[tuple, list[dict[str, Any]]]:
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in run.classified:
        groups.setdefault((row["task"], row["recipe"], row["crops"], row["view"]), []).append(row)
    return groups


def _line(key: tuple, rows: Sequence[dict[str, Any]]) -> tuple:
    task, recipe, crops, view = key
    bounds = rows[0].get("accuracy_ci95") if len(rows) == 1 else None
    classes = len(rows[0].get("confusion") or ())
    return (
        TASK_NAMES[task],
        VIEW_NAMES[view],
        mean(row["accuracy"] for row in rows),
        interval(bounds) if bounds else None,
        mean(row["mean_class_accuracy"] for row in rows),
        1 / classes if classes else None,
        recipe,
        crops,
        len({row["index"] for row in rows}),
        listed(list(dict.fromkeys(row["index"] for row in rows))),
        len({row["seed"] for row in rows}),
        rows[0]["videos"],
    )


def _most_confused(confusion: Sequence[Sequence[int]], classes: Sequence[str], title: str) -> Table:
    """Returns the pairs of classes that are confused most often."""
    found = [
        (classes[true], classes[predicted], number, number / sum(numbers))
        for true, numbers in enumerate(confusion)
        for predicted, number in enumerate(numbers)
        if number and true != predicted
    ]
    found.sort(key=lambda row: (-row[2], -row[3]))
    columns = [
        Column("True class"),
        Column("Predicted as"),
        Column("Videos", "count"),
        Column("Of its class, %", "rate"),
    ]
    return Table(f"{title}, most common confusions", columns, found[:CONFUSIONS])
