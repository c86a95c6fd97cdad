"""Estimates the time, core-hours and disk space for computing the flow of an index, before the computation starts.

The time comes from a few videos that are read, solved and stored here, on the machine, disk and device that will do the
work; no constant of another machine is used. It is an estimate: the time for a pair depends on the amount of motion in
it (within a factor of two on UCF101).

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
from tempfile import gettempdir
from typing import NamedTuple

import numpy as np
import torch

from cpr_fast.data.flow import files, records
from cpr_fast.data.flow.levels import FlowSolver
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.storage.media import read_frames
from cpr_fast.data.storage.record_writer import RecordWriter
from cpr_fast.runtime.files import temporary_folder
from cpr_fast.runtime.progress import about
from cpr_fast.wording import counted

BYTES_PER_PIXEL = {"video": files.BYTES_PER_PIXEL, "lmdb": records.BYTES_PER_PIXEL}
SAMPLED_VIDEOS, MOST_MEASURED_S = 4, 6.0
SAMPLED_PAIRS, SAMPLED_PAIRS_CUDA = 8, 32  # frame pairs solved per video; on the CPU fewer if they take long
SAMPLED_FRAMES = 64  # number of frames that are read and stored per video
BUSY = 1.3  # from this load on, the estimate also states the time at the present load


@dataclass(frozen=True)
class FlowEstimate:
    """The cost of computing the flow of some videos. The times are None where no frame pair could be measured."""

    videos: int
    pairs: int  # number of frame pairs
    disk_bytes: int
    core_s: float | None  # CPU time, all threads together
    wall_s: float | None  # with the threads and the device of this process, on an otherwise idle machine
    load: float = 1.0  # how many times as long the measured work took because of other work on this machine
    threads: int | None = None  # number of threads that solve; None on a GPU, and where nothing was measured

    @property
    def idle_cores(self) -> str:
        """Why the time is that of fewer cores than this process may use, to follow the time; "" if it is not."""
        cores = len(os.sched_getaffinity(0))
        if self.threads is None or self.threads >= cores:
            return ""
        return f" with {counted(self.threads, 'thread')} on {cores} cores (OMP_NUM_THREADS={cores} uses all)"


def estimate_flow(
    index: Index,
    positions: Sequence[int] | None = None,
    *,
    storage: str = "video",
    solver: FlowSolver | None = None,
    out: Path | None = None,
) -> FlowEstimate:
    """Estimates the cost of the flow of the videos at `positions` of an index; by default of all videos without flow.

    `storage` is "video" or "lmdb"; `solver` names the device, by default the CPU. Flow is stored for the measurement in
    a temporary folder, beside `out` if it is given. Takes a few seconds.
    """
    if positions is None:
        positions = [position for position, video in enumerate(index) if video.flow_path is None]
    videos = [index[position] for position in positions if index[position].num_frames > 1]
    pairs = sum(video.num_frames - 1 for video in videos)
    pixels = sum((video.num_frames - 1) * video.width * video.height for video in videos)
    core_s = wall_s = threads = None
    load = 1.0
    solver = solver or FlowSolver(torch.device("cpu"))
    if videos and (cost := _measure(videos, solver, storage, out)) is not None:
        core_s, wall_s, load = pixels * cost.core_s, pixels * cost.wall_s, cost.load
        threads = torch.get_num_threads() if solver.device.type == "cpu" else None
    return FlowEstimate(len(positions), pairs, int(pixels * BYTES_PER_PIXEL[storage]), core_s, wall_s, load, threads)


def describe(estimate: FlowEstimate, out: Path) -> list[str]:
    """Returns the time and disk of an estimate as lines of readable text."""
    lines = []
    if estimate.wall_s is not None:
        hours = estimate.core_s / 3600
        hours = f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
        idle = f"{about(estimate.wall_s)}{estimate.idle_cores} on an otherwise idle machine ({hours} core-hours)"
        now = f"{about(estimate.wall_s * estimate.load)} at the present load of this machine, "
        lines.append(f"  expected time: {now if estimate.load >= BUSY else ''}{idle}")
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
    return shutil.disk_usage(_existing(out)).free


def _existing(out: Path) -> Path:
    """Returns the nearest folder above `out`, or `out` itself, that exists."""
    folder = out.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


class _Cost(NamedTuple):
    """The cost of a pixel of a frame pair: CPU time of all threads, elapsed time with all threads of this process, and
    how many times as long the measurement took as its CPU time."""

    core_s: float
    wall_s: float
    load: float


def _measure(videos: list[Video], solver: FlowSolver, storage: str, out: Path | None) -> _Cost | None:
    """Returns the cost of flow, or None if no video could be read."""
    chosen = videos[:: max(1, len(videos) // SAMPLED_VIDEOS)][:SAMPLED_VIDEOS]
    beside = None if out is None else _existing(out)
    end, found = time.monotonic() + MOST_MEASURED_S, []
    with temporary_folder(beside if beside and os.access(beside, os.W_OK) else gettempdir()) as folder:
        for number, video in enumerate(chosen):
            with suppress(Exception):  # errors of a video are reported when its flow is computed
                found.append(_measure_video(video, solver, storage, folder / str(number)))
            if time.monotonic() > end:
                break
    if not found:
        return None
    other, solve, elapsed, load = np.mean(found, axis=0)
    other_wall = other / len(os.sched_getaffinity(0))
    if solver.device.type == "cuda":  # the device solves while the CPU reads and stores
        return _Cost(other, max(elapsed, other_wall), load)
    # CPU time, because the elapsed time of a few pairs says little on a machine that is busy with other work.
    return _Cost(solve + other, solve / torch.get_num_threads() + other_wall, load)


def _measure_video(video: Video, solver: FlowSolver, storage: str, folder: Path) -> tuple[float, float, float, float]:
    """Returns seconds per pixel of a frame pair: CPU time of reading and storing, CPU time of solving, elapsed time of
    solving; and elapsed time over CPU time where the CPU does the work.

    Pairs from the middle of the frames are solved: on the CPU one after another, each by one thread, on a GPU at once.
    Their flow, forwards and backwards in turn, is stored for as many pairs as were read.
    """
    cuda = solver.device.type == "cuda"
    frames = np.arange(min(video.num_frames, SAMPLED_FRAMES))
    read = _Clock()
    gray = read_frames(video.path, frames, "gray", video.num_frames)
    read.stop()
    count = min(len(gray) - 1, SAMPLED_PAIRS_CUDA if cuda else SAMPLED_PAIRS)
    first = (len(gray) - 1 - count) // 2
    pairs = np.stack([gray[first : first + count], gray[first + 1 : first + count + 1]], axis=1)
    solver.levels(pairs if cuda else pairs[:1, :, :16, :16])  # the first call loads the library, or the kernels
    solved, levels, end = _Clock(), [], time.monotonic() + MOST_MEASURED_S / SAMPLED_VIDEOS
    for part in [pairs] if cuda else np.split(pairs, count):
        levels.append(solver.levels(part))
        if time.monotonic() > end:
            break
    solved.stop()
    levels = np.concatenate(levels)
    turn = [*range(len(levels)), *range(len(levels) - 2, 0, -1)]
    folder.mkdir()
    stored = _Clock()
    _store(levels[np.resize(turn, len(gray) - 1)], storage, folder)
    stored.stop()
    pixels = gray[0].size
    other = read.cpu_s / len(gray) + stored.cpu_s / (len(gray) - 1)
    on_cpu = [read, stored] if cuda else [read, solved, stored]
    load = sum(clock.elapsed_s for clock in on_cpu) / max(1e-9, sum(clock.cpu_s for clock in on_cpu))
    return other / pixels, solved.cpu_s / len(levels) / pixels, solved.elapsed_s / len(levels) / pixels, max(1.0, load)


def _store(levels: np.ndarray, storage: str, folder: Path) -> None:
    if storage == "video":
        files.encode_video(folder / "flow.mp4", levels)
        return
    with RecordWriter(folder / "flow.lmdb") as writer:
        writer.put("flow", records.encode_jpegs(levels))


class _Clock:
    """CPU time of this thread and elapsed time, in seconds, until `stop`."""

    def __init__(self) -> None:
        self.cpu_s, self.elapsed_s = -time.thread_time(), -time.perf_counter()

    def stop(self) -> None:
        """Replaces both times by those that have passed since the creation."""
        self.cpu_s, self.elapsed_s = self.cpu_s + time.thread_time(), self.elapsed_s + time.perf_counter()
