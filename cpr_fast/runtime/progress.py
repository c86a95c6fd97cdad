"""Progress of long commands, on stderr: a bar on a terminal, plain lines every half minute elsewhere.

One rule for every time that is not yet measured to its end: it is said before the work where a part of the work can be
timed, is updated from the pace of the work itself, and is rounded as people say it (`about`). What has passed is
measured, and is printed by `duration`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any, TextIO, TypeVar

from cpr_fast.runtime.busy import OtherPrograms
from cpr_fast.runtime.files import discard

Item, Result = TypeVar("Item"), TypeVar("Result")

LINE_INTERVAL_S = 30.0  # time between two plain lines
FIRST_LINE_S = 5.0  # time before the first plain line, which shows that the command runs and how long it will take
FIRST_ITEMS = 3  # number of items before the first plain line, because a single one does not show the pace
BEAT_S = 1.0  # how often the thread checks whether a line is due while a single item takes long
FEW_S = 10.0  # a shorter time is printed as "a few seconds"
# An estimate below the first number of seconds is rounded to a multiple of the second.
_ROUNDED_TO = ((60, 5), (300, 10), (3600, 60), (36_000, 600), (172_800, 3600))


def track(
    items: Iterable[Item],
    description: str,
    *,
    total: int,
    unit: str,
    progress: bool = True,
    status: Callable[[], str] | None = None,
    left: Callable[[], str] | None = None,
    done: Callable[[], int] | None = None,
) -> Iterator[Item]:
    """Yields `items` unchanged and reports count, rate and time left on stderr.

    Args:
        items: What to iterate over.
        description: Text at the start of the bar or line that says what is being done.
        total: Number of items.
        unit: Plural name of the items, such as "videos".
        progress: Whether to report at all.
        status: Called when the report is drawn; returns text for its end, such as the current loss.
        left: Called when the report is drawn; returns the text about the time left, or "". By default the time is
            estimated from the items so far, which suits items of about the same cost.
        done: Called when the report is drawn; returns how many items are finished, for threads that finish items before
            they are yielded. By default an item is finished when the next one is asked for.
    """
    if not progress:
        yield from items
        return
    report = _Report(description, total, unit, status, left, done, Forecast(total), OtherPrograms())
    yield from (_bar if sys.stderr.isatty() else _lines)(items, report)


def as_finished(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yields function(item) of every item, computed by `workers` threads, as soon as it is finished: a slow item does
    not delay the results of those after it. If the iteration is stopped, items that have not begun are left out."""
    with ThreadPoolExecutor(workers) as pool:
        futures: list[Future[Result]] = []
        try:
            futures.extend(pool.submit(function, item) for item in items)
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()


class CurrentStderr(logging.StreamHandler):
    """Logs to what `sys.stderr` is at that moment: while a bar is drawn, that is a stream that prints above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        """`sys.stderr`."""
        return sys.stderr


def first_process() -> bool:
    """Returns whether this is the first of the processes that torchrun started, without importing torch."""
    return os.environ.get("RANK", "0") == "0"


def announce(text: str, *, end: str = " ...") -> None:
    """Prints at once, on stderr, what a command does now, before a silence of more than about two seconds.

    Of the processes that torchrun started only the first one prints.
    """
    if first_process():
        _print(f"{text}{end}")


def announce_others(others: OtherPrograms) -> None:
    """Prints beside an expected time, at most once in a process, that other programs make it longer, if there are
    any."""
    if said := others.news():
        announce(said, end="")


def _print(text: str) -> None:
    """Prints a line on stderr. If its reader has gone, as `head` has in `2>&1 | head`, the command is asked to stop as
    if its terminal was closed: a run then saves its state, where an error would lose it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except BrokenPipeError:
        if signal.getsignal(signal.SIGHUP) in (signal.SIG_DFL, None):  # nobody would notice the request
            raise
        discard(sys.stderr.fileno())
        os.kill(os.getpid(), signal.SIGHUP)


