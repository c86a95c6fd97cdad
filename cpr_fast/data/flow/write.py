"""Computes the optical flow of every video of an index and stores it.

    read (threads) -> pack into batches of frame pairs -> solve (one device) -> store (threads)

The stages run at the same time. An interrupted run is continued by the same command, the work can be shared between
machines, and an error in one video does not stop the others.

Letters: N frames of a video, H x W pixels.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import av
import numpy as np

from cpr_fast.data.flow.batches import Segment, join, pack, solve
from cpr_fast.data.flow.estimate import describe, estimate_flow
from cpr_fast.data.flow.files import FlowFiles
from cpr_fast.data.flow.levels import Compute, FlowSolver, batch_pixels, flow_device, pair_flow
from cpr_fast.data.flow.records import FlowRecords
from cpr_fast.data.index.catalogue import Problem
from cpr_fast.data.index.index import Index, Video, changing
from cpr_fast.data.storage.media import read_frames
from cpr_fast.data.storage.unreadable import Unreadable
from cpr_fast.data.video.container import VideoError, not_as_listed
from cpr_fast.errors import InputError
from cpr_fast.ops.tvl1_flow import stop_tvl1_flow
from cpr_fast.runtime.busy import OtherPrograms
from cpr_fast.runtime.interrupt import stopping
from cpr_fast.runtime.progress import Forecast, announce, announce_others, track
from cpr_fast.wording import counted

MOST_WORKERS = 16  # number of decoding threads, and of encoding threads; more are not faster on any device
REFILL_S = 20.0  # time between two updates of the index during a run
STOPPING = "Stopping; complete flow is kept"  # a run that is stopped says this while its threads end

log = logging.getLogger(__name__)
Item, Result = TypeVar("Item"), TypeVar("Result")

Store = FlowFiles | FlowRecords
STORAGES = {"video": FlowFiles, "lmdb": FlowRecords}


def write_flow(
    index_csv: str | Path,
    out: str | Path,
    *,
    storage: Literal["video", "lmdb"] = "video",
    device: str = "cpu",
    shard: tuple[int, int] = (0, 1),
    compute: Compute = pair_flow,
    progress: bool = False,
) -> dict[str, Any]:
    """Stores the flow of every video of an index in `out` and fills the column flow_path of the index.

    `storage` is "video", one file per video in the folder `out` (`FlowFiles`), or "lmdb", records in the file `out`
    (`FlowRecords`; shard i of n writes OUT.i-of-n.lmdb, and a run without shards joins these files). `device` is "cpu",
    "cuda" or "cuda:N". `shard` = (i, n) computes the videos i, i + n, ... of the index; several shards may run at the
    same time on one index. Flow that is complete and was computed from the current version of the video is kept, so the
    same call resumes a run that was killed. A video that does not decode, has a single frame or whose flow fails is
    skipped and reported, and tried again by the next run. With `progress` an estimate and a bar are printed.

    Returns {"index", "videos" (of this shard), "written", "kept", "pairs" (computed), "pairs_per_s", "elapsed_s",
    "without_flow" (videos of the whole index that still have none), "counts" (problems by kind), "problems": [{"path",
    "kind", "reason"}]}. Kinds are "broken", "too_short" and "failed".
    Raises InputError if none of the shard's videos has flow at the end, or if the videos disappear during the run.
    """
    index_csv, out, (number, count) = Path(index_csv), Path(out), shard
    if not 0 <= number < count:
        raise InputError(f"--shard: expected i/n with 0 <= i < n, got {number}/{count}")
    solver = FlowSolver(flow_device(device), compute)
    index = Index.load(index_csv, require_flow=False)
    _require_writable(index_csv)
    share, stored = range(number, len(index), count), []
    fill = partial(_fill_index, index_csv, partial(STORAGES[storage].found, out=out))
    with stopping(STOPPING), _filled_if_stopped(fill), STORAGES[storage](index, index_csv.parent, out, shard) as store:
        todo = [position for position in share if not store.holds(position)]
        with _says_what_is_kept(len(share) - len(todo), stored, len(share)):
            if progress:
                _announce(index_csv, index, share, todo, out, storage, solver, count)
            began = time.perf_counter()
            problems = _compute_all(index, todo, solver, store, stored, progress, _Refill(fill, storage))
        if problems and len(problems) == len(share):
            raise InputError(
                f"index {str(index_csv)!r}: none of its {counted(len(share), 'video')} gave flow; the first: "
                f"{problems[0].path}: {problems[0].reason}"
            )
    elapsed_s = time.perf_counter() - began
    failed = {problem.path for problem in problems}
    pairs = sum(index[p].num_frames - 1 for p in todo if index[p].path not in failed)
    without_flow = fill()
    return {
        "index": str(index_csv),
        "videos": len(share),
        "written": len(todo) - len(problems),
        "kept": len(share) - len(todo),
        "pairs": pairs,
        "pairs_per_s": round(pairs / elapsed_s, 1),
        "elapsed_s": round(elapsed_s, 1),
        "without_flow": without_flow,
        "counts": dict(Counter(problem.kind for problem in problems)),
        "problems": [{"path": str(p.path), "kind": p.kind, "reason": p.reason} for p in problems],
    }


def _require_writable(index_csv: Path) -> None:
    if not os.access(index_csv.resolve().parent, os.W_OK):
        raise InputError(f"the folder of the index {str(index_csv)!r} is read-only, but its column flow_path is to be "
                         "filled; make an index in a folder that can be written, because the paths of this one are "
                         "relative to its folder: `cpr-fast index VIDEOS --out FOLDER/index.csv`")  # fmt: skip


def _announce(
    index_csv: Path, index: Index, share: Sequence[int], todo: list[int], out: Path, storage: str, solver: FlowSolver,
    shards: int,
) -> None:  # fmt: skip
    """Logs the planned work and its estimated cost."""
    pairs = sum(index[position].num_frames - 1 for position in todo)
    part = "" if shards == 1 else f" in this shard, one of {shards}"
    log.info("flow of %s: %s of %s videos%s are to be computed, %s frame pairs; done already: %s", index_csv,
             f"{len(todo):,}", f"{len(share):,}", part, f"{pairs:,}", f"{len(share) - len(todo):,}")  # fmt: skip
    if not todo:
        return
    announce("  measuring how long it takes, on a few frames")
    others = OtherPrograms()
    for line in describe(estimate_flow(index, todo, storage=storage, solver=solver, out=out), out):
        log.info(line)
    announce_others(others)
    if shards == 1:
        log.info("  to share the work: run --shard 0/n, 1/n, ... on n machines; to stop: Ctrl-C, and later run the "
                 "same command to continue")  # fmt: skip


@contextmanager
def _says_what_is_kept(before: int, stored: list[int], total: int) -> Iterator[None]:
    """Adds to a request to stop how many of `total` videos have flow: those `before` the block, and those `stored`."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        count = before + len(stored)
        has = "has" if count == 1 else "have"
        stopped.add_note(f"{count:,} of {counted(total, 'video')} {has} complete flow, which is kept" if count else
                         f"none of {counted(total, 'video')} has complete flow yet")  # fmt: skip
        raise


