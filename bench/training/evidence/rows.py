"""The rows of the study: one JSON line for each set, setting and seed, with the measures of every query.

A row is written once, when its run is finished, and is never changed. The classes and sources of the queries, which
paired tests need, are in study_queries.json, once for each set.

Letters: Q queries.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpr_fast.evaluate.retrieval.queries import QueryScores
from cpr_fast.runtime.files import append_line, replacing

ROWS, TRIALS, QUERIES = "study.jsonl", "study_trials.jsonl", "study_queries.json"
STEPS = 65_535  # average precision is kept in this many steps of 0..1
KEY = ("set", "setting", "seed", "settings")
WORLD = ("commit", "device", "torch", "threads")  # rows that differ in these are marked


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file in the order in which they were written; a line cut short by a kill is left out."""
    if not path.exists():
        return []
    rows = []
    lines = path.read_text().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n") and number == len(lines):
            break
        rows.append(json.loads(line))
    return rows


def is_done(rows: list[dict[str, Any]], key: dict[str, Any]) -> bool:
    """Returns whether a row with this set, setting, seed and digest of the settings exists, whatever else differs."""
    return any(all(row[name] == key[name] for name in KEY) for row in rows)


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Appends a row, which several processes may do at the same time. Raises ValueError if it is there already."""
    if is_done(read_rows(path), row):
        raise ValueError(f"{path}: the row {[row[name] for name in KEY]} exists already; rows are never replaced")
    append_line(path, json.dumps(row))


def marked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of a set that were measured with another commit, processor, torch or number of threads than most
    of its rows; for a tie, than the first of them."""
    worlds = [tuple(row[name] for name in WORLD) for row in rows]
    usual = max(worlds, key=worlds.count, default=None)
    return [row for row, world in zip(rows, worlds, strict=True) if world != usual]


def packed(scores: QueryScores, name: str) -> dict[str, dict[str, str]]:
    """Returns average precision of every query and view, in steps of 1 / 65535, and the rank of the first hit.

    Args:
        name: the embedding, the part before "/view".
    Returns:
        {"average_precision", "first_hit"}: {view: base64 of [Q] uint16, little endian}; 65535 where there is none.
    """
    views = [key.split("/")[1] for key in scores.average_precision if key.split("/")[0] == name]
    precision = {view: (scores.average_precision[f"{name}/{view}"] * STEPS).round() for view in views}
    hits = {view: scores.first_hit[f"{name}/{view}"].clamp(max=STEPS) for view in views}
    return {
        "average_precision": {view: _text(values.nan_to_num(0)) for view, values in precision.items()},
        "first_hit": {view: _text(values) for view, values in hits.items()},
    }


def _text(values: Tensor) -> str:
    return base64.b64encode(values.numpy().astype("<u2").tobytes()).decode()


def query_values(row: dict[str, Any], measure: str, view: str) -> Tensor:
    """Returns a measure of every query of a row, [Q] float64: "map" (average precision) or "r@k" (0 or 1)."""
    stored = row["average_precision" if measure == "map" else "first_hit"][view]
    values = torch.from_numpy(np.frombuffer(base64.b64decode(stored), "<u2").astype(np.float64))
    return values / STEPS if measure == "map" else (values < int(measure.removeprefix("r@"))).double()


def keep_queries(folder: Path, name: str, data: str, scores: QueryScores) -> None:
    """Stores the classes and sources of a set's queries as numbers; the order is that of the rows' measures.

    Raises:
        ValueError: they are stored already and differ, so that rows could not be compared.
    """
    path = folder / QUERIES
    stored = json.loads(path.read_text()) if path.exists() else {}
    number = lambda names: [{n: i for i, n in enumerate(dict.fromkeys(names))}[n] for n in names]  # noqa: E731
    found = {"data": data, "labels": number(scores.labels), "sources": number(scores.sources)}
    if name in stored:
        if stored[name] != found:
            raise ValueError(f"{path}: the queries of {name!r} differ from the stored ones; expected the same videos")
        return
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({**stored, name: found}) + "\n")


def query_sources(folder: Path, name: str) -> Tensor:
    """Returns the source of every query of a set, [Q] int64."""
    return torch.tensor(json.loads((folder / QUERIES).read_text())[name]["sources"])
