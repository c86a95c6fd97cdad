"""Optical flow of every video of an index, computed and stored: resumable, sharded, one bad video never fatal.

    read (threads) -> pack into batches of frame pairs -> solve (one device) -> store (threads)

The stages run at the same time. A batch takes frame pairs of as many videos of one size as fill it: a GPU is kept busy
by short videos too, and a long one does not fill its memory.

Letters: N frames of a video, P frame pairs, H x W pixels.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import av
import numpy as np

from cpr_fast.data.flow.files import FlowFiles
from cpr_fast.data.flow.levels import Compute, FlowSolver, batch_pixels, flow_device, pair_flow
from cpr_fast.data.flow.records import FlowRecords
from cpr_fast.data.index.catalogue import Problem
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.storage.media import read_frames
from cpr_fast.data.video.container import VideoError
from cpr_fast.errors import InputError
from cpr_fast.runtime.progress import track

MOST_WORKERS = 16  # threads that decode, and as many that encode: enough beside any device

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
    """Stores the flow of every video of an index in `out` and fills the index's flow_path.

    `storage` is "video", a file for every video in the folder `out` (`FlowFiles`), or "lmdb", records in the file `out`
    (`FlowRecords`; of shard i of n in a file of its own, OUT.i-of-n.lmdb, which a run without shards takes over).
    `device` is "cpu", "cuda" or "cuda:N". `shard` = (i, n) does videos i, i + n, ... of the index; shards may run at
    the same time on one index. What is there whole is kept: a run that was killed continues where it stopped. A video
    that does not decode, has a single frame or whose flow fails is skipped, named, and tried again by the next run.

    Returns {"index", "videos" (of this shard), "written", "kept", "pairs" (computed), "pairs_per_s", "counts" of
    problems by kind, "problems": [{"path", "kind", "reason"}]}; kinds are broken, too_short and failed.
    Raises InputError where none of the shard's videos has flow in the end.
    """
    index_csv, out, (number, count) = Path(index_csv), Path(out), shard
    if not 0 <= number < count:
        raise InputError(f"shard: expected (i, n) with 0 <= i < n, got {shard}")
    solver = FlowSolver(flow_device(device), compute)
    index = Index.load(index_csv, require_flow=False)
    share = range(number, len(index), count)
    problems = []
    with STORAGES[storage](index, index_csv.parent, out, shard) as store:
        todo = [position for position in share if not store.holds(position)]
        began = time.perf_counter()
        with closing(_store_all(index, todo, solver, store)) as results:
            for problem in track(results, "computing flow", total=len(todo), unit="videos", progress=progress):
                if problem is not None:
                    log.warning("no flow of %s: %s", problem.path, problem.reason)
                    problems.append(problem)
    failed = {problem.path for problem in problems}
    pairs = sum(index[p].num_frames - 1 for p in todo if index[p].path not in failed)
    rate = pairs / (time.perf_counter() - began)
    _fill_index(index_csv, partial(STORAGES[storage].paths, out=out))
    if problems and len(problems) == len(share):
        raise InputError(
            f"index {str(index_csv)!r}: none of {len(share)} videos gave flow; the first: {problems[0].path}: "
            f"{problems[0].reason}"
        )
    return {
        "index": str(index_csv),
        "videos": len(share),
        "written": len(todo) - len(problems),
        "kept": len(share) - len(todo),
        "pairs": pairs,
        "pairs_per_s": round(rate, 1),
        "counts": dict(Counter(problem.kind for problem in problems)),
        "problems": [{"path": str(p.path), "kind": p.kind, "reason": p.reason} for p in problems],
    }


@dataclass(frozen=True)
class Segment:
    """Consecutive frames of a video, whose pairs are in one batch; a video is one segment or several."""

    position: int  # of the video in the index
    gray: np.ndarray | Exception  # uint8 [n + 1, H, W], or why there is none
    last: bool  # ends the video

    def pairs(self) -> np.ndarray:
        """uint8 [n, 2, H, W]."""
        return np.stack([self.gray[:-1], self.gray[1:]], axis=1)


def _store_all(index: Index, todo: list[int], solver: FlowSolver, store: Store) -> Iterator[Problem | None]:
    """What is wrong with it, or None, for each video, as they are done."""
    workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    by_size = sorted(todo, key=lambda position: (index[position].height, index[position].width))
    read = _map_ahead(lambda position: (position, _read_gray(index[position])), by_size, workers, ahead=workers)
    batches = pack(read, batch_pixels(solver.device))
    solved = _map_ahead(partial(solve, solver=solver), batches, workers=1, ahead=1)
    return _map_ahead(lambda video: _store(index, store, *video), _join(solved), workers, ahead=workers)


def _map_ahead(function: Callable[[Item], Result], items: Iterable[Item], workers: int, ahead: int) -> Iterator[Result]:
    """function(item) of every item, in order, by `workers` threads; `ahead` more are at work or done."""
    pending: deque[Future] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
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
    """All frames as gray, uint8 [N, H, W], or why not."""
    try:
        if video.num_frames < 2:
            raise VideoError(video.path, "has a single frame: no flow")
        gray = read_frames(video.path, np.arange(video.num_frames), "gray", video.num_frames)
        if gray.shape[1:] != (video.height, video.width):
            size = f"{gray.shape[2]}x{gray.shape[1]}"
            raise VideoError(video.path, f"decodes to {size}, the index says {video.width}x{video.height}")
        return gray
    except VideoError as error:
        return error


def pack(videos: Iterable[tuple[int, np.ndarray | Exception]], pixels: int) -> Iterator[list[Segment]]:
    """Batches of pairs of one size, at most `pixels` (or one pair) each, of (position, gray [N, H, W]) one after
    another; one that could not be read is a batch of its own."""
    batch: list[Segment] = []
    size, room = None, 0
    for position, gray in videos:
        if isinstance(gray, Exception):
            yield [Segment(position, gray, last=True)]
            continue
        if gray.shape[1:] != size or room == 0:
            if batch:
                yield batch
            size, batch = gray.shape[1:], []
            room = max(1, pixels // (size[0] * size[1]))
        first = 0
        while first < len(gray) - 1:
            if room == 0:
                yield batch
                batch, room = [], max(1, pixels // (size[0] * size[1]))
            end = min(first + room, len(gray) - 1)
            batch.append(Segment(position, gray[first : end + 1], last=end == len(gray) - 1))
            room -= end - first
            first = end
    if batch:
        yield batch


def solve(batch: list[Segment], solver: FlowSolver) -> list[tuple[Segment, np.ndarray | Exception]]:
    """Every segment with its levels, uint8 [n, 2, H, W], or why there are none. A batch that fails is taken apart."""
    if isinstance(batch[0].gray, Exception):
        return [(batch[0], batch[0].gray)]
    try:
        levels = solver.levels(np.concatenate([segment.pairs() for segment in batch]))
    except Exception as error:  # whatever is wrong with one video, the others go on
        return [(batch[0], error)] if len(batch) == 1 else [solve([segment], solver)[0] for segment in batch]
    ends = np.cumsum([len(segment.gray) - 1 for segment in batch])
    return list(zip(batch, np.split(levels, ends[:-1]), strict=True))


def _join(solved: Iterable[list[tuple[Segment, np.ndarray | Exception]]]) -> Iterator[tuple[int, Any]]:
    """(position, levels [N - 1, 2, H, W] or why there are none) of every video, from its segments in order."""
    parts: dict[int, list] = defaultdict(list)
    for segment, levels in (item for batch in solved for item in batch):
        parts[segment.position].append(levels)
        if segment.last:
            video = parts.pop(segment.position)
            error = next((part for part in video if isinstance(part, Exception)), None)
            yield segment.position, np.concatenate(video) if error is None else error


def _store(index: Index, store: Store, position: int, levels: np.ndarray | Exception) -> Problem | None:
    path = index[position].path
    if isinstance(levels, VideoError):
        return Problem(path, "too_short" if index[position].num_frames < 2 else "broken", levels.reason)
    if not isinstance(levels, Exception):
        try:
            store.write(position, levels)
            return None
        except av.FFmpegError as error:
            if isinstance(error, OSError):  # a full disk stops the run
                raise
            levels = error
    return Problem(path, "failed", f"{type(levels).__name__}: {levels}")


def _fill_index(index_csv: Path, paths: Callable[[Index, Path], list[Path | None]]) -> None:
    """Sets flow_path for every video whose flow is stored whole, whichever shard did it."""
    with _locked(index_csv):
        index = Index.load(index_csv, require_flow=False)
        found = zip(index, paths(index, index_csv.parent), strict=True)
        Index(replace(video, flow_path=path or video.flow_path) for video, path in found).save(index_csv)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Shards that finish together update the index one after the other; the lock file stays."""
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
