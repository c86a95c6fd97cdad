"""Estimates before long work: disk and core-hours of the flow, time per epoch of the pretraining, and shards."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cpr_fast.config import Config
from cpr_fast.data.flow.files import encode_video
from cpr_fast.data.flow.levels import FlowSolver
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.storage.media import read_frames
from cpr_fast.doctor.findings import Finding, counted

PAIRS = 12  # frame pairs whose flow is computed and stored for the estimate: about a second
LONG_H = 8.0  # hours from which an estimate recommends shards


def estimates(
    index: Path,
    videos: Index,
    train: Index,
    config: Config,
    breakdown: dict[str, Any] | None,
    findings: list[Finding],
) -> dict[str, Any]:
    """Returns what the next steps cost on this machine, measured on a small part of them.

    Args:
        breakdown: the times of a training step, or None where they were not measured.
    Returns:
        "flow_videos", "flow_frame_pairs", "flow_disk_gib", "flow_core_hours", "flow_hours_here" (absent if no flow is
        missing) and "pretrain_epoch_s", "pretrain_epochs", "pretrain_hours" (absent without `breakdown`).
    """
    result: dict[str, Any] = {}
    missing = [video for video in videos if video.flow_path is None and video.num_frames > 1]
    if missing and config.data.flow == "stored":
        result |= _flow(index, missing, findings)
    if breakdown is not None:
        result |= _pretrain(train, config, breakdown, findings)
    return result


def _flow(index: Path, missing: list[Video], findings: list[Finding]) -> dict[str, Any]:
    pairs = sum(video.num_frames - 1 for video in missing)
    pixels = sum((video.num_frames - 1) * video.width * video.height for video in missing)
    measured = _measure_flow(missing)
    if measured is None:
        return {}
    core_s_per_pixel, bytes_per_pixel = measured
    core_hours, cores = pixels * core_s_per_pixel / 3600, len(os.sched_getaffinity(0))
    hours, disk = core_hours / cores, pixels * bytes_per_pixel / 2**30
    text = (f"storing the flow of {counted(len(missing), 'video')} ({counted(pairs, 'frame pair')}) takes about "
            f"{_gib(disk)} of disk and {_hours(core_hours)} of one core: {_hours(hours)} on the "
            f"{counted(cores, 'core')} here")  # fmt: skip
    command = f"cpr-fast flow {index} --out FLOW"
    shards = max(2, min(len(missing), round(hours / LONG_H)))
    advice = f"{command}; it may be stopped and continued"
    if hours > LONG_H:
        advice = (f"divide it among {shards} machines: {command} --shard 0/{shards} on the first one, up to --shard "
                  f"{shards - 1}/{shards} on the last one; or use a GPU: --device cuda")  # fmt: skip
    findings.append(Finding("warning" if hours > LONG_H else "ok", text, advice, "time"))
    return {
        "flow_videos": len(missing),
        "flow_frame_pairs": pairs,
        "flow_disk_gib": round(disk, 3),
        "flow_core_hours": round(core_hours, 3),
        "flow_hours_here": round(hours, 3),
    }


def _measure_flow(missing: list[Video]) -> tuple[float, float] | None:
    """Returns core seconds and stored bytes per pixel of a frame pair, of the first video that can be read."""
    for video in missing[:3]:
        pairs = min(PAIRS, video.num_frames - 1)
        first = (video.num_frames - 1 - pairs) // 2
        try:
            gray = read_frames(video.path, np.arange(first, first + pairs + 1), "gray", video.num_frames)
            began = time.process_time()  # of all threads
            levels = FlowSolver(torch.device("cpu")).levels(np.stack([gray[:-1], gray[1:]], axis=1))
            core_s = time.process_time() - began
            with tempfile.TemporaryDirectory() as folder:
                encode_video(Path(folder, "sample.flow.mp4"), levels)
                size = Path(folder, "sample.flow.mp4").stat().st_size
        except Exception:  # an estimate is not worth an error: damaged videos have a finding of their own
            continue
        return core_s / levels[:, 0].size, size / levels[:, 0].size
    return None


def _pretrain(train: Index, config: Config, breakdown: dict[str, Any], findings: list[Finding]) -> dict[str, Any]:
    step_s = max(breakdown["stage_s_per_step"]["step"], breakdown["loader_s_per_step"])
    steps = max(1, len(train) // breakdown["batch_size"])
    epochs = sum(cycle.epochs for cycle in config.schedule.cycles)
    epoch_s, hours = steps * step_s, steps * step_s * epochs / 3600
    text = (f"pretraining takes about {_hours(epoch_s / 3600)} per epoch of {counted(steps, 'step')} on this device, "
            f"{_hours(hours)} for the {counted(epochs, 'epoch')} of the config")  # fmt: skip
    advice = ""
    if hours > LONG_H:
        advice = "use a GPU, or several (torchrun --nproc-per-node N -m cpr_fast pretrain CONFIG), or fewer epochs"
    findings.append(Finding("warning" if hours > LONG_H else "ok", text, advice, "time"))
    return {"pretrain_epoch_s": round(epoch_s, 2), "pretrain_epochs": epochs, "pretrain_hours": round(hours, 3)}


def _hours(hours: float) -> str:
    """Returns a duration in the unit that suits it."""
    if hours < 1 / 60:
        return f"{3600 * hours:.2g} s"
    return f"{60 * hours:.0f} min" if hours < 2 else f"{hours:,.0f} hours"


def _gib(size: float) -> str:
    return f"{1024 * size:.1f} MiB" if size < 1 else f"{size:,.0f} GiB" if size >= 10 else f"{size:.1f} GiB"
