"""Reads planned clips ahead in threads and feeds them to a graph; the training and window loaders share this.

Letters: M clips of one run of the graph; B videos of a batch, C clips of a video, T frames, S side of the square
output, N windows.
"""

from __future__ import annotations

import ctypes
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from cpr_fast.data.clips.reader import ClipReader, Material
from cpr_fast.data.clips.sampling import Clips

Item = TypeVar("Item")

# Options of glibc's mallopt(3) and their new values, which are the largest that glibc itself would choose.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**26))  # bytes


class Graph(Protocol):
    """Converts the clips that were read to tensors: `ClipGraph` or `ReferenceGraph`."""

    def rows(self, clips: int) -> np.ndarray:
        """Returns which input clip each row of the output is, int64 [M]."""

    def run(self, clips: Clips, samples: dict[str, list]) -> dict[str, Tensor]:
        """Returns view -> clips [M, 3, T, S, S], made from the samples of each view as `clips` plans, in the order of
        `rows`."""


@dataclass(frozen=True)
class Batch:
    """The input of one training step: C clips of every video, two in pretraining.

    `clips[view][:, c]` is contiguous in channels_last_3d, so a network need not copy it.
    """

    clips: dict[str, Tensor]  # view -> float32 [B, C, 3, T, S, S], normalised; of a store of features [B, C, D]
    video: Tensor  # int64 [B], position in the index
    source: Tensor  # int64 [B], equal for siblings
    label: Tensor  # int64 [B], -1 where unlabelled
    start: Tensor  # int64 [B, C], first source frame, or sample of data.fps, of each clip
    plan: Tensor  # int64 [B], digest of everything that was drawn for the clips of each video


@dataclass(frozen=True)
class WindowBatch:
    """N evaluation windows, of one or several videos, in the order of the index."""

    clips: dict[str, Tensor]  # view -> float32 [N, 3, T, S, S], normalised; of a store of features [N, D]
    video: Tensor  # int64 [N], position in the index
    crop: Tensor  # int64 [N], number of the crop, 0 the centre one


@dataclass(frozen=True)
class Job:
    """The clips of one video in one batch, and the clips of other videos that replace them if it cannot be read."""

    clips: Clips
    substitutes: Callable[[], Iterable[Clips]] | None = None


class ClipStream:
    """Threads that read jobs ahead, and the graph that they feed."""

    def __init__(self, reader: ClipReader, graph: Graph, *, workers: int, prefetch: int, check: bool = False) -> None:
        """`workers` threads read `prefetch` batches ahead. With `check`, a batch on which the graph fails is read again
        and decoded by the reader, because a hardware decoder does not say which of its samples is damaged.
        """
        self.reader, self._graph = reader, graph
        self._ahead, self._check = prefetch, check
        _keep_freed_memory()
        # Threads, not processes: FFmpeg and the resize run without the GIL, so threads are
        # at most 7 % slower than processes on two cores, and frames need not be copied between processes.
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="cpr-fast-read")

    def stream(self, steps: Iterable[list[Job]], collect: Callable[[list[Material]], Any]) -> Iterator[Any]:
        """Yields collect(materials) of every step, where `collect` runs the graph and returns the batch.

        A step without any readable video is left out.
        """
        return run_ahead(self._batches(steps, collect), depth=1)

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, materials: list[Material]) -> tuple[Clips, dict[str, Tensor]]:
        """Runs the graph for the clips of the given videos. Returns their plan and view -> tensor, in one order."""
        clips = Clips.concatenate([material.clips for material in materials])
        views = materials[0].views
        tensors = self._graph.run(clips, {v: [sample for m in materials for sample in m.views[v]] for v in views})
        return clips[self._graph.rows(len(clips))], tensors

    def _batches(self, steps: Iterable[list[Job]], collect: Callable) -> Generator[Any, None, None]:
        pending: deque[tuple[list[Job], list[Future]]] = deque()
        try:
            for jobs in steps:
                pending.append((jobs, [self._pool.submit(self._read, job) for job in jobs]))
                if len(pending) > self._ahead:
                    yield from self._finish(*pending.popleft(), collect)
            while pending:
                yield from self._finish(*pending.popleft(), collect)
        finally:
            for _, futures in pending:
                for future in futures:
                    future.cancel()

    def _finish(self, jobs: list[Job], futures: list[Future], collect: Callable) -> Iterator[Any]:
        materials = [material for future in futures if (material := future.result()) is not None]
        if not materials:
            return
        try:
            batch = collect(materials)
        except RuntimeError:
            if not self._check:
                raise
            checked = [self._read(job, check=True) for job in jobs]
            materials = [material for material in checked if material is not None]
            if not materials:
                return
            batch = collect(materials)
        yield batch

    def _read(self, job: Job, **options) -> Material | None:
        if job.substitutes is None:
            return self.reader.read(job.clips, **options)
        return self.reader.read_or_substitute(job.clips, job.substitutes(), **options)


def _set_malloc(options: Iterable[tuple[int, int]]) -> None:
    """Sets options of mallopt(3) for the process, unless the user has set malloc up."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None and not any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        for option, value in options:
            mallopt(option, value)


def _keep_freed_memory() -> None:
    """Makes malloc keep what is freed in blocks of up to 32 MiB, for the process, unless the user has set it up.

    Otherwise the reading threads return the memory of frames to the system and get it back, zeroed, for every clip:
    1,000 page faults and 3 to 7 % of the CPU time of a clip of 32 frames of 320x240 (on Zen 1). The process then keeps
    about 10 MiB more; its peak is the same.
    """
    _set_malloc(KEPT)


@contextmanager
def returning_freed_memory() -> Iterator[None]:
    """Returns to the system what is freed in the block and what malloc keeps of earlier blocks.

    Frames are allocated in the arenas of the threads that read them, which the threads of the next loader do not reuse:
    without this, every loader of a process would add the size of its cache.
    """
    _set_malloc([(M_TRIM_THRESHOLD, 0)])
    try:
        yield
        if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
            trim(0)
    finally:
        _set_malloc(KEPT)


class _End:
    """The last entry of the queue: the iterator is exhausted, or has raised `error`."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def run_ahead(items: Generator[Item, None, None], depth: int) -> Iterator[Item]:
    """Yields `items`, computed up to `depth` items ahead in a background thread. An exception in that thread is raised
    again in the consumer.

    When the consumer stops early (break, an exception, KeyboardInterrupt, a dropped generator), the thread finishes the
    current item and closes `items`; then the thread is joined.
    """
    ready: queue.Queue[Item | _End] = queue.Queue(depth)
    stop = threading.Event()

    def put(entry: Item | _End) -> None:
        while not stop.is_set():
            try:
                return ready.put(entry, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        error = None
        try:
            with closing(items):
                for item in items:
                    put(item)
                    if stop.is_set():
                        break
        except BaseException as caught:  # also KeyboardInterrupt, because the consumer waits for an entry
            error = caught
        put(_End(error))

    thread = threading.Thread(target=work, name="cpr-fast-batches", daemon=True)
    thread.start()
    try:
        while not isinstance(entry := ready.get(), _End):
            yield entry
        if entry.error is not None:
            raise entry.error
    finally:
        stop.set()
        thread.join()
