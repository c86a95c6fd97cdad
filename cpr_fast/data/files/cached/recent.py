"""The ranges of objects on servers that this process read last, in memory.

A video is opened more than once: to list its packets and to decode it, for its windows in several batches, or to see
whether it differs from the index. FFmpeg itself reads the start of a file again after a table at its end. So a range
that was read a moment ago is not asked for again.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable

MOST_BYTES = 2**26  # in memory: a few videos of ten seconds for every thread that reads
ENTRY_BYTES = 256  # that a range takes besides its own bytes, about
WAIT_S = 60.0  # for bytes that another thread is fetching; then they are asked for here as well

Part = tuple[int, bytes]  # the first byte of a range, and its bytes


class RecentRanges:
    """Ranges of bytes, of which those that were used last leave last; safe to use from any number of threads."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        """`most` is the memory that all ranges may take, in bytes."""
        self._most, self._taken, self._changed = most, 0, threading.Condition()
        self._coming: list[tuple[str, int, int]] = []  # (object, first, last): what threads are fetching
        self._ranges: OrderedDict[tuple[str, int], bytes] = OrderedDict()  # by object and first byte; they are disjoint
        self._starts: dict[str, list[int]] = {}  # by object, in increasing order

    def held(self, name: str, start: int, end: int) -> bytes | None:
        """Returns the bytes [start, end) of an object, or None if not all of them are held."""
        with self._changed:
            parts = self._parts(name, start, end)
        first, last = _missing(parts, start, end)
        return _joined(parts, start, end) if first >= last else None

    def read(self, name: str, start: int, end: int, fetch: Callable[[int, int], bytes]) -> bytes:
        """Returns the bytes [start, end) of an object.

        `fetch` returns the bytes [first, last): it is called once, for the first to the last byte that is not held,
        and what it returns is kept; or not at all, if all are held. A call that lacks bytes which another thread is
        fetching waits for them, for WAIT_S at most. Raises what `fetch` raises.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._is_coming(name, start, end), WAIT_S)
            parts = self._parts(name, start, end)
            first, last = _missing(parts, start, end)
            if first < last:
                self._coming.append((name, first, last))
        if first < last:
            try:
                fetched = fetch(first, last)
                with self._changed:
                    self._keep(name, first, fetched)
            finally:
                with self._changed:
                    self._coming.remove((name, first, last))
                    self._changed.notify_all()
            parts.append((first, fetched))
        return _joined(parts, start, end)

    # ---- with the lock held
    def _is_coming(self, name: str, start: int, end: int) -> bool:
        """Returns whether another thread is fetching a byte of [start, end) that is not held."""
        first, last = _missing(self._parts(name, start, end), start, end)
        return any(name == other and begin < last and first < until for other, begin, until in self._coming)

    def _parts(self, name: str, start: int, end: int) -> list[Part]:
        """Returns the ranges that have a byte of [start, end), in increasing order, as those that were used last."""
        starts = self._starts.get(name, [])
        near = starts[max(0, bisect_right(starts, start) - 1) : bisect_left(starts, end)]
        parts = [(begin, self._ranges[name, begin]) for begin in near]
        parts = [(begin, data) for begin, data in parts if begin + len(data) > start]
        for begin, _ in parts:
            self._ranges.move_to_end((name, begin))
        return parts

    def _keep(self, name: str, start: int, data: bytes) -> None:
        """Adds a range in place of those that have a byte of it, which another thread may have fetched meanwhile."""
        if ENTRY_BYTES + len(data) > self._most:
            return
        for begin, _ in self._parts(name, start, start + len(data)):
            self._remove(name, begin)
        self._ranges[name, start] = data
        insort(self._starts.setdefault(name, []), start)
        self._taken += ENTRY_BYTES + len(data)
        while self._taken > self._most:
            self._remove(*next(iter(self._ranges)))

    def _remove(self, name: str, start: int) -> None:
        self._taken -= ENTRY_BYTES + len(self._ranges.pop((name, start)))
        starts = self._starts[name]
        del starts[bisect_left(starts, start)]
        if not starts:
            del self._starts[name]


def _missing(parts: list[Part], start: int, end: int) -> tuple[int, int]:
    """Returns [first, last), from the first to the last byte of [start, end) that is in none of `parts` (increasing);
    first is not below last if there is none."""
    first, last = start, end
    for begin, data in parts:
        if begin <= first:
            first = max(first, begin + len(data))
    for begin, data in reversed(parts):
        if begin + len(data) >= last:
            last = min(last, begin)
    return first, last


def _joined(parts: list[Part], start: int, end: int) -> bytes:
    """Returns the bytes [start, end), each of which is in one of `parts`; the later part prevails."""
    for begin, data in parts[-1:]:
        if begin <= start and begin + len(data) >= end:
            return data[start - begin : end - begin]
    whole = bytearray(end - start)
    for begin, data in parts:
        first, last = max(start, begin), min(end, begin + len(data))
        whole[first - start : last - start] = data[first - begin : last - begin]
    return bytes(whole)