class Forecast:
    """The time left of some work, from the pace so far.

    The first part of the work also starts threads and fills buffers; it is not counted once there is a second one.
    """

    def __init__(self, total: float) -> None:
        """`total` is the amount of work, in any unit."""
        self._total, self._done, self._first = total, 0.0, 0.0
        self._began = self._first_at = self._last_at = time.monotonic()

    def add(self, amount: float = 1.0) -> None:
        """Records that this amount of the work is finished now."""
        self._last_at = time.monotonic()
        if not self._done:
            self._first, self._first_at = amount, self._last_at
        self._done += amount

    @property
    def done(self) -> float:
        """The amount of work that is finished."""
        return self._done

    def expect(self, amount: float) -> None:
        """Changes the amount of work by `amount`, which is negative if some of it need not be done."""
        self._total += amount

    def left_s(self) -> float | None:
        """Returns the seconds that the rest takes, or None before any work is finished."""
        if not self._done:
            return None
        later = self._done - self._first
        pace = (self._last_at - self._first_at) / later if later else (self._last_at - self._began) / self._done
        return max(0.0, self._total - self._done) * pace

    def text(self, suffix: str = "left") -> str:
        """Returns "about 5 min left", or "" where nothing is left or nothing is known."""
        left = self.left_s()
        return f"{about(left)} {suffix}" if left else ""


@dataclass(frozen=True)
class Part:
    """A part of the work of a command, in which the time left of the whole command is shown.

    Attributes:
        whole: The forecast of the whole, or None if the part is all there is, so that `track` makes its own.
        weight: How much a unit of this part counts in the whole.
    """

    whole: Forecast | None = None
    weight: float = 1.0

    def add(self, amount: float) -> None:
        """Records that this amount of the part is finished now."""
        if self.whole is not None:
            self.whole.add(self.weight * amount)

    def done(self, item: Item, amount: float) -> Item:
        """Records that `item` is finished, which is this amount of the part, and returns it."""
        self.add(amount)
        return item

    def expect(self, amount: float) -> None:
        """Changes the amount of the part by `amount`."""
        if self.whole is not None:
            self.whole.expect(self.weight * amount)

    @property
    def left(self) -> Callable[[], str] | None:
        """What `track` calls for the time left."""
        return None if self.whole is None else partial(self.whole.text, "left in all")


WHOLE = Part()  # work that is no part of a larger one


def about(seconds: float) -> str:
    """Returns an estimated duration as people say it: "a few seconds", "about 25 s", "about 1 h 20 min"."""
    return "a few seconds" if seconds < FEW_S else f"about {rounded(seconds)}"


def rounded(seconds: float) -> str:
    """Returns an estimated duration of at least some seconds, rounded: "25 s", "1 min 40 s", "3 h 20 min", "3 d"."""
    for below, step in _ROUNDED_TO:
        if (whole := round(seconds / step) * step) < below:
            break
    else:
        days = round(seconds / 86_400)
        return f"{days:,} d"
    text = duration(whole)
    return text.removesuffix(" 00 s").removesuffix(" 00 min")


