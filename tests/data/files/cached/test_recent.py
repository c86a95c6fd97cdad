"""Ranges that are kept in memory: the right bytes, none fetched twice, within the memory, from many threads."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest

from cpr_fast.data.files.cached import recent
from cpr_fast.data.files.cached.recent import ENTRY_BYTES, RecentRanges

OBJECTS = {
    name: np.random.default_rng(seed).integers(0, 256, 2000, np.uint8).tobytes() for seed, name in enumerate("ab")
}


class Server:
    """Hands out the bytes of OBJECTS and notes which it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, int]] = []

    def of(self, name: str):
        def fetch(first: int, last: int) -> bytes:
            assert first < last
            self.asked.append((name, first, last))
            return OBJECTS[name][first:last]

        return fetch


def test_any_ranges_are_the_bytes_of_their_object_and_held_bytes_are_not_fetched():
    draw, server, ranges = random.Random(0), Server(), RecentRanges()
    seen = {name: np.zeros(2000, bool) for name in OBJECTS}
    for _ in range(600):
        name, start = draw.choice("ab"), draw.randrange(2000)
        end = min(2000, start + draw.choice([1, 7, 60, 400]))
        missing = np.flatnonzero(~seen[name][start:end])
        held, before = ranges.held(name, start, end), len(server.asked)
        assert held == (None if len(missing) else OBJECTS[name][start:end])
        assert ranges.read(name, start, end, server.of(name)) == OBJECTS[name][start:end]
        asked = [(name, start + int(missing[0]), start + int(missing[-1]) + 1)] if len(missing) else []
        assert server.asked[before:] == asked
        seen[name][start:end] = True


def test_the_memory_is_bounded_and_what_was_used_last_stays():
    server, ranges = Server(), RecentRanges(3 * (100 + ENTRY_BYTES))
    for start in (0, 100, 200):
        ranges.read("a", start, start + 100, server.of("a"))
    assert ranges.held("a", 0, 50) == OBJECTS["a"][:50]  # used again
    ranges.read("b", 0, 100, server.of("b"))
    assert [ranges.held("a", start, start + 100) is not None for start in (0, 100, 200)] == [True, False, True]
    ranges.read("b", 100, 2000, server.of("b"))  # larger than the memory: returned and not kept
    assert ranges.held("b", 100, 101) is None and ranges.held("b", 0, 100) is not None
    many, few = RecentRanges(10_000), Server()
    for start in range(2000):  # a range of one byte takes more memory than its byte
        many.read("a", start, start + 1, few.of("a"))
    assert sum(many.held("a", start, start + 1) is not None for start in range(2000)) == 10_000 // (ENTRY_BYTES + 1)


def test_threads_that_want_the_same_bytes_fetch_them_once(monkeypatch):
    monkeypatch.setattr(recent, "WAIT_S", 3600.0)
    server, ranges, wrong = Server(), RecentRanges(), []

    def fetch(first: int, last: int) -> bytes:
        time.sleep(0.001)
        return server.of("a")(first, last)

    def read(seed: int) -> None:
        for start in range(0, 2000, 100):
            got = ranges.read("a", start, start + 100, fetch)
            wrong.extend([seed] * (got != OBJECTS["a"][start : start + 100]))

    threads = [threading.Thread(target=read, args=[seed], daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong and sorted(server.asked) == [("a", start, start + 100) for start in range(0, 2000, 100)]


def waiting(ranges: RecentRanges, fetch, begun: threading.Event) -> tuple[threading.Thread, list]:
    """Starts a thread that reads 100 bytes of "a"; returns it, after its fetch has begun, and its outcome."""
    outcome = []

    def read() -> None:
        try:
            outcome.append(ranges.read("a", 0, 100, fetch))
        except OSError as error:
            outcome.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    assert begun.wait(5)
    return thread, outcome


def test_a_fetch_that_fails_is_made_by_the_thread_that_waited_for_it(monkeypatch):
    monkeypatch.setattr(recent, "WAIT_S", 3600.0)
    ranges, server, begun, fail = RecentRanges(), Server(), threading.Event(), threading.Event()

    def fetch(first: int, last: int) -> bytes:
        begun.set()
        assert fail.wait(5)
        raise OSError("cut off")

    thread, outcome = waiting(ranges, fetch, begun)
    threading.Timer(0.05, fail.set).start()
    got = []
    second = threading.Thread(target=lambda: got.append(ranges.read("a", 50, 150, server.of("a"))), daemon=True)
    second.start()
    for each in (thread, second):
        each.join(5)
    assert got == [OBJECTS["a"][50:150]] and server.asked == [("a", 50, 150)] and isinstance(outcome[0], OSError)


def test_a_fetch_that_never_ends_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(recent, "WAIT_S", 0.05)
    ranges, server, begun, end = RecentRanges(), Server(), threading.Event(), threading.Event()

    def fetch(first: int, last: int) -> bytes:
        begun.set()
        end.wait(5)
        return OBJECTS["a"][first:last]

    thread, outcome = waiting(ranges, fetch, begun)
    assert ranges.read("a", 0, 100, server.of("a")) == OBJECTS["a"][:100] and not outcome
    assert ranges.read("a", 200, 300, server.of("a")) == OBJECTS["a"][200:300]  # other bytes are not waited for
    end.set()
    thread.join(5)
    assert outcome == [OBJECTS["a"][:100]] and ranges.held("a", 0, 100) == OBJECTS["a"][:100]


@pytest.mark.parametrize("most", [0, 99])
def test_without_memory_everything_is_fetched(most):
    server, ranges = Server(), RecentRanges(most)
    for _ in range(2):
        assert ranges.read("a", 5, 10, server.of("a")) == OBJECTS["a"][5:10]
    assert len(server.asked) == 2
