"""The claims of the study side by side for all sets, as docs/evidence.md and README.md show them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .claims import CLAIMS, HEADLINES, Claim, judge
from .videos import TITLES

Row = dict[str, Any]


def claim_summary(by_set: dict[str, Sequence[Row]], folder: Path, *, headlines: bool = False) -> str:
    """Returns a table of the claims that at least one set has rows for, as Markdown.

    A cell has the mean difference over the seeds in percentage points, its 95 % interval over the seeds (Student's t,
    paired by seed), and the verdict of the protocol.

    Args:
        by_set: the rows of each set.
        folder: of study_queries.json.
        headlines: keep only the claims of `HEADLINES`, which the README shows.
    """
    lines = ["| " + " | ".join(["claim", *(TITLES[name] for name in by_set)]) + " |", "|" + "---|" * (len(by_set) + 1)]
    for claim in CLAIMS:
        if headlines and claim.text not in HEADLINES:
            continue
        cells = [_cell(claim, rows, folder, name) for name, rows in by_set.items()]
        if any(cells):
            lines.append(f"| {claim.text.replace('**', '')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(claim: Claim, rows: Sequence[Row], folder: Path, name: str) -> str:
    found = judge(claim, {(row["setting"], row["seed"]): row for row in rows}, folder, name)
    if found is None:
        return ""
    seeds = found["seeds"]
    between = "" if seeds["ci95"] is None else " ({} to {})".format(*map(_points, seeds["ci95"]))
    return f"{_points(seeds['difference'])}{between}, {found['verdict']}"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"
