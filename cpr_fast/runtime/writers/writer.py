"""The interface of a writer, and which rows of `metrics.jsonl` a writer gets under which names."""

from __future__ import annotations

import contextlib
import logging
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from cpr_fast.runtime.files import replacing

log = logging.getLogger(__name__)

COUNTERS = {"step": "step", "epoch": "epoch", "health": "epoch", "online": "epoch"}  # of the rows of the training
# What tells the rows of a kind apart; each becomes a part of the names of its numbers.
EVALUATIONS = {
    "retrieval": ("recipe", "name", "view"),
    "same_video": ("recipe", "name", "view"),
    "classification": ("task", "recipe", "view", "split", "seed"),
}


class Writer(Protocol):
    """What a run and its evaluations tell another program. A method may raise any exception; see `Guarded`."""

    def log(self, counter: str, at: int, values: dict[str, float]) -> None:
        """Receives numbers of the training. `counter` is the name of their horizontal axis, such as "epoch/epoch",
        and `at` the place on it."""

    def conclude(self, values: dict[str, Any]) -> None:
        """Receives results of the whole run: numbers, texts and truth values."""

    def close(self, failed: bool) -> None:
        """Ends the connection; `failed` says whether the run ended with an exception."""


class Guarded:
    """A writer whose failures never stop a run: the first one is logged as a warning, and the writer is not used again.

    Args:
        name: of the program, for the warning.
        make: makes the writer; its failure is treated in the same way.
    """

    def __init__(self, name: str, make: Callable[[], Writer]) -> None:
        self.name = name
        self._writer: Writer | None = None
        with self._guard():
            self._writer = make()

    def log(self, counter: str, at: int, values: dict[str, float]) -> None:
        with self._guard():
            if self._writer is not None:
                self._writer.log(counter, at, values)

    def conclude(self, values: dict[str, Any]) -> None:
        with self._guard():
            if self._writer is not None:
                self._writer.conclude(values)

    def close(self, failed: bool) -> None:
        with self._guard():
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.close(failed)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result of a command
                yield
        except Exception as error:  # of another program: a lost connection, a full disk, a missing login
            self._writer = None
            said = " ".join(str(error).split())[:300] or type(error).__name__
            log.warning("Warning: %s gets no more numbers of this run (%s). The run goes on, and metrics.jsonl holds "
                        "all of them", self.name, said)  # fmt: skip


def send(writer: Writer, row: dict[str, Any]) -> None:
    """Gives a row of `metrics.jsonl` to a writer, under the names "<kind>/<key>" and "<kind>/<key>/<key>" of nested
    values; rows that are not numbers of a training or results of the run are left out."""
    kind = row["kind"]
    if (key := COUNTERS.get(kind)) is not None:
        name = f"{kind}/{key}"
        values = {n: float(v) for n, v in _leaves(kind, row) if isinstance(v, int | float) and n != name}
        writer.log(name, row[key], values)
    elif kind == "outcome":
        writer.conclude(dict(_leaves(kind, {key: row[key] for key in ("step", "learnt", "text")})))
    elif kind in EVALUATIONS:
        parts = {key: row[key] for key in EVALUATIONS[kind] if key in row}
        place = "/".join([kind, *(f"{k}-{v}" if isinstance(v, int) else str(v) for k, v in parts.items())])
        values = _leaves(place, {key: value for key, value in row.items() if key not in parts})
        writer.conclude({name: value for name, value in values if isinstance(value, int | float)})


def _leaves(place: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the values of nested dicts with their names, without those that are lists or unknown (None)."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(f"{place}/{key}", value)
        elif value is not None and not isinstance(value, list | tuple):
            yield f"{place}/{key}", value


def run_id(folder: Path, new: str = "", *, resumed: bool) -> str:
    """Returns what a program knows a run by: of a new run `new`, or by default 8 random digits and letters, which is
    then kept in the file `run_id` of `folder`; of a resumed one what is kept there."""
    path = folder / "run_id"
    if resumed and path.is_file() and (found := path.read_text(encoding="utf-8").strip()):
        return found
    new = new or secrets.token_hex(4)
    with replacing(path) as temporary:
        temporary.write_text(new + "\n", encoding="utf-8")
    return new