def duration(seconds: float) -> str:
    """Returns a measured duration in human-readable form: "45 s", "3 min 20 s", "2 h 05 min", "3 d 4 h"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


@dataclass(frozen=True)
class _Report:
    """What the bar and the lines show; see `track`."""

    description: str
    total: int
    unit: str
    status: Callable[[], str] | None
    own_left: Callable[[], str] | None
    own_done: Callable[[], int] | None
    forecast: Forecast  # of the items that were yielded
    others: OtherPrograms

    @property
    def least(self) -> int:
        """Number of items after which the first line is due."""
        return FIRST_ITEMS if self.own_left is None else 1

    def done(self) -> int:
        return self.own_done() if self.own_done else int(self.forecast.done)

    def left(self) -> str:
        return (self.own_left or self.forecast.text)()

    def tell_of_others(self) -> None:
        """Says that other programs make the time left longer, if there are any and a time is shown."""
        if self.left():
            announce_others(self.others)

    def pace(self, rate: float) -> str:
        """Returns "3.2 videos/s", "4.8 videos/min" or "2.5 videos/h"; "" where nothing is known."""
        if not rate:
            return ""
        seconds, name = next((t for t in ((1, "s"), (60, "min")) if rate * t[0] >= 1), (3600, "h"))
        return f"{rate * seconds:.1f} {self.unit}/{name}"

    def print_line(self, elapsed_s: float, *, end: bool = False) -> None:
        done = self.done()
        told = self.told(done, elapsed_s, end=end, status=self.status() if self.status else "")
        _print(f"{self.description}: {done}/{self.total} {self.unit}" + (f", {told}" if told else ""))

    def told(self, done: int, elapsed_s: float, *, status: str, end: bool = False) -> str:
        """Returns the pace, the time left and the status, as far as they are known."""
        parts = [self.pace(done / elapsed_s if elapsed_s > 0 else 0.0), f"done in {duration(elapsed_s)}" if end else "",
                 self.left(), status]  # fmt: skip
        return ", ".join(filter(None, parts))


def _bar(items: Iterable[Item], report: _Report) -> Iterator[Item]:
    # importing rich takes .1 s, which would delay short commands such as --help
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.text import Text

    class TwoLines(Progress):
        """The bar and, on a line of its own, what would not fit beside it into 80 columns. It is drawn several times a
        second: pace and time left are those of that moment, also while a single item takes long."""

        def get_renderables(self) -> Iterator[Any]:
            for task in self.tasks:
                task.completed = report.done()
            yield self.make_tasks_table(self.tasks)
            for task in self.tasks:
                elapsed_s = time.monotonic() - began
                told = report.told(int(task.completed), elapsed_s, status=task.fields["status"])
                yield from [Text(f"  {told}")] if told else []

    began = time.monotonic()
    due = began + FIRST_LINE_S  # not after every item, because other programs are counted from a file
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
    with TwoLines(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(report.description, total=report.total, status="")
        for item in items:
            yield item
            report.forecast.add()
            if (now := time.monotonic()) > due:
                report.tell_of_others()
                due = now + LINE_INTERVAL_S
            bar.update(task, status=report.status() if report.status else "")


def _lines(items: Iterable[Item], report: _Report) -> Iterator[Item]:
    lines = _Lines(report)
    ended = threading.Event()
    beat = threading.Thread(target=lines.beat, args=(ended,), daemon=True)
    beat.start()
    try:
        for item in items:
            yield item
            lines.add()
    finally:
        ended.set()
        beat.join()
    lines.print(end=True)


class _Lines:
    """Prints plain lines: after items where one is due, and from a thread while a single item takes long."""

    def __init__(self, report: _Report) -> None:
        self._report, self._lock = report, threading.Lock()
        self._began = time.monotonic()
        self._due = self._began + FIRST_LINE_S
        self._silent_until = self._due

    def add(self) -> None:
        """Counts an item that was yielded, and prints a line if one is due."""
        with self._lock:
            self._report.forecast.add()
            now, done = time.monotonic(), self._report.done()
            waited = done >= self._report.least or now >= self._due + LINE_INTERVAL_S
            if now >= self._due and waited and done < self._report.total:
                self._due = now + LINE_INTERVAL_S
                self._print(now)

    def beat(self, ended: threading.Event) -> None:
        """Prints a line whenever none was printed for long, until the end; first after `FIRST_LINE_S` without an
        item."""
        while not ended.wait(BEAT_S):
            with self._lock:
                now, done = time.monotonic(), self._report.done()
                first = self._silent_until == self._began + FIRST_LINE_S
                if now >= self._silent_until and (not first or not done or self._report.own_done):
                    self._due = now + LINE_INTERVAL_S if done else self._due
                    self._print(now)

    def print(self, *, end: bool) -> None:
        """Prints the last line."""
        self._print(time.monotonic(), end=end)

    def _print(self, now: float, *, end: bool = False) -> None:
        self._silent_until = now + LINE_INTERVAL_S + FIRST_LINE_S  # the lines between items have precedence
        self._report.print_line(now - self._began, end=end)
        if not end:
            self._report.tell_of_others()
