"""Batches of clips: one DALI graph, fed with decoded frames on the CPU or with packets on the GPU.

    plan (sampling) -> ClipReader threads (clips) -> ClipGraph (DALI) -> Batch

Decoding of the next `data.prefetch` batches and the graph run behind the training step. All randomness is in the plan,
so the batches are the same, bit for bit, whatever the number of threads, the prefetch depth or the rank.

Letters: B videos, M clips of a graph run, T frames, S side of the square output, N windows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpr_fast.config import DataConfig
from cpr_fast.data.clips import ClipReader, FrameCache, Material, fetch_checked_packets, fetch_frames, fetch_packets
from cpr_fast.data.index import Index
from cpr_fast.data.sampling import (
    Clips,
    Sources,
    epoch_order,
    plan_pairs,
    plan_windows,
    step_videos,
    with_test_jitter,
)
from cpr_fast.data.stream import ClipStream, Job
from cpr_fast.errors import InputError

try:
    from nvidia.dali import fn, pipeline_def, types
except ImportError as error:
    raise ImportError(
        "cpr_fast.data.pipeline needs NVIDIA DALI: pip install nvidia-dali-cuda130 (or nvidia-dali-cuda120); "
        "it also runs without a GPU"
    ) from error

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, for both views as published


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


def augment(frames, draw, view: str, size: int):
    """One planned clip: frames uint8 FHWC, draw float32 [11] as `_draw_rows` lays it out -> float32 FHWC.

    Parameters are per clip, so all its frames get the same; boxes and flips are shared by the views, colour and blur
    are for RGB. The two colour operators are skipped where they would change nothing: they are half of the cost.
    Against PIL: the resize differs by a level or two, brightness, saturation and blur by at most two; contrast pivots
    on 128 instead of the frame's mean, and hue turns linearly in YIQ instead of in HSV.
    """
    out = fn.resize(frames, roi_start=draw[0:2], roi_end=draw[2:4], size=[size, size], interp_type=types.INTERP_CUBIC)
    if view == "flow":  # the published channel order (128, v, u): constant first, as PIL reads their BGR files
        out = fn.cat(out[:, :, :, 0:1] * np.uint8(0) + np.uint8(128), out[:, :, :, 1:2], out[:, :, :, 0:1], axis=3)
    else:
        if draw[9] > 0:
            out = fn.color_twist(out, brightness=draw[5], contrast=draw[6], saturation=draw[7], hue=draw[8])
        if draw[10] > 0:
            out = fn.gaussian_blur(out, sigma=draw[10])
    return fn.crop_mirror_normalize(
        out,
        mirror=fn.cast(draw[4], dtype=types.INT32),
        mean=[255 * m for m in MEAN],
        std=[255 * s for s in STD],
        output_layout="FHWC",
    )


@pipeline_def(enable_conditionals=True, exec_dynamic=True, prefetch_queue_depth=1)
def decoded_graph(views: Sequence[str], size: int):
    """From frames that PyAV decoded: inputs "draw" and, per view, uint8 FHWC."""
    draw = fn.external_source(name="draw", device="cpu")
    outputs = []
    for view in views:
        frames = fn.external_source(name=view, device="cpu", layout="FHWC", no_copy=True)
        outputs.append(augment(frames, draw, view, size))
    return tuple(outputs)


@pipeline_def(enable_conditionals=True, exec_dynamic=True, prefetch_queue_depth=1)
def encoded_graph(views: Sequence[str], size: int, decoder: str):
    """From packets: inputs "draw" and, per view, the bytes and "<view>_frames". `decoder` is "mixed" (NVDEC) or "cpu"
    (VP9 and MJPEG only)."""
    draw = fn.external_source(name="draw", device="cpu")
    outputs = []
    for view in views:
        packets = fn.external_source(name=view, device="cpu")
        chosen = fn.external_source(name=f"{view}_frames", device="cpu")
        frames = fn.decoders.video(packets, device=decoder, frames=chosen)
        if view == "flow":  # u over v in the luma; neutral chroma decodes to R = G = B = luma
            u = fn.slice(frames, rel_start=[0.0], rel_shape=[0.5], axis_names="H")
            v = fn.slice(frames, rel_start=[0.5], rel_shape=[0.5], axis_names="H")
            frames = fn.cat(u[:, :, :, 0:1], v[:, :, :, 0:1], axis=3)
        outputs.append(augment(frames, draw, view, size))
    return tuple(outputs)


class ClipGraph:
    """The DALI graph of a loader, built once: up to `max_clips` clips in, one tensor per view out."""

    def __init__(
        self, data: DataConfig, views: Sequence[str], device: torch.device, max_clips: int, decoder: str | None
    ) -> None:
        """`decoder` None: fed with frames; "mixed" or "cpu": fed with packets for that `fn.decoders.video`."""
        self._views, self._encoded, self._lock = tuple(views), decoder is not None, threading.Lock()
        options: dict[str, Any] = {"batch_size": max_clips, "num_threads": data.workers, "device_id": None}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream is not None:
            options["device_id"] = self._stream.device.index
        if decoder is None:
            self._pipeline = decoded_graph(self._views, data.size, **options)
        else:
            self._pipeline = encoded_graph(self._views, data.size, decoder, **options)
        self._pipeline.build()

    def run(self, clips: Clips, samples: dict[str, list]) -> dict[str, Tensor]:
        """view -> float32 [M, 3, T, S, S], channels_last_3d."""
        with self._lock:  # two epochs of one loader may be read at the same time
            self._pipeline.feed_input("draw", _draw_rows(clips))
            for view in self._views:
                if self._encoded:
                    self._pipeline.feed_input(view, [packets for packets, _ in samples[view]])
                    self._pipeline.feed_input(f"{view}_frames", [frames for _, frames in samples[view]])
                else:
                    self._pipeline.feed_input(view, samples[view])
            tensors = self._owned(self._pipeline.run())  # [M, T, S, S, 3]
        return {view: t.permute(0, 4, 1, 2, 3) for view, t in zip(self._views, tensors, strict=True)}

    def _owned(self, outputs: Sequence[Any]) -> list[Tensor]:
        """DALI's outputs as tensors that live as long as they are referenced."""
        if self._stream is None:  # no copy: the tensor holds DALI's buffer
            return [torch.from_dlpack(output.as_tensor()) for output in outputs]
        # DALI's pool does not know when the kernels of torch's streams have read a buffer that is given back to it.
        with torch.cuda.stream(self._stream):
            tensors = [torch.from_dlpack(output.as_tensor()).clone() for output in outputs]
        self._stream.synchronize()  # in the background thread, and on the copies alone
        for tensor in tensors:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensors


