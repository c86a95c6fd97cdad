"""Progress of long commands, on stderr: a bar on a terminal, plain lines every half minute elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

LINE_INTERVAL_S = 30.0  # between plain lines
FIRST_LINE_S = 5.0  # before the first plain line, which shows that the command runs and how long it will take


def track(
    items: Iterable[Item],
    description: str,
    *,
    total: int,
    unit: str,
    progress: bool = True,
    status: Callable[[], str] | None = None,
) -> Iterator[Item]:
    """Yields `items` unchanged and reports count, rate and time left on stderr.

    Args:
        items: What to iterate over.
        description: Text at the start of the bar or line that says what is being done.
        total: Number of items.
        unit: Plural name of the items, such as "videos".
        progress: Whether to report at all.
        status: Called when the report is drawn; returns text for its end, such as the current loss.
    """
    if not progress:
        yield from items
    elif sys.stderr.isatty():
        yield from _bar(items, description, total, unit, status)
    else:
        yield from _lines(items, description, total, unit, status)


def duration(seconds: float) -> str:
    """Returns a duration in human-readable form: "45 s", "3 min 20 s", "2 h 05 min", "3 d 4 h"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _bar(
    items: Iterable[Item], description: str, total: int, unit: str, status: Callable[[], str] | None
) -> Iterator[Item]:
    # importing rich takes .1 s, which would delay short commands such as --help
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, rate="", status="")
        for item in items:
            yield item
            speed = bar.tasks[0].finished_speed or bar.tasks[0].speed
            rate = "" if speed is None else f"{speed:.1f} {unit}/s"
            bar.update(task, advance=1, rate=rate, status=status() if status else "")


def _lines(
    items: Iterable[Item], description: str, total: int, unit: str, status: Callable[[], str] | None
) -> Iterator[Item]:
    began = time.monotonic()
    due, done = began + FIRST_LINE_S, 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now >= due and done < total:
            due = now + LINE_INTERVAL_S
            left = duration((now - began) / done * (total - done))
            _print_line(description, done, total, unit, now - began, f"{left} left", status)
    _print_line(description, done, total, unit, time.monotonic() - began, None, status)


def _print_line(
    description: str,
    done: int,
    total: int,
    unit: str,
    elapsed_s: float,
    left: str | None,
    status: Callable[[], str] | None,
) -> None:
    rate = f"{done / elapsed_s:.1f} {unit}/s" if elapsed_s > 0 else ""
    parts = [f"{description}: {done}/{total} {unit}", rate, left or f"done in {duration(elapsed_s)}"]
    text = status() if status else ""
    print(", ".join(filter(None, [*parts, text])), file=sys.stderr, flush=True)