def _compute_all(
    index: Index, todo: list[int], solver: FlowSolver, store: Store, stored: list[int], progress: bool, refill: _Refill
) -> list[Problem]:
    """Computes and stores the flow of the videos at `todo`, and adds each to `stored`; returns the problems."""
    problems = []
    unreadable = Unreadable([index[position].path for position in todo])
    # Videos are finished in bursts, a batch at a time, and small ones first, so the time left is that of the pixels.
    forecast = Forecast(sum((index[p].num_frames - 1) * index[p].height * index[p].width for p in todo))
    done = partial(len, stored)  # videos whose flow is stored wait here for those before them
    all_results = _store_all(index, todo, solver, store, stored, forecast)
    with _solving_ended(), closing(all_results) as results, _stop_solving():
        for problem in track(results, "computing flow", total=len(todo), unit="videos", progress=progress,
                             left=forecast.text, done=done):  # fmt: skip
            if problem is not None:
                problems.append(problem)
                unreadable.add(problem.path, problem.reason, "no flow of")
            else:
                refill.if_due()
    return problems


@contextmanager
def _stop_solving() -> Iterator[None]:
    """If the block is left by an error or a request to stop, ends the solving of frame pairs in threads: the blocks
    around this one wait for these threads."""
    try:
        yield
    except (Exception, KeyboardInterrupt):  # not that a generator is closed, which may be later
        stop_tvl1_flow(True)
        raise


@contextmanager
def _solving_ended() -> Iterator[None]:
    """Allows solving again after the threads have ended, if `_stop_solving` has forbidden it."""
    try:
        yield
    except BaseException:
        stop_tvl1_flow(False)
        raise


