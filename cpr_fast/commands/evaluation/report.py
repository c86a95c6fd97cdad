"""`cpr-fast report`."""

from __future__ import annotations

from pathlib import Path

import tyro

from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show
from cpr_fast.errors import InputError


def report(runs: tyro.conf.Positional[tuple[Path, ...]], *, out: Path | None = None, json: Json = False) -> None:
    """One self-contained HTML page of one or more run folders.

    Args:
        runs: The run folders.
        out: The page to write; report.html in the first run folder by default.
    """
    from cpr_fast.report.page import write_report

    if not runs:
        raise InputError("runs: expected at least one run folder, got none")
    show({"report": str(write_report(runs, out or runs[0] / "report.html"))}, json)
