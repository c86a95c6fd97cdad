"""A section of the explanation of a config, and its layout as text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

WIDTH = 110  # columns
_MARGIN = 14  # columns of the titles


@dataclass(frozen=True)
class Section:
    """A title, rows of (label, text), and the same facts as plain data, for `--json`."""

    title: str
    rows: Sequence[tuple[str, str]]
    values: dict[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Returns the section as text of at most `WIDTH` columns, with the title in the margin."""
        lines = []
        for number, (label, text) in enumerate(self.rows):
            margin = (self.title if number == 0 else "").ljust(_MARGIN)
            lines += textwrap.wrap(
                f"{label}: {text}" if label else text, WIDTH,
                initial_indent=margin, subsequent_indent=" " * (_MARGIN + 2), break_on_hyphens=False,
            )  # fmt: skip
        return lines


def number(value: float) -> str:
    """Returns a setting as a person would write it: "1e-5", "0.001", "16"."""
    return f"{value:g}".replace("e-0", "e-")


def fraction(value: float) -> str:
    """Returns a fraction as the pages of this project write it: ".8", "1"."""
    return f"{value:g}".removeprefix("0") if 0 < value < 1 else f"{value:g}"
