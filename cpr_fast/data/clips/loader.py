"""Batches of clips: one DALI graph, fed with decoded frames on the CPU, with packets or JPEGs on the GPU.

    plan (sampling) -> ClipReader threads (clips) -> ClipGraph (DALI) -> Batch

Decoding of the next `data.prefetch` batches and the graph run behind the training step. All randomness is in the plan,
so the batches are the same, bit for bit, whatever the number of threads, the prefetch depth or the rank.

Letters: B videos, M clips of a graph run, T frames, S side of the square output, N windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.graph import ClipGraph, Route, residual
from cpr_fast.data.clips.reader import (
    ClipReader,
    FrameCache,
    Material,
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
from cpr_fast.data.clips.stream import ClipStream, Job
from cpr_fast.data.flow.on_the_fly import frame_reader
from cpr_fast.data.index.index import Index
from cpr_fast.data.storage.media import is_record
from cpr_fast.errors import InputError

CPU = torch.device("cpu")
VIEWS = ("rgb", "flow", "residual")


@dataclass(frozen=True)
class Batch:
    """What one training step sees; C clips of every video, two in pretraining.

    `clips[view][:, c]` is contiguous in channels_last_3d: no copy in a network.
    """

    clips: dict[str, Tensor]  # view -> float32 [B, C, 3, T, S, S], normalised
    video: Tensor  # int64 [B], position in the index
    source: Tensor  # int64 [B], equal for siblings
    label: Tensor  # int64 [B], -1 where unlabelled
    start: Tensor  # int64 [B, C], first source frame of each clip


@dataclass(frozen=True)
class WindowBatch:
    """N evaluation windows, of one or several videos, in the order of the index."""

    clips: dict[str, Tensor]  # view -> float32 [N, 3, T, S, S], normalised
    video: Tensor  # int64 [N], position in the index
    crop: Tensor  # int64 [N], number of the crop, 0 the centre one


class _ClipSource:
    """Readers, threads and graphs of one loader; RGB gives the view "residual" as well.

    Decoded frames for the CPU; for a CUDA device packets or JPEGs and the hardware decoders. With `data.exact` decoded
    frames and PIL, whatever the device.
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
        """`grouping`: as in `ClipGraph`."""
        if unknown := set(views) - set(VIEWS):
            raise InputError(f"views: expected some of {', '.join(VIEWS)}, got {', '.join(sorted(unknown))}")
        self._views, self._data, self._device = tuple(views), data, torch.device(device)
        device = CPU if data.exact else self._device  # of the decoding
        decoded = dict.fromkeys("flow" if view == "flow" else "rgb" for view in views)  # in order, without repeats
        computed = "flow" if data.flow == "on_the_fly" else None
        routes = {view: "frames" if view == computed else _route(index, view, device) for view in decoded}
        cache = FrameCache(data.cache_gib, frame_reader(data, device))
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
        self.stream, self.close = self._stream.stream, self._stream.close

    def run(self, materials: list[Material]) -> tuple[Clips, dict[str, Tensor]]:
        """The clips of the given videos, view -> float32 [M, 3, T, S, S], and their plan in the same order."""
        clips, tensors = self._stream.run(materials)
        if "residual" in self._views:
            tensors["residual"] = residual(tensors["rgb"], self._data)
        return clips, {view: tensors[view].to(self._device) for view in self._views}


def _route(index: Index, view: str, device: torch.device) -> Route:
    """How a view's frames come into the graph."""
    paths = [video.flow_path if view == "flow" else video.path for video in index]
    if None in paths:
        video = index[paths.index(None)]
        raise InputError(f"video {str(video.path)!r} has no flow_path in the index; run `cpr-fast flow` first, "
                         "or set data.flow = 'on_the_fly'")  # fmt: skip
    if device.type != "cuda":
        return "frames"
    records = [is_record(path) for path in paths]
    if any(records) and not all(records):
        raise InputError(
            f"index: on a GPU expected the {view} of all videos in files or of all in LMDB records, got "
            f"{str(paths[records.index(False)])!r} beside {str(paths[records.index(True)])!r}"
        )
    return "jpegs" if all(records) else "packets"


