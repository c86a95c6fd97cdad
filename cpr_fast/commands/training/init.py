"""`cpr-fast init`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from cpr_fast.commands.inputs import require_at_least, require_file
from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show
from cpr_fast.errors import InputError

if TYPE_CHECKING:
    from cpr_fast.config import Config
    from cpr_fast.data.index.index import Index
    from cpr_fast.experiments.sizing import Facts, Sized


def init(
    index: tyro.conf.Positional[Path],
    *,
    out: Path = Path("recipe.toml"),
    run: Path = Path("runs/mine"),
    seconds: float = 20.0,
    force: bool = False,
    json: Json = False,
) -> None:
    """Write a recipe that is sized to the videos of an index and to this machine, and print the expected time.

    Memory, batch size, stages and epochs are derived from the number of training videos and sources; comments in the
    recipe give the reasons. The expected time is measured: a few training steps and batches are run on these videos.

    Args:
        index: The index (CSV), as `cpr-fast index` wrote it.
        out: The recipe to write (TOML).
        run: The run folder that the recipe names.
        seconds: How long to measure; 0 does not measure, and prints no expected time.
        force: Replace a recipe that exists.
    """
    require_file("INDEX", index)
    require_at_least("--seconds", 0, seconds)
    if out.is_dir():
        raise InputError(f"--out: expected the name of a TOML file, but {str(out)!r} is a folder")
    if out.exists() and not force:
        raise InputError(f"--out: {str(out)!r} exists; give another name, or --force to replace it")
    import torch

    from cpr_fast.data.flow.names import flow_command
    from cpr_fast.data.index.index import Index
    from cpr_fast.experiments.sizing import Facts, sized_recipe
    from cpr_fast.runtime.files import replacing

    videos = Index.load(index, require_flow=False)
    gpu = torch.cuda.is_available()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts = Facts.of(videos, cores=cores, gpu=gpu)
    sized = sized_recipe(facts, os.path.relpath(index, out.parent), str(run))
    with replacing(out) as temporary:
        temporary.write_text(sized.text, encoding="utf-8")
    step_s = _step_seconds(videos, facts.split, sized.config, "cuda" if gpu else "cpu", seconds) if seconds else None
    lines = [
        *_summary(out, facts, sized, step_s),
        *_about_flow(videos, facts, sized.config, flow_command(index, videos)),
    ]
    result = {
        "recipe": str(out),
        "videos": facts.videos,
        "with_flow": facts.with_flow,
        "steps": sized.steps,
        "step_s": step_s,
        "config": sized.config.to_dict(),
    }
    show(result, json, lines=lines, next_step=f"cpr-fast pretrain {out}")


def _summary(out: Path, facts: Facts, sized: Sized, step_s: float | None) -> list[str]:
    """Returns the sizes of the recipe and, where a step was measured, the expected time."""
    from cpr_fast.runtime.progress import about

    config, time = sized.config, ""
    if step_s:
        time = f", {about(sized.steps * step_s)} at {step_s:.2g} s per step, as measured now"
    return [
        f"{out}: {facts.videos} training videos of {facts.sources} sources",
        f"batch of {config.data.batch_size}, memory of {config.memory.size}, {config.mining.stages} stages, "
        f"top {config.mining.top_k}, views {config.schedule.cycles[0].view} and {config.schedule.cycles[1].view}",
        f"{sized.steps} steps in {sum(cycle.epochs for cycle in config.schedule.cycles)} epochs{time}",
    ]


def _about_flow(videos: Index, facts: Facts, config: Config, command: str) -> list[str]:
    """Returns how many videos have flow and what the recipe does without it, unless all of them have it."""
    have = sum(video.flow_path is not None for video in videos)
    if have == len(videos):
        return []
    training = f" ({facts.with_flow} of the {facts.videos} training videos)" if facts.videos < len(videos) else ""
    verb = "has" if have == 1 else "have"
    lines = [f"optical flow: {have} of {len(videos)} videos {verb} it{training}"]
    if facts.with_flow == facts.videos:
        lines.append("  the recipe uses it; evaluating the flow encoder needs it for the other videos, too")
        return [*lines, f"  to complete it: {command}"]
    if config.data.flow == "on_the_fly":
        lines.append("  the recipe computes it on the GPU for each clip; stored flow makes the steps shorter")
    else:
        lines.append("  the recipe uses differences of frames (residual) as the second view instead")
    return [*lines, f"  to use stored flow: {command}, then this command again with --force"]


def _step_seconds(videos, split: str, config, device: str, seconds: float) -> float:
    """Returns the measured seconds per step: of the network or of the loader, whichever is slower."""
    import torch

    from cpr_fast.doctor.bottleneck import breakdown

    part = videos.select(split) if split else videos
    views = tuple(dict.fromkeys(cycle.view for cycle in config.schedule.cycles))
    measured = breakdown(part, config, views, device=torch.device(device), seconds=seconds)
    return max(measured["loader_s_per_step"], measured["stage_s_per_step"]["step"])
