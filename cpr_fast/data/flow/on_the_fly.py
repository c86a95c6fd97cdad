"""Gives the flow of a clip without a stage that stores it: TV-L1 of its own frames, for `data.flow = "on_the_fly"`, or
the motion vectors of the video, for `data.flow = "vectors"`.

The levels of TV-L1 equal those that `cpr-fast flow` computes before it encodes them: the same gray frames of the same
size go through the same operator. On the CPU a pair of 340x256 takes 0.03 s of an AVX-512 core
(`bench/results/tvl1_flow_cpu.json`), so two clips of 32 frames take seconds. Use a GPU or stored flow for more than a
small data set.

Letters: F fields (flow between two neighbouring frames), H x W pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cpr_fast.config import DataConfig
from cpr_fast.data.flow.levels import FlowSolver, batch_pixels, quantise
from cpr_fast.data.storage.media import is_pictures, read_frames, read_parts
from cpr_fast.data.video.container import VideoError
from cpr_fast.data.video.decode import PART
from cpr_fast.data.video.pixels import Region
from cpr_fast.data.video.vectors.fields import CELL, read_fields

ReadParts = Callable[
    [Path, Sequence[int] | np.ndarray, str, int, Region | None], Iterator[np.ndarray]
]  # the type of `media.read_parts`
CPU = torch.device("cpu")


def frame_reader(data: DataConfig, device: torch.device = CPU) -> ReadParts:
    """Returns `media.read_parts`, or a reader of the flow that `data.flow` names; TV-L1 is computed on `device`."""
    if data.flow == "vectors":
        return VectorFlow(1 if data.fps else data.stride)
    return ComputedFlow(device) if data.flow == "on_the_fly" else read_parts


class ComputedFlow:
    """A `read_parts` that computes the view "flow" of a video from its frames; safe to call from several threads."""

    def __init__(self, device: torch.device) -> None:
        self._solver = FlowSolver(device)
        # A separate stream, because flow and training would wait for each other on the default stream.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._lock = threading.Lock()  # one call uses all threads or the whole device, so parallel calls are not faster

    def __call__(
        self, path: Path, frames: Sequence[int] | np.ndarray, view: str, num_frames: int, region: Region | None = None
    ) -> Iterator[np.ndarray]:
        """Yields the flow as a single part, uint8 [F, H, W, 2]; other views are read as `media.read_parts` reads them.

        For "flow" `frames` are numbers of fields, and `num_frames` counts fields: one less than the video has frames.
        """
        if view != "flow":
            yield from read_parts(path, frames, view, num_frames, region)
            return
        fields = np.asarray(frames)
        needed = np.union1d(fields, fields + 1)
        gray = read_frames(path, needed, "gray", num_frames + 1)
        first = np.searchsorted(needed, fields)
        pairs = np.stack([gray[first], gray[first + 1]], axis=1)  # [F, 2, H, W]
        batch = max(1, batch_pixels(self._solver.device) // gray[0].size)
        with self._lock, nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            levels = [self._solver.levels(pairs[i : i + batch]) for i in range(0, len(pairs), batch)]
        flow = np.ascontiguousarray(np.concatenate(levels).transpose(0, 2, 3, 1))
        yield flow if region is None else region.of(path, flow, view)


@dataclass(frozen=True)
class VectorFlow:
    """A `read_parts` that takes the view "flow" of a video from its motion vectors; safe to call from several threads.

    Attributes:
        span: Frames over which motion is added up, those between two frames of a clip. The sum is taken at each place
            of the picture; it does not follow a moving point. It ends at the last frame of the video.
    """

    span: int

    def __call__(
        self, path: Path, frames: Sequence[int] | np.ndarray, view: str, num_frames: int, region: Region | None = None
    ) -> Iterator[np.ndarray]:
        """Yields the flow, uint8 [F, H, W, 2], a few fields at a time; see `ComputedFlow`. Raises VideoError."""
        if view != "flow":
            yield from read_parts(path, frames, view, num_frames, region)
            return
        if is_pictures(path):
            raise VideoError(path, "data.flow = 'vectors' reads the motion vectors of a coded video, got pictures")
        for run in _runs(np.asarray(frames), self.span):
            last = min(int(run[-1]) + self.span, num_frames) - 1
            motion, wanted = read_fields(path, int(run[0]), last, num_frames + 1, region)
            for begin in range(0, len(run), PART):
                first = run[begin : begin + PART] - run[0]
                yield self._levels(motion, first, wanted)

    def _levels(self, motion: np.ndarray, first: np.ndarray, region: Region) -> np.ndarray:
        """Returns the levels of the sums from fields `first` on, uint8 [F, H, W, 2], cut to the region."""
        sums = np.stack([motion[place : place + self.span].sum(axis=0) for place in first.tolist()])
        pairs = quantise(torch.from_numpy(sums)).numpy().view(np.uint16)[..., 0]  # (u, v) as one number
        top, left, bottom, right = region.box
        wide = pairs.take(np.arange(left, right) // CELL, axis=2)
        return wide.take(np.arange(top, bottom) // CELL, axis=1)[..., None].view(np.uint8)


def _runs(fields: np.ndarray, span: int) -> list[np.ndarray]:
    """Divides field numbers, increasing, where decoding from the next key frame may be shorter than reading on."""
    return np.split(fields, np.flatnonzero(np.diff(fields) > span + PART) + 1)
