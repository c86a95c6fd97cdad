"""A run folder: the rows of its metrics.jsonl by kind, and the index that it was trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from cpr_fast.config import DataConfig
from cpr_fast.config.build import build
from cpr_fast.config.recipes import retrieve_command
from cpr_fast.data.features.index import StoredClips
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError
from cpr_fast.evaluate.retrieval.names import VIEW_NAMES
from cpr_fast.evaluate.retrieval.ranking import TOGETHER
from cpr_fast.runtime.metrics import FILE, read_metrics

VIEWS = ("rgb", "flow", "residual")  # the views that a run may train
MINING_NAMES = {"none": "InfoNCE", "label": "UberNCE", "cascade": "CPR"}


def method_name(mining: str, stages: int | str | None) -> str:
    """Returns the name of a cycle's method from `mining` of the cycle and `mining.stages`: a cascade of one stage is
    CoCLR."""
    return "CoCLR" if mining == "cascade" and stages == 1 else MINING_NAMES.get(mining, mining)


@dataclass(frozen=True)
class Cycle:
    """One co-training cycle of a run, with its epoch rows and step rows; `number` counts from 0."""

    number: int
    view: str
    mining: str
    name: str
    epochs: list[dict[str, Any]]
    steps: list[dict[str, Any]]


class Run:
    """The rows of one run folder, sorted by kind.

    Raises:
        InputError: the folder has no metrics.jsonl, or an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = read_metrics(folder)
        if not rows:
            raise InputError(
                f"run folder {str(folder)!r}: {FILE} is empty; expected a folder written by `cpr-fast pretrain`"
            )
        self.name = folder.resolve().name
        self.written = (folder / FILE).stat().st_mtime  # seconds since 1970
        self.start = next((row for row in rows if row["kind"] == "run"), {})
        self.config: dict[str, Any] = self.start.get("config", {})
        self.notes = [row for row in rows if row["kind"] == "note"]
        self.mined = [row for row in rows if row["kind"] == "mined"]
        self.epochs = sorted((row for row in rows if row["kind"] == "epoch"), key=lambda row: row["epoch"])
        self.steps = sorted((row for row in rows if row["kind"] == "step"), key=lambda row: row["step"])
        self.health = [row for row in rows if row["kind"] == "health"]
        self.alarms = [row for row in rows if row["kind"] == "alarm"]
        self.choices = [row for row in rows if row["kind"] == "cascade"]  # of mining.stages = "auto"
        self.online = [row for row in rows if row["kind"] == "online"]
        self.outcome = next((row for row in reversed(rows) if row["kind"] == "outcome"), None)
        latest = sorted(_latest_evaluations(rows), key=lambda kinds: kinds["retrieval"][0]["recipe"] != "paper")
        self.evaluations = [kinds["retrieval"] for kinds in latest]  # the paper's recipe first
        first = latest[0] if latest else {}
        self.retrieval = first.get("retrieval", [])
        self.retrieved, self.same_video = first.get("retrieved", []), first.get("same_video", [])
        self.classified = _latest_classifications(rows)

    @property
    def unlabelled(self) -> bool:
        """Whether the network must be judged without labels: by what the evaluation that the report shows first has
        measured or, before any, by the videos of the index."""
        if self.same_video or not self.retrieval:
            return bool(self.same_video) or (self.index is not None and not self.index.mostly_labelled)
        return all(row.get("r@1") is None for row in self.trained())

    @cached_property
    def cycles(self) -> list[Cycle]:
        """The cycles of the run that have rows, in order."""
        numbers = sorted({row["cycle"] for row in self.epochs + self.steps})
        cycles = []
        for number in numbers:
            epochs = [row for row in self.epochs if row["cycle"] == number]
            steps = [row for row in self.steps if row["cycle"] == number]
            row = (epochs or steps)[0]
            mining = row["mining"]
            method = method_name(mining, self.config.get("mining", {}).get("stages"))
            cycles.append(Cycle(number, row["view"], mining, f"{VIEW_NAMES[row['view']]} {method}", epochs, steps))
        return cycles

    @property
    def planned_epochs(self) -> int | None:
        """Returns the number of epochs of all cycles, as the run was started or last resumed; None if not recorded."""
        recorded = [row["config"] for row in (self.start, *self.notes) if row.get("config")]
        cycles = recorded[-1].get("schedule", {}).get("cycles") if recorded else None
        return sum(cycle["epochs"] for cycle in cycles) if cycles else None

    @property
    def seconds(self) -> float:
        """Returns the total time of all finished epochs, in seconds."""
        return sum(row.get("epoch_time_s") or 0 for row in self.epochs)

    @cached_property
    def index(self) -> Index | None:
        """The videos that the run was trained on, or None if the index or its videos no longer exist."""
        try:
            data = build(DataConfig, self.config.get("data", {}), "data")
            if data.features:
                return StoredClips.open(data.features).select_for_training(data.split)
            return Index.load(data.index, require_flow=False).select_for_training(data.split).long_enough(data)
        except (InputError, OSError):
            return None

    @property
    def evaluated_indexes(self) -> list[str]:
        """The paths of the indexes of the retrieval that the report shows first; empty if there is none, or if an older
        version evaluated the run."""
        return self.retrieval[0].get("indexes", []) if self.retrieval else []

    @property
    def evaluation_command(self) -> str:
        """The command that evaluates the run on the index of the retrieval that the report shows first or, before any,
        on the training index."""
        data = self.config.get("data", {})
        index = next(iter(self.evaluated_indexes), None) or data.get("features") or data.get("index")
        return retrieve_command(self.folder, index or "INDEX.csv")

    @cached_property
    def chance_pmr(self) -> float | None:
        """PMR of random mining: the share of same-class videos among those of other sources, mean over videos.

        None if the index no longer exists or a video has no label.
        """
        if self.index is None or (self.index.labels < 0).any():
            return None
        labels, sources = self.index.labels, self.index.source_ids
        own_source = np.bincount(sources)[sources]
        own_pair = np.unique(np.stack([labels, sources]), axis=1, return_inverse=True, return_counts=True)
        same_source_and_class = own_pair[2][own_pair[1].reshape(-1)]
        others = len(labels) - own_source
        right = np.bincount(labels)[labels] - same_source_and_class
        return float((right[others > 0] / others[others > 0]).mean()) if (others > 0).any() else None

    def headline(self) -> dict[str, Any] | None:
        """Returns the retrieval row of the trained network that the report shows first: of two views together, else of
        the best view by mAP or, where none has it, by R@1; None without retrieval."""
        return next(iter(self.trained()), None)

    def trained(self) -> list[dict[str, Any]]:
        """Returns the retrieval rows of the trained network: two views together first, then the best view."""
        rows = [row for row in self.retrieval if row["name"] == "trained"]
        pairs = list(TOGETHER)
        return sorted(
            rows,
            key=lambda row: (
                pairs.index(row["view"]) if row["view"] in TOGETHER else len(pairs),
                -(row.get("map") or 0),
                -(row.get("r@1") or 0),
            ),
        )

    def accuracy(self, task: str) -> dict[str, Any] | None:
        """Returns the mean accuracy of a task ("probe" | "finetune"), its recipe, view (chosen as in `headline`) and
        indexes."""
        rows = [row for row in self.classified if row["task"] == task]
        rows = [row for row in rows if row["recipe"] == "paper"] or rows
        views = {row["view"] for row in rows}
        view = next((pair for pair in TOGETHER if pair in views), rows[-1]["view"] if rows else None)
        values = [row["accuracy"] for row in rows if row["view"] == view]
        if not values:
            return None
        indexes = list(dict.fromkeys(row["index"] for row in rows))
        return {"accuracy": mean(values), "view": view, "recipe": rows[0]["recipe"], "indexes": indexes}

    def untrained(self, view: str) -> dict[str, Any] | None:
        """Returns the row of the network of a view (or of two views) before training."""
        return next((row for row in self.retrieval if (row["name"], row["view"]) == ("untrained", view)), None)

    def best_other(self, measure: str) -> dict[str, Any] | None:
        """Returns the best row by a measure ("map" | "r@1") of the untrained network and the baselines."""
        others = [row for row in self.retrieval if row["name"] != "trained" and row.get(measure) is not None]
        return max(others, key=lambda row: row[measure], default=None)

    def best_baseline(self) -> dict[str, Any] | None:
        """Returns the best row of the pixel and motion baselines, or of the stored features as they are, by mAP or,
        where none has it, by R@1."""
        rows = [row for row in self.retrieval if row["name"] not in ("trained", "untrained")]
        measured = [row for row in rows if row.get("r@1") is not None]
        return max(measured, key=lambda row: (row.get("map") or 0, row["r@1"]), default=None)

    def speed(self) -> dict[str, float] | None:
        """Returns medians over the steps: clips per second, seconds of computing and of waiting for data per step."""
        keys = ("clips_per_s", "step_time_s", "data_wait_s")
        values = {key: [row[key] for row in self.steps if row.get(key) is not None] for key in keys}
        return {key: median(found) for key, found in values.items()} if all(values.values()) else None


