"""Measures the stages of a training step (read, decode, augment, copy, step) and advises on the slowest one.

Letters: B videos of a batch, V views.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch

from cpr_fast.config import Config, DataConfig
from cpr_fast.data.clips.cut import cut_clips
from cpr_fast.data.clips.graph import ClipGraph
from cpr_fast.data.clips.loader import TrainLoader, decoded_views
from cpr_fast.data.clips.reader import needed_parts, source_frames
from cpr_fast.data.clips.sampling import Clips, Sources, epoch_order, plan_pairs
from cpr_fast.data.files.access import read_whole
from cpr_fast.data.files.names import is_remote
from cpr_fast.data.flow.on_the_fly import frame_reader
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.storage.media import container, is_pictures, read_jpegs
from cpr_fast.data.video.container import VideoError
from cpr_fast.models import build_encoder
from cpr_fast.runtime.busy import OtherPrograms
from cpr_fast.runtime.progress import announce
from cpr_fast.wording import counted

LEAST_BUDGET_S = 2.0  # processor time of `least_step_s`

ADVICE = {
    "read": "reading from the disk is slow: copy the data to a local disk or to /dev/shm, or make it smaller with "
    "`cpr-fast index --transcode`",
    "decode": "decoding is slow: use `cpr-fast index --transcode` (more key frames, 256 pixels high or wide), a larger "
    "data.cache_gib, JPEG records in an LMDB file, or a GPU (NVDEC)",
    "flow": 'computing flow on the fly is slow: store it once with `cpr-fast flow` (and data.flow = "stored"), or '
    "compute it on a GPU",
    "vectors": "reading motion vectors is slow, because it decodes the video once more, on the CPU: use a larger "
    "data.cache_gib or more data.workers",
    "augment": "augmentation is slow: increase data.workers, or use a GPU, where it runs beside the decoder",
    "copy": "copying to the device is slow: use fewer views, or a smaller data.size or data.frames",
    "step": 'the network is the slowest stage, as it should be: the data keep up. optim.precision = "bf16" or more '
    "GPUs make steps shorter",
}


def breakdown(index: Index, config: Config, views: tuple[str, ...], *, device: torch.device, seconds: float) -> dict:
    """Measures a training step of B videos stage by stage, and the loader as a whole, in about `seconds`.

    Reading, decoding and cutting are measured for one video at a time and divided by the number of workers. Files are
    dropped from the page cache first, so that "read" measures the disk. The network's part is the cost of a mining
    step: forward and backward of the query clip, and forward of the second clip of each view. On the CPU it is measured
    on two clips, then on more while the time allows it, and scaled up to B.

    Returns:
        "batch_size" (B), "views", "workers", "videos_measured", "mean_frames", "stage_s_per_step" (seconds by stage),
        "loader_s_per_step", "step_measured_on_clips", "bottleneck" (the slowest stage; the step only if the loader as a
        whole keeps up with it), "data_wait_fraction" (share of a step that would wait for data, 0..1),
        "other_programs" (the sentence of `OtherPrograms`, "" if there were hardly any), and "advice".
    """
    others = OtherPrograms()
    data = config.data
    batch = min(data.batch_size, len(index))
    data = dataclasses.replace(data, batch_size=batch)
    sources, plans = Sources.of(index, data), _plans(index, config, data)
    cores = os.cpu_count() or 1
    share = batch / min(data.workers, cores)
    announce("  reading and decoding")
    decoded = decoded_views(views)
    read_s, decode_s, flow_s, cut_s, kept = _read_and_cut(index, plans, data, decoded, device, 0.3 * seconds)
    augment_s = cut_s * share + _augment(kept[:batch], data, decoded, 0.1 * seconds) * batch
    copy_s = _copy(batch, data, views, device)
    announce("  the network")
    part_s, clips = _step(config, len(views), batch, device, 0.3 * seconds)
    step_s = part_s * batch / clips
    announce("  the loader as a whole")
    loader_s = _loader(index, data, views, config.run.seed, device, 0.3 * seconds)
    stages = {
        "read": read_s * share,
        "decode": decode_s * share,
        **({"flow": flow_s * batch} if data.flow != "stored" else {}),  # clips are computed one at a time, on all cores
        "augment": augment_s,
        "copy": copy_s,
        "step": step_s,
    }
    keeps_up = step_s >= loader_s  # parts that together take longer than the step may each take less
    slowest = max(stages if keeps_up else stages.keys() - {"step"}, key=stages.__getitem__)
    advice = ADVICE["vectors" if slowest == "flow" and data.flow == "vectors" else slowest]
    if slowest == "decode" and data.workers < cores:
        advice = f"increase data.workers (now {data.workers}, this machine has {cores} cores); then: {advice}"
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
        "other_programs": others.sentence(),
        "advice": advice,
    }


def step_time(measured: dict) -> tuple[float, str]:
    """Returns the seconds of a step that `breakdown` measured, of the network or of the loader, whichever is slower;
    and " on 2 of its 24 clips" where the network was measured on a part of the batch, else ""."""
    network_s, loader_s = measured["stage_s_per_step"]["step"], measured["loader_s_per_step"]
    if loader_s >= network_s or measured["step_measured_on_clips"] >= measured["batch_size"]:
        return max(network_s, loader_s), ""
    return network_s, f" on {measured['step_measured_on_clips']} of its {counted(measured['batch_size'], 'clip')}"


def _plans(index: Index, config: Config, data: DataConfig) -> Iterator[Clips]:
    """Yields the clips to cut from one training video after another, epoch after epoch."""
    sources, epoch = Sources.of(index, data), 0
    while True:
        for video in epoch_order(len(index), config.run.seed, epoch):
            yield plan_pairs(sources, np.array([video]), data, config.run.seed, epoch)
        epoch += 1


def _read_and_cut(
    index: Index,
    plans: Iterator[Clips],
    data: DataConfig,
    views: tuple[str, ...],
    device: torch.device,
    budget_s: float,
) -> tuple[float, float, float, float, list[tuple[Clips, dict[str, list]]]]:
    """Returns seconds per video to read its files, to decode its clips, to compute their flow and to cut and finish
    them; and the finished clips of up to 64 videos by view.

    As in training, frames are cut while they are decoded: whole frames of 64 videos of 1920x1080 would take 25 GB.

    Raises VideoError if none of the first 64 clips can be read.
    """
    read_s, kept, failed = 0.0, [], 0
    seconds = {"decode": 0.0, "flow": 0.0, "cut": 0.0}
    computed, reader = data.flow != "stored", frame_reader(data, device)
    end = time.perf_counter() + budget_s
    while len(kept) < 64 and (time.perf_counter() < end or not kept) and failed < 64:
        plan = next(plans)
        video = index[int(plan.video[0])]
        began = time.perf_counter()
        for view in ["rgb"] if computed else views:
            _read(video, view, plan, data)
        read, spent, clips = time.perf_counter() - began, dict.fromkeys(seconds, 0.0), {}
        try:
            for view in views:
                stage = "flow" if computed and view != "rgb" else "decode"
                began = time.perf_counter()
                region, frames, parts = needed_parts(video, plan, view, data, reader if stage == "flow" else None)
                cutting = time.perf_counter()
                spent[stage] += cutting - began
                timed = _Timed(parts)
                clips[view] = cut_clips(timed, plan, view, data, region, finish=True, frames=frames)
                spent[stage] += timed.seconds
                spent["cut"] += time.perf_counter() - cutting - timed.seconds
        except VideoError:
            failed += 1
            if failed == 64 and not kept:
                raise
            continue
        read_s += read
        seconds = {stage: total + spent[stage] for stage, total in seconds.items()}
        kept.append((plan, clips))
    count = len(kept)
    return read_s / count, *(total / count for total in seconds.values()), kept


class _Timed:
    """Passes on the parts of a clip; `seconds` is the time that making them took."""

    def __init__(self, parts: Iterable[np.ndarray]) -> None:
        self._parts, self.seconds = iter(parts), 0.0

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        began = time.perf_counter()
        try:
            return next(self._parts)
        finally:
            self.seconds += time.perf_counter() - began


def _read(video: Video, view: str, plan: Clips, data: DataConfig) -> None:
    """Reads the data that the clips need from the disk: a whole file, or the JPEGs of a record."""
    path = video.flow_path if view == "flow" else video.path
    try:
        if is_pictures(path):
            for jpeg in read_jpegs(path, np.unique(source_frames(video, plan, view, data))):
                bytes(jpeg)
            return
        if container(path) != path or is_remote(path):
            read_whole(path)
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            while os.read(descriptor, 1 << 20):
                pass
        finally:
            os.close(descriptor)
    except (OSError, VideoError):
        return  # the error occurs again when the video is decoded, and is counted there


def _augment(kept: list, data: DataConfig, views: tuple[str, ...], budget_s: float) -> float:
    """Returns the seconds per video of the augmentation graph, on all threads of the CPU."""
    graph = ClipGraph(data, dict.fromkeys(views, "frames"), torch.device("cpu"), 2 * len(kept))
    clips = Clips.concatenate([plan for plan, _ in kept])
    samples = {view: [clip for _, cut in kept for clip in cut[view]] for view in views}
    return _repeat(lambda: graph.run(clips, samples), budget_s) / len(kept)


def _copy(batch: int, data: DataConfig, views: tuple[str, ...], device: torch.device) -> float:
    """Returns the seconds it takes to copy a batch to the device; 0 on the CPU."""
    if device.type != "cuda":
        return 0.0
    clips = torch.empty(len(views), batch, 2, 3, data.frames, data.size, data.size)

    def copy() -> None:
        clips.to(device)
        torch.cuda.synchronize(device)

    return _repeat(copy, 1.0)


def least_step_s(config: Config, views: int, batch: int, *, device: torch.device) -> float:
    """Returns seconds that a training step of `batch` videos takes at least: those of the networks alone, on as many of
    its clips as can be measured within some seconds."""
    return _step(config, views, batch, device, LEAST_BUDGET_S)[0]


def _step(config: Config, views: int, batch: int, device: torch.device, budget_s: float) -> tuple[float, int]:
    """Returns the seconds of the networks in a step of as many of `batch` clips as `budget_s` allows, and this number.

    Every operation has a cost that does not depend on the batch, mostly of threads that wait for each other. Scaled up
    from two clips, it would count batch / 2 times: of a small network on a busy machine that is most of the time. The
    measurement is therefore repeated on more clips as long as the processor time of a call, which does not grow with
    what other programs do, is expected to fit into `budget_s`.

    What other programs take from a call is nothing of the step: the time is the least of all calls, that to warm up
    among them, and at most that of fewer clips scaled up.
    """
    data = config.data
    encoder = build_encoder(config.model, config.data).to(device)

    def step(clips: torch.Tensor) -> None:
        encoder(clips).square().sum().backward()
        with torch.no_grad():
            for _ in range(views):
                encoder(clips)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def measured(count: int, *, first: bool) -> tuple[float, float]:
        clips, used = torch.rand(count, 3, data.frames, data.size, data.size, device=device), []

        def call() -> None:
            began = time.perf_counter(), time.process_time()
            step(clips)
            used.append((time.perf_counter() - began[0], time.process_time() - began[1]))

        _repeat(call, budget_s / 4, warm_up=first)
        seconds, processor_s = map(min, zip(*used, strict=True))
        return seconds, processor_s / count

    count = batch if device.type == "cuda" else min(2, batch)
    seconds, clip_s = measured(count, first=True)
    while count < batch and clip_s * (more := min(batch, 4 * count)) < budget_s:
        most = seconds * more / count
        seconds, clip_s = measured(count := more, first=False)
        seconds = min(seconds, most)
    return seconds, count


def _loader(
    index: Index, data: DataConfig, views: tuple[str, ...], seed: int, device: torch.device, budget_s: float
) -> float:
    """Returns the seconds per batch of the loader alone. Its cache is disabled, because a large data set would not fit
    into it."""
    loader = TrainLoader(index, dataclasses.replace(data, cache_gib=0, disk_cache=""), views, seed=seed, device=device)
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


def _repeat(call: Callable[[], object], budget_s: float, *, warm_up: bool = True) -> float:
    """Returns the median seconds of 1 to 20 calls, after one call to warm up."""
    if warm_up:
        call()
    times, end = [], time.perf_counter() + budget_s
    while len(times) < 20 and (not times or time.perf_counter() < end):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return float(np.median(times))
