"""Fetches the bytes of the coming steps, and keeps those of earlier ones that are needed again soonest.

    Future (which clips) -> Extents (which bytes) -> Belady (which blocks stay) -> BlockCache (fetched into slots)

What is decided for a step depends only on the plan and on what was learnt of the files in steps that are complete,
never on how fast threads are: a step is planned when the reader comes within AHEAD steps of it, as if the reader were
exactly there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future as Result
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from cpr_fast.data.clips.ahead.future import Future, Read
from cpr_fast.data.files import tar
from cpr_fast.data.files.cached.belady import NEVER, Belady
from cpr_fast.data.files.cached.cache import ABSENT, COMING, HELD, MOST_AT_ONCE, BlockCache, Located, locate
from cpr_fast.data.files.cached.store import BLOCK, BlockStore, object_key
from cpr_fast.data.files.names import member_of, text_of
from cpr_fast.data.files.remote import REMOTE
from cpr_fast.data.video.reads.extents import EXTENTS, Extents
from cpr_fast.wording import counted

AHEAD = 4  # steps that are fetched before they are read
IN_FLIGHT = 16  # requests at a time
RANKED_AT_ONCE = 4096  # videos whose later reads are planned at the same time

Jobs = TypeVar("Jobs")

log = logging.getLogger(__name__)


class _Access(NamedTuple):
    """A read that was planned, and the blocks that stay for it."""

    read: Read
    pinned: np.ndarray


class Prefetch:
    """The disk cache of one loader. While it is open, `data.files` reads through it."""

    def __init__(self, future: Future, folder: Path, gib: float, *, depth: int, whole: bool) -> None:
        """`depth` is how many steps the loader reads at the same time, besides the one that it hands out; with `whole`
        it reads all bytes of a file. Raises InputError if nothing can be written to `folder`."""
        self._future, self._depth, self._whole = future, depth, whole
        self.cache = BlockCache(BlockStore(folder, max(1, int(gib * 2**30) // BLOCK)))
        slots = len(self.cache.store.records)
        self._belady = Belady(slots)
        self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="cpr-fast-fetch")
        self._lookups: dict[int, list[tuple[Read, Path, Result[Located]]]] = {}  # by step
        self._planned: dict[int, list[_Access]] = {}  # by step, of steps that are not complete
        # By path: what earlier loaders learnt, and what was learnt in steps that are complete.
        self._extents: dict[str, Extents] = {} if whole else dict(EXTENTS)
        self._earlier = self._found_earlier()  # item -> the key of the version that an earlier process stored
        self._reached = self._next = -1  # the step that the loader asked for last, and the one that is planned next
        self._epoch = -1  # the epoch that was planned last; -1: none since the start
        self._stopping, self._closed = False, False  # the thread that plans, and all of it
        self._thread, self._error = None, None
        REMOTE.cache = self.cache

    def following(self, steps: Iterable[Jobs], first: int) -> Iterator[Jobs]:
        """Yields the jobs of consecutive steps from step `first` on, each after its bytes were asked for. Raises what
        failed while a step was planned."""
        for step, jobs in enumerate(steps, first):
            self._reach(step)
            yield jobs

    def close(self) -> None:
        """Ends the threads, and the use of the cache. Further calls have no effect."""
        if not self._closed:
            self._closed = True
            self._stop()
            with self.cache.changed:  # whoever waits for bytes reads them from the servers
                self.cache.stopped = True
                self.cache.changed.notify_all()
            self._pool.shutdown(wait=True, cancel_futures=True)
            if REMOTE.cache is self.cache:
                REMOTE.cache = None
            self.cache.store.close()
            log.info("disk cache %s: %s", self.cache.store.folder, self.summary())

    def summary(self) -> str:
        """Returns what the cache did, in one line."""
        mib = {name: self.cache.counts[name] / 2**20 for name in ("read", "fetched", "fetched_unplanned")}
        return (
            f"{mib['read']:,.1f} MiB read from it, {mib['fetched']:,.1f} MiB fetched ahead, "
            f"{mib['fetched_unplanned']:,.1f} MiB fetched when they were read; "
            f"{self.cache.counts['waited']:,} reads waited for bytes on their way"
        )

    # ---- the thread that plans
    def _reach(self, step: int) -> None:
        changed = self.cache.changed
        if self._closed:  # while an epoch is read: its last steps are read without the cache
            return
        if self._thread is None or step != self._reached + 1:
            self._restart(step)
        with changed:
            self._reached = step
            changed.notify_all()
            changed.wait_for(lambda: self._next > step or self._stopping or self.cache.stopped or self._error)
        if self._error is not None:
            raise self._error

    def _restart(self, step: int) -> None:
        """Begins at a step that does not follow the last one; blocks that are held stay."""
        self._stop()
        self._complete(max(self._planned, default=-1), step)
        self._lookups.clear()
        self._stopping, self._reached, self._next, self._epoch = False, step - 1, step, -1
        self._thread = threading.Thread(target=self._work, name="cpr-fast-plan", daemon=True)
        self._thread.start()

    def _stop(self) -> None:
        with self.cache.changed:
            self._stopping = True
            self.cache.changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        changed = self.cache.changed
        while True:
            with changed:
                changed.wait_for(lambda: self._stopping or self.cache.stopped or self._next <= self._reached + AHEAD)
                if self._stopping or self.cache.stopped:
                    changed.notify_all()
                    return
            try:
                self._plan(self._next)
            except Exception as error:  # raised again where the loader waits
                with changed:
                    self._error = error
                    self.cache.stopped = True  # whoever waits for bytes that were planned reads them from the servers
                    changed.notify_all()
                return
            with changed:
                self._next += 1
                changed.notify_all()

    def _plan(self, step: int) -> None:
        for later in (step, step + 1):
            self._look_up(later)
        self._complete(step - AHEAD - self._depth - 1, step)
        if step // self._future.steps != self._epoch:
            self._rank_again(step)
            self._epoch = step // self._future.steps
        accesses = self._planned[step] = []
        for read, path, result in self._lookups.pop(step):
            try:
                located = result.result()
            except OSError:  # the reader asks again, and names it
                self._rank([read.item], step + 1)
                continue
            accesses.append(_Access(read, self._take(read, path, located)))

    def _look_up(self, step: int) -> None:
        """Asks the servers for the sizes and versions of what a step reads."""
        if step not in self._lookups:
            found = ((read, self._future.path(read.item)) for read in self._future.reads(step))
            self._lookups[step] = [
                (read, path, self._pool.submit(locate, path)) for read, path in found if path is not None
            ]

    def _take(self, read: Read, path: Path, located: Located) -> np.ndarray:
        """Plans an access, and starts to fetch what it needs; returns the blocks that stay for it."""
        item, cache = read.item, self.cache
        earlier = self._earlier.pop(item, None)
        if earlier is not None and earlier != located.key.version:
            self._belady.drop(item)
        needed = self._needed(path, read.frames, located.blocks)
        with cache.changed:
            taken = self._belady.take(item, located.blocks, np.flatnonzero(needed))
            for left, block in taken.evicted:
                cache.leave(self._future.path(left), block)
            held = self._belady.items.get(item)
            if held is None:
                return taken.pinned
            known = cache.place(path, located, held.slots)
            phase = known.phase
            if earlier is not None and earlier == located.key.version:
                here = np.flatnonzero(held.present[: len(phase)])
                phase[np.setdiff1d(here, taken.fetched)] = HELD
            wanted = taken.pinned[phase[taken.pinned] == ABSENT]
            phase[wanted] = COMING
        for run in np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1):
            for begin in range(0, len(run), MOST_AT_ONCE):
                part = run[begin : begin + MOST_AT_ONCE]
                self._pool.submit(cache.fetch, known, part.tolist(), held.slots[part].tolist())
        return taken.pinned

    # ---- what is needed when
    def _needed(self, path: Path, frames: np.ndarray, blocks: int) -> np.ndarray:
        """Returns for each block whether a read of `frames` needs it, bool [n]: all, unless more is known of a file."""
        extents = self._extents.get(str(path))
        if extents is None:
            return np.ones(blocks, bool)
        needed, header = np.zeros(blocks, bool), 0 if member_of(path) is None else tar.BLOCK
        for begin, end in extents.ranges(frames):
            needed[(begin + header) // BLOCK : -(-(end + header) // BLOCK)] = True
        return needed

    def _complete(self, last: int, step: int) -> None:
        """Ends the accesses of the steps up to `last`, and ranks their blocks by their uses from `step` on."""
        done = [access for begun in sorted(self._planned) if begun <= last for access in self._planned.pop(begun)]
        for access in done:
            self._belady.release(access.read.item, access.pinned)
            path = str(self._future.path(access.read.item))
            if not self._whole and path in EXTENTS:
                self._extents[path] = EXTENTS[path]
        self._rank(sorted({access.read.item for access in done}), step)

    def _rank(self, items: list[int], step: int) -> None:
        """States when the blocks of some items are needed from `step` on."""
        views = len(self._future.views)
        for begin in range(0, len(items), RANKED_AT_ONCE):
            part = items[begin : begin + RANKED_AT_ONCE]
            for item, uses in zip(part, self._future.uses(np.array(part) // views, step), strict=True):
                if (held := self._belady.items.get(item)) is None:
                    continue
                path, following = self._future.path(item), np.full(len(held.slots), NEVER, np.int64)
                for use, frames in reversed(uses):
                    following[self._needed(path, frames, len(following))] = use
                self._belady.rank(item, following)

    def _rank_again(self, step: int) -> None:
        """Ranks the blocks whose next use is not known, when a further epoch can be looked at; all after a start."""
        items = self._belady.items.items()
        first = self._epoch < 0
        self._rank(sorted(i for i, held in items if first or (held.next[held.present] == NEVER).any()), step)

    def _found_earlier(self) -> dict[int, bytes]:
        """Takes over the blocks of an earlier process; returns their version by item, which is checked before they are
        used. A record whose block number cannot be believed is discarded."""
        records = self.cache.store.records
        used = np.flatnonzero(records["length"])
        if not len(used):
            return {}
        paths = ((item, self._future.path(item)) for item in range(len(self._future)))
        item_of = {object_key(text_of(path)): item for item, path in paths if path is not None}
        held: dict[int, dict[int, int]] = {}
        versions: dict[int, bytes] = {}
        damaged: list[str] = []
        for slot in used.tolist():
            record = records[slot]
            if (item := item_of.get(bytes(record["object"]))) is None:
                continue
            if not self.cache.store.is_plausible(slot):
                damaged.append(f"block {record['block']:,} of {text_of(self._future.path(item))}")
                continue
            if versions.setdefault(item, bytes(record["version"])) == bytes(record["version"]):
                held.setdefault(item, {})[int(record["block"])] = slot
        if damaged:
            log.warning("data.disk_cache: %s in %s cannot be true and are discarded (first: %s)",
                        counted(len(damaged), "record"), self.cache.store.folder, damaged[0])  # fmt: skip
        self._belady.adopt(held)
        return versions
