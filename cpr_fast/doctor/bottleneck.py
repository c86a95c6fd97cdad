"""Where the time of a training step goes: read, decode, augment, copy, step; and what to change about the slowest.

Letters: B videos of a batch, V views.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from cpr_fast.config import Config, DataConfig
from cpr_fast.data.clips.cut import cut_clips
from cpr_fast.data.clips.graph import ClipGraph
from cpr_fast.data.clips.loader import TrainLoader
from cpr_fast.data.clips.reader import needed_parts
from cpr_fast.data.clips.sampling import Clips, Sources, clip_frames, epoch_order, plan_pairs
from cpr_fast.data.flow.on_the_fly import ReadParts, frame_reader
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.storage.media import is_record
from cpr_fast.data.storage.records import read_jpegs
from cpr_fast.data.video.container import VideoError
from cpr_fast.data.video.pixels import Region
from cpr_fast.models import build_encoder

ADVICE = {
    "read": "the disk: copy the data to a local disk or /dev/shm, or shrink it with `cpr-fast index --transcode`",
    "decode": "decoding: `cpr-fast index --transcode` (short groups of pictures, short side 256), a larger "
    "data.cache_gib, JPEG records in an LMDB file, or a GPU (NVDEC)",
    "flow": 'flow on the fly: store it once with `cpr-fast flow` (data.flow "stored"), or compute it on a GPU',
    "augment": "augmentation: more data.workers, or a GPU, where it runs beside the decoder",
    "copy": "the copy to the device: fewer views, or a smaller data.size or data.frames",
    "step": "the network: the data keeps up, nothing to change about it; optim.precision bf16 and more GPUs make steps "
    "shorter",
}


def breakdown(index: Index, config: Config, views: tuple[str, ...], *, device: torch.device, seconds: float) -> dict:
    """Seconds of a step of B videos by stage, the measured rate of the whole loader, and the slowest stage.

    Reading and decoding are measured one video at a time and divided by the workers that share the work; files are
    dropped from the page cache first, so that "read" is the disk. The step is what a cascade's step costs: the query
    clip forward and backward, both views' second clips forward. On the CPU a batch of two stands for it. Takes about
    `seconds`.
    """
    data = config.data
    batch = min(data.batch_size, len(index))
    data = dataclasses.replace(data, batch_size=batch)
    sources, plans = Sources.of(index, data), _plans(index, config, data)
    cores = os.cpu_count() or 1
    share = batch / min(data.workers, cores)
    read_s, decode_s, flow_s, kept = _read_and_decode(index, plans, data, views, device, 0.3 * seconds)
    augment_s = _augment(kept, data, views, 0.1 * seconds) * batch
    copy_s = _copy(batch, data, views, device)
    step_s, clips = _step(config, len(views), batch, device, 0.3 * seconds)
    loader_s = _loader(index, data, views, config.run.seed, device, 0.3 * seconds)
    stages = {
        "read": read_s * share,
        "decode": decode_s * share,
        **({"flow": flow_s * batch} if data.flow == "on_the_fly" else {}),  # one clip after another, on all cores
        "augment": augment_s,
        "copy": copy_s,
        "step": step_s,
    }
    slowest = max(stages, key=stages.__getitem__)
    advice = ADVICE[slowest]
    if slowest == "decode" and data.workers < cores:
        advice = f"data.workers: {data.workers} of {cores} cores decode; then {advice}"
    return {
        "batch_size": batch,
        "views": list(views),
        "workers": data.workers,
        "videos_measured": len(kept),
        "mean_frames": round(float(sources.num_frames.mean()), 1),
        "stage_s_per_step": {stage: round(value, 4) for stage, value in stages.items()},
        "loader_s_per_step": round(loader_s, 4),
        "step_measured_on_clips": clips,
        "bottleneck": slowest,
        "data_wait_fraction": round(max(0.0, 1 - step_s / max(loader_s, 1e-9)), 3),
        "advice": advice,
    }


def _plans(index: Index, config: Config, data: DataConfig) -> Iterator[Clips]:
    """The training plan of one video after another, epoch after epoch."""
    sources, epoch = Sources.of(index, data), 0
    while True:
        for video in epoch_order(len(index), config.run.seed, epoch):
            yield plan_pairs(sources, np.array([video]), data, config.run.seed, epoch)
        epoch += 1


def _read_and_decode(
    index: Index,
    plans: Iterator[Clips],
    data: DataConfig,
    views: tuple[str, ...],
    device: torch.device,
    budget_s: float,
) -> tuple[float, float, float, list[tuple[Clips, dict[str, list]]]]:
    """(seconds to read a video's files, to decode its clips, to compute their flow, all per video; up to 64 videos'
    clips, and of every view the region and parts of `needed_parts`)."""
    read_s, decode_s, flow_s, kept, failed = 0.0, 0.0, 0.0, [], 0
    computed, reader = data.flow == "on_the_fly", frame_reader(data, device)
    end = time.perf_counter() + budget_s
    while len(kept) < 64 and (time.perf_counter() < end or not kept) and failed < 64:
        plan = next(plans)
        video = index[int(plan.video[0])]
        began = time.perf_counter()
        for view in ["rgb"] if computed else views:
            _read(video, view, plan, data)
        read = time.perf_counter() - began
        began = time.perf_counter()
        try:
            stored = [view for view in views if view == "rgb" or not computed]
            frames = {view: _decoded(video, plan, view, data, None) for view in stored}
            decoded = time.perf_counter()
            frames |= {view: _decoded(video, plan, view, data, reader) for view in views if view not in frames}
        except VideoError:
            failed += 1
            continue
        decode_s += decoded - began
        flow_s += time.perf_counter() - decoded
        read_s += read
        kept.append((plan, frames))
    count = max(1, len(kept))
    return read_s / count, decode_s / count, flow_s / count, kept


def _decoded(
    video: Video, plan: Clips, view: str, data: DataConfig, read: ReadParts | None
) -> tuple[Region, list[np.ndarray]]:
    region, parts = needed_parts(video, plan, view, data, read)
    return region, list(parts)


def _read(video: Video, view: str, plan: Clips, data: DataConfig) -> None:
    """The bytes that the clips need, from the disk: a whole file, or a record's JPEGs."""
    path = video.flow_path if view == "flow" else video.path
    try:
        if is_record(path):
            frames = np.unique([clip_frames(start, data) for start in plan.start])
            for jpeg in read_jpegs(path, frames):
                bytes(jpeg)
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            while os.read(descriptor, 1 << 20):
                pass
        finally:
            os.close(descriptor)
    except (OSError, VideoError):
        return  # counted where it is decoded