class _Refill:
    """Fills the index while the flow is computed, so that a killed run leaves an index that lists the flow it stored.

    It takes at most a twentieth of the time. Flow files only: an LMDB file is complete when the run ends.
    """

    def __init__(self, fill: Callable[[], int], storage: str) -> None:
        self._fill, self._due = fill, time.monotonic() + REFILL_S if storage == "video" else math.inf

    def if_due(self) -> None:
        """Fills the index if the last time is long ago."""
        if (began := time.monotonic()) >= self._due:
            self._fill()
            now = time.monotonic()
            self._due = now + max(REFILL_S, 20 * (now - began))


@contextmanager
def _filled_if_stopped(fill: Callable[[], int]) -> Iterator[None]:
    """Fills the index when the block ends by Ctrl-C or an error, with the flow that is stored by then."""
    try:
        yield
    except BaseException:
        with suppress(Exception):  # the first error is the one to report
            fill()
        raise


def _store_all(
    index: Index, todo: list[int], solver: FlowSolver, store: Store, stored: list[int], forecast: Forecast
) -> Iterator[Problem | None]:
    """Yields the problem of each video or None, in order, after those of other videos may have been added to `stored`;
    adds the pixels of solved frame pairs to `forecast`."""
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    by_size = sorted(todo, key=lambda position: (index[position].height, index[position].width))
    read = _map_ahead(lambda position: (position, _read_gray(index[position])), by_size, workers, ahead=workers)
    batches = pack(read, batch_pixels(solver.device))

    def solved_batch(batch: list[Segment]) -> list[tuple[Segment, np.ndarray | Exception]]:
        parts = solve(batch, solver)
        forecast.add(sum(_pixels(index, segment) for segment, _ in parts))
        return parts

    solved = _map_ahead(solved_batch, batches, workers=1, ahead=1)
    # A generator between them that ends with an error closes none, and the error keeps it and its threads alive.
    with closing(read), closing(solved):
        yield from _map_ahead(lambda video: _store(index, store, stored, *video), join(solved), workers, ahead=workers)


def _pixels(index: Index, segment: Segment) -> int:
    """Returns the pixels of a segment's frame pairs, one frame of each; an unreadable video counts as a whole."""
    video = index[segment.position]
    pairs = video.num_frames - 1 if isinstance(segment.gray, Exception) else len(segment.gray) - 1
    return pairs * video.height * video.width


def _map_ahead(function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int) -> Iterator[Result]:
    """Yields function(item) of every item, in order, computed by `workers` threads up to `ahead` items ahead."""
    pending: deque[Future] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            with _stop_solving():
                for item in items:
                    pending.append(pool.submit(function, item))
                    if len(pending) > ahead:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _read_gray(video: Video) -> np.ndarray | VideoError:
    """Returns all frames as gray, uint8 [N, H, W], or the error if they cannot be read."""
    try:
        if video.num_frames < 2:
            raise VideoError(video.path, "has a single frame: no flow")
        gray = read_frames(video.path, np.arange(video.num_frames), "gray", video.num_frames)
        if gray.shape[1:] != (video.height, video.width):
            size = f"{gray.shape[2]}x{gray.shape[1]}"
            raise not_as_listed(video.path, f"decodes to {size}", f"{video.width}x{video.height}")
        return gray
    except VideoError as error:
        return error


def _store(
    index: Index, store: Store, stored: list[int], position: int, levels: np.ndarray | Exception
) -> Problem | None:
    """Stores the flow of a video and adds it to `stored`, or returns the problem."""
    path = index[position].path
    if not isinstance(levels, Exception):
        try:
            store.write(position, levels)
            stored.append(position)
            return None
        except av.FFmpegError as error:
            if isinstance(error, OSError):  # a full disk stops the run
                raise
            levels = error
        except VideoError as error:  # the video disappeared
            levels = error
    if isinstance(levels, VideoError):
        return Problem(path, "too_short" if index[position].num_frames < 2 else "broken", levels.reason)
    return Problem(path, "failed", f"{type(levels).__name__}: {levels}")


def _fill_index(index_csv: Path, found: Callable[[Index, Path], list[tuple[set[Path], Path | None]]]) -> int:
    """Sets flow_path for every video whose flow is stored, whichever shard computed it, and clears it if the flow was
    computed from an earlier version of the video. Returns the number of videos without flow."""
    with changing(index_csv):
        index = Index.load(index_csv, require_flow=False)
        videos = []
        for video, (paths, path) in zip(index, found(index, index_csv.parent), strict=True):
            stale = video.flow_path is not None and os.path.abspath(video.flow_path) in map(os.path.abspath, paths)
            videos.append(replace(video, flow_path=path or (None if stale else video.flow_path)))
        Index(videos).save(index_csv)
    return sum(video.flow_path is None for video in videos)
