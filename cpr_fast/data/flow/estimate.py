"""Estimates the time, core-hours and disk space for computing the flow of an index, before the computation starts.

The time comes from a few frame pairs that are solved here, on the machine and device that will do the work. It is an
estimate: the time for a pair depends on the amount of motion in it (within a factor of two on UCF101).

Letters: H x W pixels.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cpr_fast.data.flow import files, records
from cpr_fast.data.flow.levels import FlowSolver
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.storage.media import read_frames
from cpr_fast.runtime.progress import duration

BYTES_PER_PIXEL = {"video": files.BYTES_PER_PIXEL, "lmdb": records.BYTES_PER_PIXEL}
READ_AND_STORE_S = 4e-8  # CPU time for a pixel of a frame pair besides the solver: decoding, encoding, copies
SAMPLED_VIDEOS, SAMPLED_PAIRS_CUDA, MOST_MEASURED_S = 4, 32, 5.0


@dataclass(frozen=True)
class FlowEstimate:
    """The cost of computing the flow of some videos. The times are None where no frame pair could be measured."""

    videos: int
    pairs: int  # of frames
    disk_bytes: int
    core_s: float | None  # CPU time, all threads together
    wall_s: float | None  # with the threads and the device of this process, on an otherwise idle machine


def estimate_flow(
    index: Index, positions: Sequence[int] | None = None, *, storage: str = "video", solver: FlowSolver | None = None
) -> FlowEstimate:
    """Estimates the cost of the flow of the videos at `positions` of an index; by default of all videos without flow.

    `storage` is "video" or "lmdb"; `solver` names the device, by default the CPU. Takes a few seconds at most.
    """
    if positions is None:
        positions = [position for position, video in enumerate(index) if video.flow_path is None]
    videos = [index[position] for position in positions if index[position].num_frames > 1]
    pairs = sum(video.num_frames - 1 for video in videos)
    pixels = sum((video.num_frames - 1) * video.width * video.height for video in videos)
    costs = _measure(videos, solver or FlowSolver(torch.device("cpu"))) if videos else None
    core_s = wall_s = None
    if costs is not None:
        core_s, wall_s = (pixels * cost for cost in costs)
    return FlowEstimate(len(positions), pairs, int(pixels * BYTES_PER_PIXEL[storage]), core_s, wall_s)


def describe(estimate: FlowEstimate, out: Path) -> list[str]:
    """Returns the time and disk of an estimate as lines of readable text."""
    lines = []
    if estimate.wall_s is not None:
        hours = estimate.core_s / 3600
        hours = f"{hours:,.0f}" if hours >= 10 else f"{hours:.2f}"
        lines.append(
            f"  expected time: about {duration(estimate.wall_s)} on an otherwise idle machine ({hours} core-hours)"
        )
    free = free_bytes(out)
    lines.append(f"  expected disk: about {size(estimate.disk_bytes)} in {out} ({size(free)} are free)")
    if estimate.disk_bytes > free:
        lines.append("  warning: the disk will be full before the flow is complete")
    return lines


def size(count: float) -> str:
    """Returns a number of bytes as readable text, such as "12 MB" or "1.4 TB"."""
    for limit, unit, name in ((1e6, 1e3, "kB"), (1e9, 1e6, "MB"), (1e12, 1e9, "GB")):
        if count < limit:
            return f"{count / unit:,.0f} {name}"
    return f"{count / 1e12:,.1f} TB"


def free_bytes(out: Path) -> int:
    """Returns the free bytes of the disk on which `out` is or will be."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _measure(videos: list[Video], solver: FlowSolver) -> tuple[float, float] | None:
    """Returns the CPU time and the elapsed time in seconds per pixel of a frame pair, with all threads of this process;
    None if no video could be read."""
    chosen = videos[:: max(1, len(videos) // SAMPLED_VIDEOS)][:SAMPLED_VIDEOS]
    end = time.perf_counter() + MOST_MEASURED_S
    total = np.zeros(3)  # CPU s, elapsed s, pixels
    for video in chosen:
        with suppress(Exception):  # errors of a video are reported when its flow is computed
            total += _measure_video(video, solver)
        if time.perf_counter() > end:
            break
    cpu_s, elapsed_s, pixels = total
    if pixels == 0:
        return None
    store_s = READ_AND_STORE_S / len(os.sched_getaffinity(0))
    if solver.device.type == "cuda":  # the device solves while the CPU reads and stores
        return READ_AND_STORE_S, max(elapsed_s / pixels, store_s)
    # CPU time, because the elapsed time of a single pair says little on a machine that is busy with other work.
    return cpu_s / pixels + READ_AND_STORE_S, cpu_s / pixels / torch.get_num_threads() + store_s


def _measure_video(video: Video, solver: FlowSolver) -> tuple[float, float, int]:
    """Returns the CPU time and elapsed time in seconds, and the number of pixels, for frame pairs from the middle of a
    video: one pair on the CPU, where one thread solves a pair, and several on a GPU."""
    cuda = solver.device.type == "cuda"
    frames = min(video.num_frames, 1 + (SAMPLED_PAIRS_CUDA if cuda else 1))
    first = (video.num_frames - frames) // 2
    gray = read_frames(video.path, np.arange(first, first + frames), "gray", video.num_frames)
    pairs = np.stack([gray[:-1], gray[1:]], axis=1)
    solver.levels(pairs if cuda else pairs[..., :16, :16])  # the first call loads the library, or the kernels
    cpu, elapsed = time.thread_time(), time.perf_counter()
    solver.levels(pairs)
    return time.thread_time() - cpu, time.perf_counter() - elapsed, pairs[:, 0].size
