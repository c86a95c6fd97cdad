"""A recipe sized to a data set: memory, batch, epochs and network depend on the number of videos and the machine.

The published recipes assume ten thousand videos and two GPUs. On a few dozen videos their memory never fills, so that
no cascade learns; on a CPU they take months.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cpr_fast.config import Config
from cpr_fast.config.epochs import share_epochs
from cpr_fast.config.pixels import least_clip
from cpr_fast.data.index.index import Index, too_few
from cpr_fast.errors import InputError
from cpr_fast.mining.stages import most_stages
from cpr_fast.pretrain.run.checks import largest_queue, other_entries

CPU_STEPS, GPU_STEPS = 1200, 100_000  # optimiser steps of all cycles together
RATIO = 0.5  # fraction of the entries that each stage of the cascade keeps


def usable_cores() -> int:
    """Returns the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Facts:
    """The properties of the data and the machine that determine the size of a recipe.

    Attributes:
        largest_source: Number of videos of the source that has the most.
        median_frames: Number of frames that more than half of the videos have at least.
        with_flow: Number of videos with stored optical flow.
        split: The split to train on; "" for all videos.
    """

    videos: int
    sources: int
    largest_source: int
    median_frames: int
    with_flow: int
    split: str
    cores: int
    gpu: bool

    @classmethod
    def of(cls, index: Index, *, cores: int, gpu: bool) -> Facts:
        """Counts the training videos of an index: those of the split "train", or all if the index has no splits.

        Raises InputError for an index from which nothing can be learnt.
        """
        split, videos = index.training()
        sources = Counter(video.source for video in videos)
        splits = dict.fromkeys(video.split for video in index) if split else ()
        if reason := too_few(len(videos), len(sources), split, splits):
            raise InputError(f"INDEX: {reason}")
        median = sorted(video.num_frames for video in videos)[(len(videos) - 1) // 2]
        with_flow = sum(video.flow_path is not None for video in videos)
        return cls(len(videos), len(sources), max(sources.values()), median, with_flow, split, cores, gpu)


@dataclass(frozen=True)
class Sized:
    """A recipe as TOML text that explains its values, the same recipe as a config, and its number of optimiser
    steps."""

    text: str
    config: Config
    steps: int


def sized_recipe(facts: Facts, index: str, out: str, epochs: int | None = None) -> Sized:
    """Returns a recipe for these videos on this machine.

    Args:
        facts: Number of videos and sources, and the machine.
        index: Path of the index, as it is written into the recipe.
        out: The run folder.
        epochs: Number of epochs of all cycles together, divided in the proportions of the default plan. By default it
            follows from the number of steps that the machine is expected to manage.

    Raises InputError if there are fewer epochs than cycles.
    """
    if facts.gpu:
        arch, width, frames, stride, size, most = "s3d", 1.0, 32, 1, 128, 32
    else:
        arch, width, frames, stride, size, most = "r3d", 0.25, 8, 2, 64, 32
    stride = stride if facts.median_frames > frames * stride else 1
    least_frames, _ = least_clip(arch)
    while frames > max(facts.median_frames, least_frames):
        frames = max(least_frames, frames // 2)
    batch = max(2, min(most, facts.videos // 4) // 2 * 2)
    per_epoch = facts.videos // batch
    second, flow = _second_view(facts)
    views = ("rgb", second)
    cycles = _cycles(views, _epochs(GPU_STEPS if facts.gpu else CPU_STEPS, per_epoch, len(views)), epochs)
    least = min(n for _, n, mining in cycles if mining == "cascade") * per_epoch  # steps of the shortest cascade cycle
    memory = min(2048, facts.videos * 3 // 4, largest_queue(least, batch)) // batch * batch
    top_k = max(1, min(5, memory // 16, int(other_entries(memory, facts.largest_source, facts.videos))))
    stages = most_stages((1, 3, 5, 7), memory, RATIO, top_k)
    momentum = round(max(0.9, min(0.999, 1 - 8 / least)), 3)
    lines = "\n".join(
        f'  {{ view = "{view}", epochs = {n}, mining = "{mining}", milestones = {_milestones(n)}'
        + (f', other = "{views[1 - views.index(view)]}"' if second == "residual" else "")
        + " },"
        for view, n, mining in cycles
    )
    text = TEMPLATE.format(
        videos=facts.videos, sources=facts.sources, machine="a GPU" if facts.gpu else f"{facts.cores} CPU cores",
        index=_quoted(index), split=facts.split, frames=frames, stride=stride, size=size, batch=batch,
        workers=max(1, min(16, facts.cores)), flow=flow, arch=arch, width=width, memory=memory, momentum=momentum,
        fill=math.ceil(memory / batch), per_epoch=per_epoch, stages=stages, ratio=RATIO, top_k=top_k, cycles=lines,
        out=_quoted(out), crop="" if facts.gpu else CROP,
        second=SECOND[second, flow].format(with_flow=facts.with_flow, videos=facts.videos),
    )  # fmt: skip
    import tomllib

    config = Config.from_dict(tomllib.loads(text))
    return Sized(text, config, per_epoch * sum(n for _, n, _ in cycles))


def _second_view(facts: Facts) -> tuple[str, str]:
    """Returns the second view, used in addition to RGB, and the setting data.flow."""
    if facts.with_flow == facts.videos:
        return "flow", "stored"
    return ("flow", "on_the_fly") if facts.gpu else ("residual", "stored")


def _epochs(steps: int, per_epoch: int, views: int) -> tuple[int, int]:
    """Returns the epochs of an InfoNCE cycle and of a cascade cycle: three fifths and two fifths of the steps."""
    return tuple(max(10, min(300, round(share * steps / views / per_epoch))) for share in (0.6, 0.4))


def _cycles(views: Sequence[str], default: Sequence[int], total: int | None) -> list[tuple[str, int, str]]:
    """Returns view, epochs and mining of the cycles: InfoNCE of every view, then a cascade of every view."""
    cycles = [(view, n, mining) for n, mining in zip(default, ("none", "cascade"), strict=True) for view in views]
    if total is None:
        return cycles
    if total < len(cycles):
        raise InputError(
            f"--epochs: expected {len(cycles)} or more, at least one for each of the {len(cycles)} cycles, got {total}"
        )
    shares = share_epochs([n for _, n, _ in cycles], total)
    return [(view, n, mining) for (view, _, mining), n in zip(cycles, shares, strict=True)]


def _milestones(epochs: int) -> list[int]:
    """Returns the epoch at which the learning rate falls, after four fifths of a cycle; a single epoch has none."""
    return [max(1, epochs * 4 // 5)] if epochs > 1 else []


def _quoted(text: str) -> str:
    """Returns the text as a TOML basic string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'


CROP = "crop_area = 0.5    # smallest random crop; small clips need more of the frame than the published 0.2\n"
SECOND = {
    ("flow", "stored"): "every training video has optical flow, the published second view",
    ("flow", "on_the_fly"): "optical flow is computed on the GPU for each clip, because {with_flow} of {videos} "
    "training videos have stored flow; `cpr-fast flow` stores it",
    (
        "residual",
        "stored",
    ): "{with_flow} of {videos} training videos have optical flow, so differences of frames are the "
    "second view; run `cpr-fast flow` and then `cpr-fast init` again for the published one",
}
TEMPLATE = """# CPR for {videos} training videos of {sources} sources, on {machine}; written by `cpr-fast init`.
# InfoNCE trains each view first, then the cascade mines positives. The second view: {second}.

[data]
index = {index}
split = "{split}"
frames = {frames}
stride = {stride}
size = {size}
{crop}batch_size = {batch}
workers = {workers}
flow = "{flow}"

[model]
arch = "{arch}"
width = {width}

[memory]
size = {memory}          # filled after {fill} of {per_epoch} steps of a cycle's first epoch
ema_momentum = {momentum}  # the key encoder follows within a cycle
shuffle_bn_groups = 2

[mining]
stages = {stages}
ratio = {ratio}
top_k = {top_k}

# Adam, and drops of the learning rate, as in the paper; `cpr-fast explain modern_ucf101` shows AdamW with schedules.
[schedule]
cycles = [
{cycles}
]

[run]
out = {out}
"""
