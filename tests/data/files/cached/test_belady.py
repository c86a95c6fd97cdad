"""Which blocks leave a full cache: the same as in a plain simulation, and never more fetches than the optimum needs."""

from __future__ import annotations

import functools
from collections import OrderedDict

import numpy as np
import pytest

from cpr_fast.data.files.cached.belady import NEVER, NO_SLOT, Belady


def lru_fetches(trace: list[tuple], slots: int) -> int:
    held, fetches = OrderedDict(), 0
    for page in trace:
        fetches += page not in held
        held[page] = None
        held.move_to_end(page)
        if len(held) > slots:
            held.popitem(last=False)
    return fetches


def least_fetches(trace: list[tuple], slots: int) -> int:
    """Returns the least number of fetches, by trying every choice."""

    @functools.cache
    def rest(place: int, held: frozenset) -> int:
        if place == len(trace):
            return 0
        if trace[place] in held:
            return rest(place + 1, held)
        if len(held) < slots:
            return 1 + rest(place + 1, held | {trace[place]})
        return 1 + min(rest(place + 1, held - {page} | {trace[place]}) for page in held)

    return rest(0, frozenset())


def fetches(trace: list[tuple[int, int]], slots: int, sizes: dict[int, int]) -> int:
    """Returns how many blocks `Belady` fetches for a trace of blocks (item, block), each done before the next."""
    cache, count = Belady(slots), 0
    for step, (item, block) in enumerate(trace):
        taken = cache.take(item, sizes[item], np.array([block]))
        count += len(taken.fetched)
        assert taken.pinned.tolist() == [block]
        cache.release(item, taken.pinned)
        uses = np.full(sizes[item], NEVER)
        for later in range(len(trace) - 1, step, -1):
            if trace[later][0] == item:
                uses[trace[later][1]] = later
        cache.rank(item, uses)
        slots_in_use = [s for own in cache.items.values() for s in own.slots.tolist() if s != NO_SLOT]
        assert len(set(slots_in_use)) == len(slots_in_use) <= slots and max(slots_in_use) < slots
    return count


@pytest.mark.parametrize("seed", range(6))
def test_no_choice_needs_fewer_fetches(seed):
    draw = np.random.default_rng(seed)
    sizes, slots = {0: 2, 1: 1, 5: 3}, int(draw.integers(1, 5))
    pages = [(item, block) for item, size in sizes.items() for block in range(size)]
    trace = [pages[i] for i in draw.integers(0, len(pages), 16)]
    count = fetches(trace, slots, sizes)
    assert count == least_fetches(trace, slots) <= lru_fetches(trace, slots)


class Plain:
    """The rules of `Belady` in the simplest form: sets, and a look at every later access."""

    def __init__(self, accesses: list[tuple[int, list[int]]], slots: int, window: int) -> None:
        self.accesses, self.slots, self.window = accesses, slots, window

    def fetched(self) -> list[list[int]]:
        held, out = set(), []
        for step, (item, blocks) in enumerate(self.accesses):
            planned = self.accesses[max(0, step - self.window) : step + 1]
            wanted = [block for block in blocks if (item, block) not in held]
            pinned = {(i, b) for i, bs in planned for b in bs}
            new = []
            for block in wanted:
                if len(held) == self.slots:
                    free = [page for page in held if page not in pinned]
                    if not free:
                        break
                    held.remove(min(free, key=lambda page: (-self.next_use(page, step), page[0], -page[1])))
                held.add((item, block))
                new.append(block)
            out.append(new)
        return out

    def next_use(self, page: tuple[int, int], step: int) -> int:
        following = (s for s in range(step + 1, len(self.accesses)) if page[0] == self.accesses[s][0])
        return next((s for s in following if page[1] in self.accesses[s][1]), NEVER)


@pytest.mark.parametrize(("seed", "slots", "window"), [(0, 7, 0), (1, 13, 2), (2, 40, 3), (3, 5, 4), (4, 1, 0)])
def test_blocks_of_planned_accesses_stay_and_the_one_needed_last_leaves(seed, slots, window):
    draw = np.random.default_rng(seed)
    sizes = {item: int(draw.integers(1, 9)) for item in range(11)}
    order = [item for _ in range(7) for item in draw.permutation(11).tolist()]
    accesses = [(item, np.flatnonzero(draw.random(sizes[item]) < 0.6).tolist() or [0]) for item in order]
    plain = Plain(accesses, slots, window)
    cache, pinned, out = Belady(slots), {}, []
    for step, (item, blocks) in enumerate(accesses):
        if (done := step - window - 1) >= 0:
            old = accesses[done][0]
            cache.release(old, pinned.pop(done))
            cache.rank(old, np.array([plain.next_use((old, b), step - 1) for b in range(sizes[old])]))
        taken = cache.take(item, sizes[item], np.array(blocks))
        pinned[step] = taken.pinned
        out.append(taken.fetched.tolist())
        assert {b for b in blocks if cache.items.get(item) and cache.items[item].slots[b] >= 0} == set(taken.pinned)
    assert out == plain.fetched()
    assert sum(map(len, out)) > slots  # blocks had to leave


def test_blocks_of_an_earlier_process_are_used_and_leave_first_where_no_use_is_known():
    cache = Belady(4)
    cache.adopt({7: {2: 3}, 1: {0: 0, 1: 2}})
    assert cache.take(7, 6, np.array([2, 5])).fetched.tolist() == [5]  # the item has more blocks than were held
    assert cache.items[7].slots.tolist() == [-1, -1, 3, -1, -1, 1]
    assert cache.take(9, 1, np.array([0])).evicted == [(1, 1)]
    cache.drop(1)
    assert 1 not in cache.items
    assert cache.take(8, 3, np.arange(3)).fetched.tolist() == [0]  # planned accesses need the other three
    cache.drop(7)
    assert cache.items[7].slots.tolist() == [-1, -1, 3, -1, -1, 1]  # planned accesses need both
