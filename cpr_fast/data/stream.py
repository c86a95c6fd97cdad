"""Clips of planned videos through a graph, read ahead by threads; what the training and window loaders share.

Letters: M clips of a graph run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from cpr_fast.data.background import run_ahead
from cpr_fast.data.clips import ClipReader, Fetch, Material
from cpr_fast.data.sampling import Clips


class Graph(Protocol):
    def run(self, clips: Clips, samples: dict[str, list]) -> dict[str, Tensor]:
        """View -> clips [M, 3, T, S, S] made of each view's M samples as `clips` plans them."""


@dataclass(frozen=True)
class Job:
    """The clips of one video in one batch; `substitutes` stand in for it if it cannot be read."""

    clips: Clips
    substitutes: Callable[[], Iterable[Clips]] | None = None


class ClipStream:
    """Threads that read jobs ahead, and the graph they feed; what the two loaders share."""

    def __init__(
        self, reader: ClipReader, graph: Graph, *, workers: int, prefetch: int, checked_fetch: Fetch | None = None
    ) -> None:
        """`prefetch` batches are read ahead. If `checked_fetch` is given, a batch that the graph fails on is read again
        by it: a hardware decoder does not say which of its samples was damaged."""
        self.reader, self._graph = reader, graph
        self._ahead, self._checked_fetch = prefetch, checked_fetch
        # Threads, not processes: FFmpeg and the scaler run without the GIL (on two cores within 7 % of processes), and
        # frames need no way across.
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="cpr-fast-read")

    def stream(self, steps: Iterable[list[Job]], collect: Callable[[list[Material]], Any]) -> Iterator[Any]:
        """`collect(materials)` orders the graph run and returns the batch; steps without a readable video are left
        out."""
        return run_ahead(self._batches(steps, collect), depth=1)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, order: list[tuple[Material, int]]) -> tuple[Clips, dict[str, Tensor]]:
        """The graph's answer for the given (material, clip of it) in this order, and their plan."""
        clips = Clips.concatenate([material.clips[[clip]] for material, clip in order])
        views = order[0][0].views
        return clips, self._graph.run(clips, {v: [material.views[v][clip] for material, clip in order] for v in views})

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
            if self._checked_fetch is None:
                raise
            checked = [self._read(job, fetch=self._checked_fetch) for job in jobs]
            materials = [material for material in checked if material is not None]
            if not materials:
                return
            batch = collect(materials)
        yield batch

    def _read(self, job: Job, **options) -> Material | None:
        if job.substitutes is None:
            return self.reader.read(job.clips, **options)
        return self.reader.read_or_substitute(job.clips, job.substitutes(), **options)
