"""Which blocks a cache of a fixed number of slots holds, given when each will be needed next.

The block that is needed last leaves first (Belady, "A study of replacement algorithms for a virtual-storage computer",
IBM Systems Journal 5(2), 1966): no other choice needs fewer fetches. Blocks of accesses that are planned but not yet
done stay, which is what fetching ahead costs (Cao, Felten, Karlin and Li, "A study of integrated prefetching and
caching strategies", SIGMETRICS 1995: never drop a block for one that is needed later).

Nothing here reads a file or a clock, so the decisions are a function of the calls.

Letters: n blocks of an item (one object, or one member of a tar file).
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np

NEVER = np.iinfo(np.int64).max  # no use is known
NO_SLOT = -1


class Item:
    """What is held of an object.

    Attributes:
        slots: int32 [n], the slot of each block, or NO_SLOT.
        next: int64 [n], the step in which each block is needed next, counted from the accesses that are planned.
        pins: int32 [n], the number of planned accesses that need the block and are not done.
    """

    def __init__(self, blocks: int) -> None:
        self.slots = np.full(blocks, NO_SLOT, np.int32)
        self.next = np.full(blocks, NEVER, np.int64)
        self.pins = np.zeros(blocks, np.int32)

    @property
    def present(self) -> np.ndarray:
        """Whether each block is in a slot, bool [n]."""
        return self.slots != NO_SLOT

    @property
    def may_leave(self) -> np.ndarray:
        """Whether each block is in a slot and no planned access needs it, bool [n]."""
        return self.present & (self.pins == 0)

    def grow(self, blocks: int) -> None:
        """Makes room for `blocks` blocks: of those that an earlier process left, the last one need not be held."""
        if (more := blocks - len(self.slots)) > 0:
            self.slots = np.append(self.slots, np.full(more, NO_SLOT, np.int32))
            self.next = np.append(self.next, np.full(more, NEVER, np.int64))
            self.pins = np.append(self.pins, np.zeros(more, np.int32))


class Taken(NamedTuple):
    """What an access takes.

    Attributes:
        pinned: int64, the blocks that it has, held already or to be fetched.
        fetched: int64, those of them that have to be fetched.
        evicted: (item, block) of the blocks whose slots they get.
    """

    pinned: np.ndarray
    fetched: np.ndarray
    evicted: list[tuple[int, int]]


class Belady:
    """The blocks in the slots of a cache."""

    def __init__(self, slots: int) -> None:
        self._free = np.arange(slots - 1, -1, -1, dtype=np.int32)  # a stack, whose first `_left` entries are free
        self._left = slots
        self.items: dict[int, Item] = {}  # of which at least one block is held
        self._heap: list[tuple[int, int]] = []  # (-next, item); an entry may be out of date

    def adopt(self, held: dict[int, dict[int, int]]) -> None:
        """Takes over blocks that are in slots already, {item: {block: slot}}, before the first access. They are NEVER
        needed until `rank` says otherwise."""
        taken = np.zeros(len(self._free), bool)
        for item, slots in held.items():
            own = self.items[item] = Item(max(slots) + 1)
            own.slots[list(slots)] = list(slots.values())
            taken[list(slots.values())] = True
            heapq.heappush(self._heap, (-NEVER, item))
        free = np.flatnonzero(~taken)[::-1]
        self._free[: len(free)], self._left = free, len(free)

    def take(self, item: int, count: int, blocks: np.ndarray) -> Taken:
        """Plans an access to some `blocks` (int64, increasing) of the `count` blocks of an item: they stay until
        `release`.

        Blocks for which there is no slot, because planned accesses need all of them, are left out of `pinned`.
        """
        own = self.items.setdefault(item, Item(count))
        own.grow(count)
        held = own.present[blocks]
        own.pins[blocks[held]] += 1
        fetched, evicted = [], []
        for block in blocks[~held].tolist():
            slot = self._slot(evicted)
            if slot == NO_SLOT:
                break
            own.slots[block], own.pins[block] = slot, 1
            fetched.append(block)
        self.items[item] = own  # making room may have removed it
        if not own.present.any():
            del self.items[item]
        new = np.array(fetched, np.int64)
        return Taken(np.union1d(blocks[held], new), new, evicted)

    def release(self, item: int, pinned: np.ndarray) -> None:
        """Ends an access, given the blocks that `take` pinned. `rank` has to follow."""
        if len(pinned):
            self.items[item].pins[pinned] -= 1

    def rank(self, item: int, uses: np.ndarray) -> None:
        """States in which step each block of an item is needed next, int64 [n]."""
        if (own := self.items.get(item)) is None:
            return
        own.next[:] = uses
        for entry in _entries(item, own):
            heapq.heappush(self._heap, entry)
        if len(self._heap) > 64 + 8 * len(self.items):  # without those that are out of date
            self._heap = sorted(entry for held in self.items.items() for entry in _entries(*held))

    def drop(self, item: int) -> None:
        """Forgets the blocks of an item that no planned access needs; another version of it may follow."""
        if (own := self.items.get(item)) is None:
            return
        for block in np.flatnonzero(own.may_leave).tolist():
            self._put(own, block)
        if not own.present.any():
            del self.items[item]

    def _slot(self, evicted: list[tuple[int, int]]) -> int:
        """Returns a free slot, or that of the block that is needed last, which is added to `evicted`; NO_SLOT if
        planned accesses need all blocks."""
        while not self._left:
            if not self._heap:
                return NO_SLOT
            use, item = self._heap[0]
            own = self.items.get(item)
            block = None if own is None else _last(own, -use)
            if block is None:
                heapq.heappop(self._heap)
                continue
            self._put(own, block)
            evicted.append((item, block))
            if not own.present.any():  # so no planned access needs one either
                del self.items[item]
        self._left -= 1
        return int(self._free[self._left])

    def _put(self, own: Item, block: int) -> None:
        self._free[self._left] = own.slots[block]
        self._left += 1
        own.slots[block] = NO_SLOT


def _entries(item: int, own: Item) -> list[tuple[int, int]]:
    """Returns the entries of the heap for an item: one for each step in which blocks that may leave are needed next."""
    return [(-use, item) for use in np.unique(own.next[own.may_leave]).tolist()]


def _last(own: Item, use: int) -> int | None:
    """Returns the last block that is needed next in step `use` and by no planned access, or None."""
    found = np.flatnonzero((own.next == use) & own.may_leave)
    return int(found[-1]) if len(found) else None
