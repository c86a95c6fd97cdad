"""The blocks of objects that are on this machine or on their way to it; what the storages of `data.files` ask first."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpr_fast.data.files import tar
from cpr_fast.data.files.cached.store import BLOCK, BlockStore, Key
from cpr_fast.data.files.names import member_of, text_of
from cpr_fast.data.files.remote import REMOTE

MOST_AT_ONCE = 2**22 // BLOCK  # blocks of one request: 4 MiB
ABSENT, COMING, HELD = 0, 1, 2

log = logging.getLogger(__name__)


class Located(NamedTuple):
    """Where the bytes of an object are that the cache counts in blocks: all of it, or a member of a tar file with the
    header before it."""

    file: Path  # the object on the server
    start: int  # of the first byte in it
    size: int  # bytes
    key: Key

    @property
    def blocks(self) -> int:
        """The number of blocks."""
        return -(-self.size // BLOCK)


def locate(path: Path) -> Located:
    """Returns where the bytes of a path on a server are. Raises OSError."""
    member = member_of(path)
    if member is None:
        return Located(path, 0, REMOTE.size(path), Key.of(text_of(path), REMOTE.version(path)))
    start, version = member.start - tar.BLOCK, REMOTE.version(member.file)
    size = min(tar.BLOCK + member.size, max(0, REMOTE.size(member.file) - start))  # of one that is cut off, the rest
    return Located(member.file, start, size, Key.of(text_of(path), version))


class CachedObject:
    """The state of the blocks of one object: `slots` are those of `belady.Item`, and `phase`, uint8 [n], is ABSENT,
    COMING or HELD."""

    def __init__(self, located: Located, slots: np.ndarray) -> None:
        self.located, self.slots = located, slots
        self.phase = np.zeros(located.blocks, np.uint8)


class BlockCache:
    """Hands out the blocks that are held, waits for those that are coming, and fetches those that it is told to.

    `changed` guards all states and announces their changes. `counts` are sums since the start:

        read: bytes handed out; waited: calls of `read` that had to wait for a block that was coming; missed: calls of
        `read` for a known object that found a block neither held nor coming;
        fetched, fetched_unplanned: bytes that came from servers, ahead and when they were read; failed: bytes whose
        fetch ahead failed, which the reader then asks for itself; damaged: blocks that were not as they were written.
    """

    def __init__(self, store: BlockStore) -> None:
        self.store, self.changed, self.counts = store, threading.Condition(), Counter()
        self.stopped = False  # the disk is full or failing, nothing is planned any more, or the loader is closed
        self._objects: dict[str, CachedObject] = {}  # by path

    def count(self, **numbers: int) -> None:
        """Adds to the counts."""
        with self.changed:
            self.counts.update(numbers)

    def knows(self, path: Path) -> bool:
        """Returns whether the blocks of a path are being fetched ahead."""
        return str(path) in self._objects

    def read(self, path: Path, start: int, length: int) -> bytes | None:
        """Returns `length` bytes from `start` on, counted as in `Located`, or None if they are not all held. Waits for
        those that are coming."""
        known = self._objects.get(str(path))
        if known is None or self.stopped or length <= 0 or start + length > known.located.size:
            return None
        blocks = range(start // BLOCK, -(-(start + length) // BLOCK))
        phase = known.phase[blocks.start : blocks.stop]
        with self.changed:
            if (phase == COMING).any():
                self.counts["waited"] += 1
                self.changed.wait_for(lambda: self.stopped or not (phase == COMING).any())
            slots = known.slots[blocks.start : blocks.stop].tolist()
            if self.stopped or not (phase == HELD).all() or min(slots) < 0:
                self.counts["missed"] += 1
                return None
        parts = []
        for block, slot in zip(blocks, slots, strict=True):
            data = self.store.read(slot, known.located.key, block)
            if data is None:
                self._damaged(path, known, block, slot)
                return None
            parts.append(data)
        begin = start - blocks.start * BLOCK
        self.count(read=length)
        return b"".join(parts)[begin : begin + length]

    def _damaged(self, path: Path, known: CachedObject, block: int, slot: int) -> None:
        with self.changed:
            if known.slots[block] != slot or known.phase[block] != HELD:
                return  # it left the cache meanwhile
            known.phase[block] = ABSENT
            self.counts["damaged"] += 1
            if self.counts["damaged"] > 1:
                return
        log.warning(
            "a block of %s in %s is not as it was written; it is fetched again", text_of(path), self.store.folder
        )

    def place(self, path: Path, located: Located, slots: np.ndarray) -> CachedObject:
        """Returns the state of an object whose blocks are in `slots`. Call it with `changed` held.

        It is a new one, in which no block is held, if the object has another version now or its slots are others: all
        blocks had left, or the index lists the path twice.
        """
        known = self._objects.get(str(path))
        if known is None or known.located != located or known.slots is not slots:
            known = self._objects[str(path)] = CachedObject(located, slots)
        return known

    def leave(self, path: Path, block: int) -> None:
        """Notes that a block is no longer held, after it has come if it was coming. Call it with `changed` held."""
        if (known := self._objects.get(str(path))) is not None and block < len(known.phase):
            self.changed.wait_for(lambda: self.stopped or known.phase[block] != COMING)
            known.phase[block] = ABSENT

    def fetch(self, known: CachedObject, blocks: Sequence[int], slots: Sequence[int]) -> None:
        """Fetches consecutive blocks that are COMING into `slots`. It raises no OSError: blocks that do not come are
        read, and the failure named, when they are needed."""
        located, came = known.located, 0
        first, end = blocks[0] * BLOCK, min((blocks[-1] + 1) * BLOCK, located.size)
        try:
            if self.stopped:
                return
            data = REMOTE.fetch_range(located.file, located.start + first, end - first)
            self.count(fetched=len(data))
            for block, slot in zip(blocks, slots, strict=True):
                part = data[block * BLOCK - first : (block + 1) * BLOCK - first]
                try:
                    self.store.write(slot, located.key, block, part)
                except OSError as error:
                    self.stop(error)
                    return
                came += 1
        except OSError:
            self.count(failed=end - first)
        finally:
            with self.changed:
                known.phase[blocks[0] : blocks[0] + came] = HELD
                known.phase[blocks[0] + came : blocks[-1] + 1] = ABSENT
                self.changed.notify_all()

    def stop(self, error: OSError) -> None:
        """Ends the use of the disk: from now on everything is read from the servers."""
        with self.changed:
            if self.stopped:
                return
            self.stopped = True
            self.changed.notify_all()
        reason = error.strerror or str(error)
        log.warning(
            "data.disk_cache: could not write to %s: %s; the run goes on without it and reads from the servers",
            self.store.folder, reason,
        )  # fmt: skip