def _latest_evaluations(rows: Iterable[dict[str, Any]]) -> list[dict[str, list[dict[str, Any]]]]:
    """Returns for every protocol and recipe the rows of the last evaluation by kind: "retrieval" and, where it has
    them, "retrieved" and "same_video", which follow these.

    An evaluation that is repeated, perhaps on another index, replaces all rows of the earlier one of its protocol and
    recipe: rows of two indexes are never compared.
    """
    found: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    key = None
    for row in rows:
        if row["kind"] == "retrieval":
            row = {"recipe": "paper"} | row
            key = row["protocol"], row["recipe"]
            names = [(other["name"], other["view"]) for other in found.get(key, {}).get("retrieval", ())]
            if not names or (row["name"], row["view"]) in names:  # the first row of an evaluation
                found[key] = {}
        if row["kind"] in ("retrieval", "retrieved", "same_video") and key is not None:
            found[key].setdefault(row["kind"], []).append(row)
    return list(found.values())


def _latest_classifications(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of classification, the last of each split, seed and view. Those of another index, which has the
    number of an earlier split, replace all earlier rows of their task and recipe: a mean over splits is one of the
    indexes that one command was given."""
    found: list[dict[str, Any]] = []
    for row in rows:
        if row["kind"] == "classification":
            same = [other for other in found if all(other[key] == row[key] for key in ("task", "recipe"))]
            if any(other["split"] == row["split"] and other["index"] != row["index"] for other in same):
                found = [other for other in found if other not in same]
            keys = ("task", "recipe", "split", "seed", "view", "crops")
            found = [other for other in found if any(other[key] != row[key] for key in keys)] + [row]
    return found
