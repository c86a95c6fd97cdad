"""Estimates the cost of long computations: disk and core-hours of the flow, time per epoch of pretraining; recommends
shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpr_fast.config import Config
from cpr_fast.data.flow.estimate import estimate_flow
from cpr_fast.data.flow.names import flow_command
from cpr_fast.data.index.index import Index
from cpr_fast.doctor.bottleneck import step_time
from cpr_fast.doctor.findings import Finding
from cpr_fast.runtime.busy import OtherPrograms
from cpr_fast.runtime.progress import about
from cpr_fast.wording import counted

LONG_H = 8.0  # hours from which an estimate recommends shards


def estimates(
    index: Path,
    videos: Index,
    train: Index,
    config: Config,
    breakdown: dict[str, Any] | None,
    findings: list[Finding],
) -> dict[str, Any]:
    """Returns the estimated cost of the next steps on this machine, measured on a small part of them.

    Args:
        breakdown: the times of a training step, or None where they were not measured.
    Returns:
        "flow_videos", "flow_frame_pairs", "flow_disk_gib", "flow_core_hours" and "flow_hours_here" (absent if no flow
        is missing; the hours also where no pair could be measured), and "pretrain_epoch_s", "pretrain_epochs" and
        "pretrain_hours" (absent without `breakdown`).
    """
    result: dict[str, Any] = {}
    missing = any(video.flow_path is None and video.num_frames > 1 for video in videos)
    if missing and config.data.flow == "stored":
        result |= _flow(index, videos, findings)
    if breakdown is not None:
        result |= _pretrain(train, config, breakdown, findings)
    return result


def _flow(index: Path, videos: Index, findings: list[Finding]) -> dict[str, Any]:
    others = OtherPrograms()
    expected = estimate_flow(videos)
    disk = expected.disk_bytes / 2**30
    work = f"the flow of {counted(expected.videos, 'video')} ({counted(expected.pairs, 'frame pair')})"
    command, result = (
        flow_command(index, videos),
        {
            "flow_videos": expected.videos,
            "flow_frame_pairs": expected.pairs,
            "flow_disk_gib": round(disk, 3),
        },
    )
    if expected.core_s is None or expected.wall_s is None:
        text = f"storing {work} takes about {_gib(disk)} of disk; the time could not be measured"
        findings.append(Finding("ok", text, command, "time"))
        return result
    core_hours, hours = expected.core_s / 3600, expected.wall_s / 3600
    text = (f"storing {work} takes about {_gib(disk)} of disk, {about(expected.core_s)} of one core, and "
            f"{about(expected.wall_s)}{expected.idle_cores} on this machine if no other program uses it")  # fmt: skip
    if busy := others.sentence():
        text += f". {busy}"
    shards = max(2, min(expected.videos, round(hours / LONG_H)))
    advice = f"{command}; it can be stopped and continued"
    if hours > LONG_H:
        advice = (f"divide it among {shards} machines: {command} --shard 0/{shards} on the first one, up to --shard "
                  f"{shards - 1}/{shards} on the last one; or use a GPU: --device cuda")  # fmt: skip
    findings.append(Finding("warning" if hours > LONG_H else "ok", text, advice, "time"))
    return result | {"flow_core_hours": round(core_hours, 3), "flow_hours_here": round(hours, 3)}


def _pretrain(train: Index, config: Config, breakdown: dict[str, Any], findings: list[Finding]) -> dict[str, Any]:
    step_s, part = step_time(breakdown)
    steps = max(1, len(train) // breakdown["batch_size"])
    epochs = sum(cycle.epochs for cycle in config.schedule.cycles)
    epoch_s, hours = steps * step_s, steps * step_s * epochs / 3600
    text = (f"pretraining takes {about(epoch_s)} per epoch of {counted(steps, 'step')} on this device, "
            f"{about(3600 * hours)} for the {counted(epochs, 'epoch')} of these settings")  # fmt: skip
    if part:
        text += f"; a step was measured{part}"
    if busy := breakdown["other_programs"]:
        text += f". {busy}"
    advice = ""
    if hours > LONG_H:
        advice = "use a GPU, or several (torchrun --nproc-per-node N -m cpr_fast pretrain CONFIG), or fewer epochs"
    findings.append(Finding("warning" if hours > LONG_H else "ok", text, advice, "time"))
    return {"pretrain_epoch_s": round(epoch_s, 2), "pretrain_epochs": epochs, "pretrain_hours": round(hours, 3)}


def _gib(size: float) -> str:
    return f"{1024 * size:.1f} MiB" if size < 1 else f"{size:,.0f} GiB" if size >= 10 else f"{size:.1f} GiB"