def _augment(kept: list, data: DataConfig, views: tuple[str, ...], budget_s: float) -> float:
    """Seconds of cutting and of the graph per video, its threads together, on the CPU."""
    if not kept:
        return 0.0
    some = kept[: data.batch_size]
    graph = ClipGraph(data, dict.fromkeys(views, "frames"), torch.device("cpu"), 2 * len(some))
    clips = Clips.concatenate([plan for plan, _ in some])

    def run() -> None:
        samples: dict[str, list] = {view: [] for view in views}
        for plan, decoded in some:
            for view, (region, parts) in decoded.items():
                samples[view] += cut_clips(parts, plan, view, data, region, finish=True)
        graph.run(clips, samples)

    return _repeat(run, budget_s) / len(some)


def _copy(batch: int, data: DataConfig, views: tuple[str, ...], device: torch.device) -> float:
    """Seconds to copy a batch to the device."""
    if device.type != "cuda":
        return 0.0
    clips = torch.empty(len(views), batch, 2, 3, data.frames, data.size, data.size)

    def copy() -> None:
        clips.to(device)
        torch.cuda.synchronize(device)

    return _repeat(copy, 1.0)


def _step(config: Config, views: int, batch: int, device: torch.device, budget_s: float) -> tuple[float, int]:
    """(seconds of a step's networks for `batch` videos, clips per forward pass it was measured on)."""
    data, count = config.data, batch if device.type == "cuda" else min(2, batch)
    encoder = build_encoder(config.model).to(device)
    clips = torch.rand(count, 3, data.frames, data.size, data.size, device=device)

    def step() -> None:
        encoder(clips).square().sum().backward()
        with torch.no_grad():
            for _ in range(views):
                encoder(clips)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return _repeat(step, budget_s) * batch / count, count


def _loader(
    index: Index, data: DataConfig, views: tuple[str, ...], seed: int, device: torch.device, budget_s: float
) -> float:
    """Seconds per step of the whole loader, nothing else at work; without the cache, which a large set outgrows."""
    loader = TrainLoader(index, dataclasses.replace(data, cache_gib=0), views, seed=seed, device=device)
    end, steps, began = time.perf_counter() + budget_s, 0, 0.0
    try:
        for epoch in range(1000):
            for _ in loader.epoch(epoch):
                steps += 1
                if steps == 1:  # the first batch waits for the graph to be built
                    began = time.perf_counter()
                elif time.perf_counter() > end:
                    return (time.perf_counter() - began) / (steps - 1)
    finally:
        loader.close()
    return (time.perf_counter() - began) / max(1, steps - 1)


def _repeat(call: Callable[[], object], budget_s: float) -> float:
    """Median seconds of a call after one to warm up; at least one, at most 20."""
    call()
    times, end = [], time.perf_counter() + budget_s
    while len(times) < 20 and (not times or time.perf_counter() < end):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times))
