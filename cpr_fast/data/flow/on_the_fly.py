"""Computes the flow of a clip from its own frames, for `data.flow = "on_the_fly"`; no flow is stored.

The levels equal those that `cpr-fast flow` computes before it encodes them: the same gray frames of the same size go
through the same operator. On the CPU a pair of 340x256 takes 0.03 s of an AVX-512 core
(`bench/results/tvl1_flow_cpu.json`), so two clips of 32 frames take seconds. Use a GPU or stored flow for more than a
small data set.

Letters: F fields (flow between two neighbouring frames), H x W pixels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from cpr_fast.config import DataConfig
from cpr_fast.data.flow.levels import FlowSolver, batch_pixels
from cpr_fast.data.storage.media import read_frames, read_parts
from cpr_fast.data.video.pixels import Region

ReadParts = Callable[
    [Path, Sequence[int] | np.ndarray, str, int, Region | None], Iterator[np.ndarray]
]  # the type of `media.read_parts`
CPU = torch.device("cpu")


def frame_reader(data: DataConfig, device: torch.device = CPU) -> ReadParts:
    """Returns `media.read_parts`, or with `data.flow = "on_the_fly"` a reader that computes the view "flow" on
    `device`.
    """
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