def _draw_rows(clips: Clips) -> np.ndarray:
    """float32 [M, 11]: box 4, flip, brightness, contrast, saturation, hue, any colour change, sigma."""
    colour = (clips.brightness, clips.contrast, clips.saturation, clips.hue)
    neutral = np.logical_and.reduce([value == rest for value, rest in zip(colour, (1, 1, 1, 0), strict=True)])
    return np.column_stack([clips.box, clips.flip, *colour, ~neutral, clips.sigma]).astype(np.float32)


def _clip_stream(
    index: Index, data: DataConfig, views: Sequence[str], device: torch.device, max_clips: int
) -> ClipStream:
    """Packets and the hardware decoder for a CUDA device, decoded frames elsewhere."""
    if "flow" in views:
        for video in index:
            if video.flow_path is None:
                raise InputError(f"video {str(video.path)!r} has no flow_path in the index; run `cpr-fast flow` first")
    threads = {"workers": data.workers, "prefetch": data.prefetch}
    if device.type == "cuda":
        graph = ClipGraph(data, views, device, max_clips, "mixed")
        reader = ClipReader(index, data, views, fetch_packets)
        return ClipStream(reader, graph, checked_fetch=fetch_checked_packets, **threads)
    cache = FrameCache(data.cache_gib)
    reader = ClipReader(index, data, views, partial(fetch_frames, read=cache.read))
    return ClipStream(reader, ClipGraph(data, views, device, max_clips, None), **threads)


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
        self._sources, self._plan_clips = Sources.of(index), plan
        clips = len(plan(self._sources, np.array([0]), data, seed, 0))  # of a video
        self._clips = _clip_stream(index, data, views, torch.device(device), clips * data.batch_size)
        self._labels, self._source_ids = torch.from_numpy(index.labels), torch.from_numpy(index.source_ids)

    def __len__(self) -> int:
        """Steps of an epoch; the videos left over after the last full global batch wait for another epoch's order."""
        return self._steps

    @property
    def skipped(self) -> list[tuple[Path, str]]:
        return self._clips.reader.skipped

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `start_step` on: the same ones, bitwise, wherever it starts."""
        order = epoch_order(len(self._index), self._seed, epoch)
        steps = (self._plan(order, epoch, step) for step in range(start_step, self._steps))
        return self._clips.stream(steps, self._batch)

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
                clips[np.arange(row, len(clips), batch)],
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
        count = len(materials)  # B; the graph gets all first clips, then all second clips
        order = [(material, clip) for clip in range(len(materials[0].clips)) for material in materials]
        clips, tensors = self._clips.run(order)
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
        self._batch_size = batch_size or data.batch_size
        sources = Sources.of(index)
        windows = [plan_windows(sources, video, data, clips_per_video, crops) for video in range(len(index))]
        self._windows = Clips.concatenate(windows)
        if jitter_seed is not None:
            self._windows = with_test_jitter(self._windows, jitter_seed)
        self._clips = _clip_stream(index, data, views, torch.device(device), self._batch_size)

    def __len__(self) -> int:
        """Batches, if every file can be read."""
        return math.ceil(len(self._windows) / self._batch_size)

    @property
    def skipped(self) -> list[tuple[Path, str]]:
        return self._clips.reader.skipped

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
        order = [(material, clip) for material in materials for clip in range(len(material.clips))]
        clips, tensors = self._clips.run(order)
        return WindowBatch(tensors, torch.from_numpy(clips.video), torch.from_numpy(clips.crop))
