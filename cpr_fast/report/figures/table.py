"""A table of the page: values with headings, the reasons for missing values, and the same values as CSV."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from cpr_fast.evaluate.retrieval.names import MISSING, signed
from cpr_fast.report.figures.chart import Value, csv_name, csv_uri
from cpr_fast.wording import three_digits

Kind = Literal["text", "rate", "signed", "number", "count", "printed", "minutes"]
FORMATS: dict[Kind, Callable[[Value], str]] = {
    "text": str,
    "rate": lambda value: f"{100 * value:.1f}",  # a fraction, in percent
    "signed": signed,  # a difference of fractions, in percentage points
    "number": three_digits,
    "count": lambda value: f"{value:,}",
    "printed": lambda value: f"{value:.1f}",  # percent already, as the paper prints it
    "minutes": lambda value: f"{int(value) // 60}:{int(value) % 60:02d} min",  # from seconds
}


@dataclass(frozen=True)
class Column:
    """A column: its heading with the unit, the format of its values, why a value may be missing (a sentence), and what
    the values mean."""

    heading: str
    kind: Kind = "text"
    missing: str = ""
    meaning: str = ""


@dataclass(frozen=True)
class Cell:
    """The text of a value or, for a missing value, the reason."""

    text: str
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of values under columns; None is a missing value. `ours` are the positions of the rows to emphasise."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]
    ours: Sequence[int] = ()

    @property
    def cells(self) -> list[list[Cell]]:
        """Returns the texts of all rows; a missing value has its column's reason."""
        return [
            [
                Cell(MISSING, column.missing) if value is None else Cell(FORMATS[column.kind](value))
                for column, value in zip(self.columns, row, strict=True)
            ]
            for row in self.rows
        ]

    @property
    def reasons(self) -> list[str]:
        """Returns the reasons why values of this table are missing, each once and none that another one contains."""
        found = list(dict.fromkeys(cell.reason for row in self.cells for cell in row if cell.reason))
        return [reason for reason in found if not any(reason in other for other in found if other != reason)]

    @property
    def csv(self) -> str:
        """Returns the values as a CSV file in a data URI; rates are fractions, 0..1."""
        return csv_uri([column.heading.replace(", %", "") for column in self.columns], self.rows)

    @property
    def file(self) -> str:
        """Returns the name under which a browser saves the values."""
        return csv_name(self.title)
