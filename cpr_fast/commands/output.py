"""Printing of a command's result: readable tables and lines, or one JSON object with `--json`."""

from __future__ import annotations

import json as json_module
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cpr_fast.data.features.names import is_store
from cpr_fast.wording import counted, printable

PLAIN = str.maketrans("–−·×", "--/x")  # replacements of one character each, so that columns stay aligned


def show(result: dict[str, Any], json: bool, *, next_step: str, lines: Sequence[str] | None = None) -> None:
    """Prints a result on stdout.

    Args:
        result: The result; with `json` only this is printed, as one JSON object.
        json: Whether the user gave `--json`.
        next_step: What a user may want to do next: commands, one in each line, which can be pasted into a shell, or a
            file to open. Every command has one.
        lines: The readable text. Without it, each entry of the result is printed as "name: value".

    Raises:
        TypeError: There are no lines, and a value is a dictionary or a list that holds further ones. Printed, it would
            be Python code instead of text for a reader.
    """
    if json:
        print(json_module.dumps(result))
        return
    if lines is None:
        lines = [f"{name.replace('_', ' ')}: {_text(value)}" for name, value in result.items()]
    first, *further = next_step.split("\n")
    for line in "\n".join([*lines, "", f"next: {first}", *(f"      {line}" for line in further)]).split("\n"):
        print(_encodable(printable(line)))


def _encodable(text: str) -> str:
    """Returns the text in characters that stdout can encode: in ASCII or Latin-1, "-" stands for an en dash."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.translate(PLAIN).encode(encoding, "backslashreplace").decode(encoding)
    return text


def show_once(result: dict[str, Any], json: bool, **text: Any) -> None:
    """Calls `show` in the first of the processes that torchrun started, then ends the process group in all of them."""
    from cpr_fast.runtime import distributed

    if distributed.is_main():
        show(result, json, **text)
    distributed.finish()


def about_unfinished(runs: Iterable[Path | None]) -> list[str]:
    """Returns a note for each run folder whose training has not reached its last epoch; None stands for no run."""
    from cpr_fast.report.run_folder.run import Run
    from cpr_fast.report.run_folder.unfinished import unfinished

    found = [(folder, unfinished(Run(folder))) for folder in runs if folder is not None]
    return [line for folder, text in found if text for line in ("", f"note: {folder}: {text}")]


def after_evaluation(run: Path | None, checkpoint: Sequence[str], index: Path) -> str:
    """Returns the next step after an evaluation: the report of the checkpoint's run; if it has no run, a search or, on
    a store of features, mining."""
    if run is not None:
        return f"cpr-fast report {shlex.quote(str(run))}"
    if is_store(index):
        return f"cpr-fast mine {shlex.quote(str(index))}"
    given = " ".join(map(shlex.quote, checkpoint))
    return f"cpr-fast search VIDEO.mp4 --index {shlex.quote(str(index))} --checkpoint {given}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "") -> str:
    """Returns a table as text: the first column left-aligned, the others right-aligned."""
    cells = [[printable(str(cell)) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first, *others = row
        return "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))])

    head, *body = cells
    rule = "  ".join("-" * width for width in widths)
    return "\n".join(text.rstrip() for text in [*([title] if title else []), line(head), rule, *map(line, body)])


def left_out_of_map(queries: int) -> list[str]:
    """Returns the line that says how many queries mAP leaves out; no line if it leaves out none."""
    left_out = counted(queries, "query", "queries")
    return [f"mAP leaves out {left_out}: the gallery has no video of their class"] if queries else []


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_flat, value)) or "none"
    return str(value)


def _flat(value: Any) -> str:
    if isinstance(value, dict | list | tuple):
        raise TypeError(f"expected lines for a result with nested values, got {type(value).__name__} in one of them")
    return str(value)
