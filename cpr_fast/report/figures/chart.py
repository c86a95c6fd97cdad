"""A figure of the page together with its values, which the page offers as a CSV file inside a link."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

MAX_CSV_ROWS = 5000  # limit for a figure over steps: more rows make the page slow; metrics.jsonl has all

Value = str | int | float | None


@dataclass(frozen=True)
class Chart:
    """An SVG element and the table of its values.

    Attributes:
        title: names the figure for screen readers and the CSV file.
        svg: the <svg> element; `str(chart)` is the same.
        columns: headings of the table.
        rows: its rows; None is a missing value. Rates are fractions, 0..1.
    """

    title: str
    svg: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]

    def __str__(self) -> str:
        return self.svg

    @property
    def csv(self) -> str:
        """Returns the values as a CSV file in a data URI."""
        return csv_uri(self.columns, self.rows)

    @property
    def file(self) -> str:
        """Returns the name under which a browser saves the values."""
        return csv_name(self.title)


def csv_uri(columns: Sequence[str], rows: Sequence[Sequence[Value]]) -> str:
    """Returns a CSV file as a data URI; a missing value is an empty field."""
    thinned = rows[:: -(-len(rows) // MAX_CSV_ROWS)] if len(rows) > MAX_CSV_ROWS else rows
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_field(value) for value in row] for row in thinned)
    return "data:text/csv;charset=utf-8," + quote(text.getvalue().encode("utf-8", "backslashreplace"))


def csv_name(title: str) -> str:
    """Returns a file name made of the words of a title."""
    words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return f"{words[:60].rstrip('-') or 'values'}.csv"


def _field(value: Value) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
