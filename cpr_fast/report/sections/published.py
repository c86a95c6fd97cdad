"""The published numbers of the CPR paper, table by table, from `published.toml`; `report` and `reproduce` use them."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources

from cpr_fast.errors import InputError


@dataclass(frozen=True)
class PublishedRow:
    """A row of a table.

    Attributes:
        values: percent, by the key of a column; a number that the paper does not print is absent.
        config: the file in configs/ whose run reproduces the row, with the encoder of `view` after `cycle` (None: the
            last one).
    """

    id: str
    method: str
    values: dict[str, float]
    config: str
    view: str
    cycle: int | None


@dataclass(frozen=True)
class PublishedTable:
    """A table of the paper.

    Attributes:
        number: its number in the paper.
        data: "ucf101" | "hmdb51", the data set that it is evaluated on.
        columns: {key: heading}; a key is the name of the rate in our own results (`r@1`, `pmr`, `probe`, …).
    """

    name: str
    number: int
    title: str
    protocol: str
    data: str
    columns: dict[str, str]
    rows: tuple[PublishedRow, ...]


@functools.cache
def published_tables() -> dict[str, PublishedTable]:
    """Returns every table by its name, in the order of the file."""
    text = (resources.files("cpr_fast.report.sections") / "published.toml").read_text(encoding="utf-8")
    return {name: _table(name, raw) for name, raw in tomllib.loads(text).items()}


def published_table(name: str) -> PublishedTable:
    """Returns one table. Raises InputError, which lists the tables, for an unknown name."""
    tables = published_tables()
    if name not in tables:
        raise InputError(f"TABLE: expected one of {', '.join(tables)}, got {name!r}")
    return tables[name]


def _table(name: str, raw: dict) -> PublishedTable:
    rows = tuple(
        PublishedRow(
            row["id"],
            row["method"],
            {key: row[key] for key in raw["columns"] if key in row},
            row.get("config", f"table{raw['number']}_{row['id']}"),
            row.get("view", "rgb"),
            row.get("cycle"),
        )
        for row in raw["rows"]
    )
    return PublishedTable(
        name, raw["number"], raw["title"], raw["protocol"], raw.get("data", "ucf101"), raw["columns"], rows
    )
