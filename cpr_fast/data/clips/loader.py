"""The loaders: batches of clips for training and for evaluation.

    plan (sampling) -> ClipReader threads (reader) -> ClipGraph (DALI, graph) -> Batch

The graph takes decoded frames on the CPU, and packets or JPEGs on a GPU. The next `data.prefetch` batches are read, and
the graph runs, while the training step runs. All random draws are made in the plan, so the batches are the same, bit
for bit, for every number of threads, prefetch depth and rank.

Letters: B videos of a batch, C clips of a video, M clips of one run of the graph, T frames, S side of the square
output, N windows.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.ahead.future import Future
from cpr_fast.data.clips.ahead.prefetch import Prefetch
from cpr_fast.data.clips.graph import ClipGraph, Route, residual
from cpr_fast.data.clips.reader import (
    ClipReader,
    FrameCache,
    Material,
    cache_gib,
    fetch_cut,
    fetch_frames,
    fetch_jpegs,
    fetch_packets,
)
from cpr_fast.data.clips.reference import ReferenceGraph
from cpr_fast.data.clips.sampling import (
    Clips,
    Sources,
    epoch_order,
    plan_pairs,
    plan_windows,
    step_videos,
    with_test_jitter,
)
from cpr_fast.data.clips.stream import Batch, ClipStream, Job, WindowBatch, returning_freed_memory
from cpr_fast.data.files.names import is_frames
from cpr_fast.data.files.remote import REMOTE
from cpr_fast.data.flow.on_the_fly import frame_reader
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.index.rows.columns import spread
from cpr_fast.data.storage.media import is_record
from cpr_fast.data.storage.pictures import is_jpeg
from cpr_fast.errors import InputError

CPU = torch.device("cpu")
VIEWS = ("rgb", "flow", "residual")
LOOKED_AT = 10_000  # videos at most whose route to the GPU is compared
LARGE = 100_000  # videos from which on the memory that reading an index needed, some MiB, is worth returning


def decoded_views(views: Iterable[str]) -> tuple[str, ...]:
    """Returns the views that are decoded for `views`, in their order and without repeats: "residual" needs RGB."""
    return tuple(dict.fromkeys("flow" if view == "flow" else "rgb" for view in views))


class _ClipSource:
    """The reader, threads and graph of one loader. The view "residual" is computed from RGB.

    For the CPU frames are decoded here; for a CUDA device packets or JPEGs go to the hardware decoders. With
    `data.exact` frames are decoded here and augmented by PIL for every device.
    """

    def __init__(
        self,
        index: Index,
        data: DataConfig,
        views: Sequence[str],
        device: torch.device | str,
        max_clips: int,
        **grouping: Any,
    ) -> None:
        """`grouping` are the options of `ClipGraph`: group, same_frames, clip_major."""
        if unknown := set(views) - set(VIEWS):
            raise InputError(f"views: expected some of {', '.join(VIEWS)}, got {', '.join(sorted(unknown))}")
        self._views, self._data, self._device = tuple(views), data, torch.device(device)
        device = CPU if data.exact else self._device  # where frames are decoded
        decoded = decoded_views(views)
        computed = "flow" if data.flow != "stored" else None
        routes = {view: "frames" if view == computed else _route(index, view, device) for view in decoded}
        self._cache = cache = FrameCache(cache_gib(index, decoded, data), frame_reader(data, device))
        decode = fetch_frames if data.exact else partial(fetch_cut, finish=device.type != "cuda")
        fetch = {
            "frames": partial(decode, read=cache.read_parts),
            "packets": partial(fetch_packets, group=grouping.get("group", 1)),
            "jpegs": fetch_jpegs,
        }
        reader = ClipReader(index, data, {view: fetch[route] for view, route in routes.items()})
        if data.exact:
            grouping.pop("same_frames", None)
            graph = ReferenceGraph(data, list(routes), **grouping)
        else:
            graph = ClipGraph(data, routes, device, max_clips, **grouping)
        self._stream = ClipStream(
            reader, graph, workers=data.workers, prefetch=data.prefetch, check=device.type == "cuda"
        )
        self.skipped, self.read = reader.skipped, reader.read
        self.stream = self._stream.stream

    def close(self) -> None:
        """Ends the threads and frees the decoded videos."""
        self._stream.close()
        with returning_freed_memory():
            self._cache.clear()

    def run(self, materials: list[Material]) -> tuple[Clips, dict[str, Tensor]]:
        """Returns the plan of the clips of the given videos and, in the same order, view -> float32 [M, 3, T, S, S]."""
        clips, tensors = self._stream.run(materials)
        if "residual" in self._views:
            tensors["residual"] = residual(tensors["rgb"], self._data)
        return clips, {view: tensors[view].to(self._device) for view in self._views}


def _route(index: Index, view: str, device: torch.device) -> Route:
    """Returns the route by which the frames of a view enter the graph. Raises InputError if flow is missing."""
    if view == "flow" and not (has_flow := index.has_flow).all():
        video = index[int(np.argmin(has_flow))]
        raise InputError(f"video {str(video.path)!r} has no flow_path in the index; run `cpr-fast flow` first, "
                         "or set data.flow = 'on_the_fly' or 'vectors'")  # fmt: skip
    if device.type != "cuda":
        return "frames"
    videos = (index[place] for place in spread(len(index), LOOKED_AT))
    paths = [video.flow_path if view == "flow" else video.path for video in videos]
    routes = [_route_of(path, view) for path in paths]
    if (other := next((place for place, route in enumerate(routes) if route != routes[0]), None)) is not None:
        raise InputError(
            f"index: on a GPU expected the {view} of all videos in files, of all in LMDB records, or of all in folders "
            f"of pictures of one kind, got {str(paths[0])!r} beside {str(paths[other])!r}"
        )
    return routes[0]


def _route_of(path: Path, view: str) -> Route:
    """Returns the route of a path on a GPU. Pictures other than JPEGs, and the two pictures of a field of flow, are
    decoded on the CPU."""
    if is_frames(path):
        return "jpegs" if view == "rgb" and is_jpeg(path) else "frames"
    return "jpegs" if is_record(path) else "packets"


class TrainLoader:
    """Loads augmented clips of every video, epoch by epoch; two clips per video with `plan_pairs`, the default.

    `plan` is a function like `plan_pairs` that returns C clips per video: the first clips of all videos, then the
    second ones, and so on. `skipped` lists (path, reason) of every file that could not be read; such a video is
    replaced by another one of the epoch. Raises InputError for an index that is too small for one global batch or has
    no flow for a view of `views`, and during iteration if most videos have disappeared.
    """

    def __init__(
        self,
        index: Index,
        data: DataConfig,
        views: Sequence[str],
        *,
        seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        plan: Callable[[Sources, np.ndarray, DataConfig, int, int], Clips] = plan_pairs,
    ) -> None:
        self._steps = len(index) // (data.batch_size * world_size)
        if self._steps == 0:
            raise InputError(
                f"the index holds {len(index)} {'video' if len(index) == 1 else 'videos'}, fewer than one batch: "
                f"data.batch_size {data.batch_size} x {world_size} {'rank' if world_size == 1 else 'ranks'}"
            )
        self._index, self._data, self._seed = index, data, seed
        self._rank, self._world_size = rank, world_size
        self._sources, self._plan_clips = Sources.of(index, data), plan
        clips = len(plan(self._sources, np.array([0]), data, seed, 0))  # of a video
        future = None
        if data.disk_cache and REMOTE.cache is None:  # one loader of a process at a time fetches ahead
            decoded = decoded_views(views)
            future = Future(index, self._sources, data, decoded, plan, seed=seed, rank=rank, world_size=world_size)
            if future.on_servers():
                data = replace(data, cache_gib=0.0)  # whole decoded videos would need more bytes than their clips
            else:
                future = None
        self._clips = _ClipSource(index, data, views, device, clips * data.batch_size, group=clips, clip_major=True)
        self._labels, self._source_ids = torch.from_numpy(index.labels), torch.from_numpy(index.source_ids)
        self._ahead = None
        if future is not None:
            on_gpu = torch.device(device).type == "cuda" and not data.exact  # packets are cut out of whole files
            vectors = data.flow == "vectors" and "flow" in decoded  # also of frames beside the clips
            whole = on_gpu or vectors or data.fps > 0  # the plan then names samples, whose frames only the reader knows
            self._ahead = Prefetch(future, Path(data.disk_cache), data.disk_cache_gib, depth=data.prefetch, whole=whole)

    def __len__(self) -> int:
        """Returns the steps of an epoch. Videos that do not fill a global batch are left out; they differ by epoch."""
        return self._steps

    @property
    def skipped(self) -> list[tuple[Path, str]]:
        """(path, reason) of every file that could not be read so far, once per file."""
        return self._clips.skipped

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch from `start_step` on. They do not depend, bit for bit, on where it starts."""
        # What was needed to read a large index, and to draw its order. Of a small one it is little, and the readers
        # would get the memory of their frames again, zeroed: 0.5 ms of a clip if an epoch has eight.
        large = len(self._index) >= LARGE
        with returning_freed_memory() if large else nullcontext():
            order = epoch_order(len(self._index), self._seed, epoch)
        steps = (self._plan(order, epoch, step) for step in range(start_step, self._steps))
        if self._ahead is not None:
            steps = self._ahead.following(steps, epoch * self._steps + start_step)
        return self._clips.stream(steps, self._batch)

    def sample(self, epoch: int, video: int) -> Batch:
        """Returns the clips of one video in an epoch as a batch of one, with the same bits as in a larger batch.

        Raises InputError if the video cannot be read.
        """
        plan = self._plan_clips(self._sources, np.array([video]), self._data, self._seed, epoch)
        material = self._clips.read(plan)
        if material is None:
            path, reason = self.skipped[-1]
            raise InputError(f"video {video} of the index: {path}: {reason}")
        return self._batch([material])

    def close(self) -> None:
        """Ends the threads and frees the graph. Further calls have no effect."""
        self._clips.close()
        if self._ahead is not None:
            self._ahead.close()

    def _plan(self, order: np.ndarray, epoch: int, step: int) -> list[Job]:
        videos = step_videos(order, step, self._data.batch_size, self._rank, self._world_size)
        clips = self._plan_clips(self._sources, videos, self._data, self._seed, epoch)
        first = (step * self._world_size + self._rank) * self._data.batch_size
        batch = len(videos)
        return [
            Job(
                clips[row::batch],
                lambda place=first + row: self._substitutes(order, epoch, place),
            )
            for row in range(batch)
        ]

    def _substitutes(self, order: np.ndarray, epoch: int, place: int) -> Iterator[Clips]:
        """Yields the clips of the other videos of the epoch, starting half an epoch away, so that a batch rarely has
        the same video twice.
        """
        count = len(order)
        for offset in range(count):
            video = order[(place + count // 2 + offset) % count]
            yield self._plan_clips(self._sources, np.array([video]), self._data, self._seed, epoch)

    def _batch(self, materials: list[Material]) -> Batch:
        count = len(materials)  # B; the graph returns all first clips, then all second clips
        clips, tensors = self._clips.run(materials)
        video = torch.from_numpy(clips.video[:count])
        start = torch.from_numpy(np.maximum(clips.start, 0)).view(-1, count)
        return Batch(
            {view: t.unflatten(0, (-1, count)).transpose(0, 1) for view, t in tensors.items()},
            video,
            self._source_ids[video],
            self._labels[video],
            start.t().contiguous(),
            torch.from_numpy(plan_digests(clips, count)),
        )


def plan_digests(clips: Clips, videos: int) -> np.ndarray:
    """Returns the BLAKE2b digest of the plan of each video's clips, int64 [B].

    Args:
        clips: M = C B, first clips of all videos, then second ones, and so on.
        videos: B.
    """
    columns = [np.ascontiguousarray(getattr(clips, field.name)) for field in fields(clips)]
    rows = np.concatenate([column.reshape(len(clips), -1).view(np.uint8) for column in columns], axis=1)
    digests = [hashlib.blake2b(rows[video::videos].tobytes(), digest_size=8).digest() for video in range(videos)]
    return np.frombuffer(b"".join(digests), "<i8").astype(np.int64)


def _identity(video: Video) -> int:
    """Returns a number that does not change if the data set moves or other videos join it."""
    return zlib.crc32(f"{video.source}/{Path(video.path).name}".encode("utf-8", "surrogateescape"))


class WindowLoader:
    """Loads every evaluation window of every video, in the order of the index.

    Windows overlap by half, or `clips_per_video` of them are spread evenly. Each is cut in the centre, or 5 or 10 times
    (`crops`, see `plan_windows`). The last batch may be smaller.
    `skipped` lists (path, reason) of the files that could not be read; only the windows of these files are missing.
    """

    def __init__(
        self,
        index: Index,
        data: DataConfig,
        views: Sequence[str],
        *,
        clips_per_video: int | None = None,
        crops: int = 1,
        jitter_seed: int | None = None,
        batch_size: int | None = None,
        device: torch.device | str = "cpu",
        plan: Callable[[int], Clips] | None = None,
    ) -> None:
        """With a `jitter_seed` the clips get the colour jitter of `with_test_jitter`. `plan` returns the clips of a
        video, in place of its windows."""
        # All crops of a window are in one batch.
        self._batch_size = max((batch_size or data.batch_size) // crops, 1) * crops
        sources = Sources.of(index, data)
        plan = plan or (lambda video: plan_windows(sources, video, data, clips_per_video, crops))
        windows = [plan(video) for video in range(len(index))]
        self._windows = Clips.concatenate(windows)
        if jitter_seed is not None:
            identity = np.array([_identity(video) for video in index], np.int64)
            self._windows = with_test_jitter(self._windows, identity, jitter_seed)
        self._clips = _ClipSource(index, data, views, device, self._batch_size, group=crops, same_frames=True)

    def __len__(self) -> int:
        """Returns the number of batches if every file can be read; see `windows`."""
        return math.ceil(len(self._windows) / self._batch_size)

    @property
    def skipped(self) -> list[tuple[Path, str]]:
        """(path, reason) of every file that could not be read so far, once per file."""
        return self._clips.skipped

    @property
    def windows(self) -> int:
        """The number of windows if every file can be read, counting each crop."""
        return len(self._windows)

    def __iter__(self) -> Iterator[WindowBatch]:
        steps = (self._plan(step) for step in range(len(self)))
        return self._clips.stream(steps, self._batch)

    def close(self) -> None:
        """Ends the threads and frees the graph. Further calls have no effect."""
        self._clips.close()

    def _plan(self, step: int) -> list[Job]:
        batch = self._windows[step * self._batch_size : (step + 1) * self._batch_size]
        return [Job(batch[batch.video == video]) for video in np.unique(batch.video)]

    def _batch(self, materials: list[Material]) -> WindowBatch:
        clips, tensors = self._clips.run(materials)
        return WindowBatch(tensors, torch.from_numpy(clips.video), torch.from_numpy(clips.crop))