class TrainLoader:
    """Augmented clips of every video, one epoch after another: two of each for `plan_pairs`, the default.

    `plan` is a function like it, whose M is a multiple of its N: the first clips of all videos, then the second ones.
    `skipped` lists (path, reason) of every file that could not be read; another video of the epoch takes its place.
    Raises InputError for an index too small for one global batch, or without the flow that `views` asks for.
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
                f"the index holds {len(index)} videos, fewer than one batch: "
                f"data.batch_size {data.batch_size} x {world_size} ranks"
            )
        self._index, self._data, self._seed = index, data, seed
        self._rank, self._world_size = rank, world_size
        self._sources, self._plan_clips = Sources.of(index, data), plan
        clips = len(plan(self._sources, np.array([0]), data, seed, 0))  # of a video
        self._clips = _ClipSource(index, data, views, device, clips * data.batch_size, group=clips, clip_major=True)
        self._labels, self._source_ids = torch.from_numpy(index.labels), torch.from_numpy(index.source_ids)

    def __len__(self) -> int:
        """Steps of an epoch; the videos left over after the last full global batch wait for another epoch's order."""
        return self._steps

    @property
    def skipped(self) -> list[tuple[Path, str]]:
        return self._clips.skipped

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `start_step` on: the same ones, bitwise, wherever it starts."""
        order = epoch_order(len(self._index), self._seed, epoch)
        steps = (self._plan(order, epoch, step) for step in range(start_step, self._steps))
        return self._clips.stream(steps, self._batch)

    def sample(self, epoch: int, video: int) -> Batch:
        """The clips that one video gives in an epoch, as a batch of their own: the same bits as among others.

        Raises InputError if it cannot be read.
        """
        plan = self._plan_clips(self._sources, np.array([video]), self._data, self._seed, epoch)
        material = self._clips.read(plan)
        if material is None:
            path, reason = self.skipped[-1]
            raise InputError(f"video {video} of the index: {path}: {reason}")
        return self._batch([material])

    def close(self) -> None:
        """Ends the threads and frees the graph. Closed twice is closed."""
        self._clips.close()

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
        """The other videos of the epoch, from half an epoch away so that a batch rarely meets one twice."""
        count = len(order)
        for offset in range(count):
            video = order[(place + count // 2 + offset) % count]
            yield self._plan_clips(self._sources, np.array([video]), self._data, self._seed, epoch)

    def _batch(self, materials: list[Material]) -> Batch:
        count = len(materials)  # B; the graph gives all first clips, then all second clips
        clips, tensors = self._clips.run(materials)
        video = torch.from_numpy(clips.video[:count])
        start = torch.from_numpy(np.maximum(clips.start, 0)).view(-1, count)
        return Batch(
            {view: t.unflatten(0, (-1, count)).transpose(0, 1) for view, t in tensors.items()},
            video,
            self._source_ids[video],
            self._labels[video],
            start.t().contiguous(),
        )


class WindowLoader:
    """Every evaluation window of every video, in the order of the index.

    Windows overlap by half (starts 0, T/2 - 1, ... times the stride), or are `clips_per_video` uniform ones; each is
    cut in the centre, or 5 or 10 times (`crops`, see `plan_windows`). The last batch may be smaller. `skipped` lists
    (path, reason) of the files that could not be read: their windows are the only ones missing.
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
    ) -> None:
        """`jitter_seed` not None: with the colour jitter of `with_test_jitter`."""
        self._batch_size = max((batch_size or data.batch_size) // crops, 1) * crops  # whole windows
        sources = Sources.of(index, data)
        windows = [plan_windows(sources, video, data, clips_per_video, crops) for video in range(len(index))]
        self._windows = Clips.concatenate(windows)
        if jitter_seed is not None:
            self._windows = with_test_jitter(self._windows, jitter_seed)
        self._clips = _ClipSource(index, data, views, device, self._batch_size, group=crops, same_frames=True)

    def __len__(self) -> int:
        """Batches, if every file can be read."""
        return math.ceil(len(self._windows) / self._batch_size)

    @property
    def skipped(self) -> list[tuple[Path, str]]:
        return self._clips.skipped

    def __iter__(self) -> Iterator[WindowBatch]:
        steps = (self._plan(step) for step in range(len(self)))
        return self._clips.stream(steps, self._batch)

    def close(self) -> None:
        """Ends the threads and frees the graph. Closed twice is closed."""
        self._clips.close()

    def _plan(self, step: int) -> list[Job]:
        batch = self._windows[step * self._batch_size : (step + 1) * self._batch_size]
        return [Job(batch[batch.video == video]) for video in np.unique(batch.video)]

    def _batch(self, materials: list[Material]) -> WindowBatch:
        clips, tensors = self._clips.run(materials)
        return WindowBatch(tensors, torch.from_numpy(clips.video), torch.from_numpy(clips.crop))
