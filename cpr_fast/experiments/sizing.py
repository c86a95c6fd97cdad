"""A recipe sized to a data set: memory, batch, epochs and network depend on the number of videos and the machine.

The published recipes assume ten thousand videos and two GPUs. On a few dozen videos their memory never fills, so that
no cascade learns; on a CPU they take months.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cpr_fast.config import Config
from cpr_fast.config.epochs import share_epochs
from cpr_fast.data.index.index import MIN_SOURCES, MIN_VIDEOS, Index
from cpr_fast.errors import InputError

CPU_STEPS, GPU_STEPS = 1200, 100_000  # optimiser steps of all cycles together
RATIO = 0.5  # fraction of the entries that each stage of the cascade keeps
FILL = 0.25  # share of the steps of a cascade cycle that may only fill the memory, or half an epoch if that is more


@dataclass(frozen=True)
class Facts:
    """The properties of the data and the machine that determine the size of a recipe."""

    videos: int
    sources: int
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
        sources = len({video.source for video in videos})
        if len(videos) < MIN_VIDEOS or sources < MIN_SOURCES:
            raise InputError(
                f"INDEX: expected at least {MIN_VIDEOS} training videos of at least {MIN_SOURCES} sources, got "
                f"{len(videos)} of {sources}" + (f" in split {split!r}" if split else "")
            )
        frames = sorted(video.num_frames for video in videos)
        with_flow = sum(video.flow_path is not None for video in videos)
        return cls(len(videos), sources, frames[len(frames) // 2], with_flow, split, cores, gpu)


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
    batch = max(2, min(most, facts.videos // 4) // 2 * 2)
    per_epoch = facts.videos // batch
    second, flow = _second_view(facts)
    views = ("rgb", second)
    cycles = _cycles(views, _epochs(GPU_STEPS if facts.gpu else CPU_STEPS, per_epoch, len(views)), epochs)
    least = min(n for _, n, mining in cycles if mining == "cascade") * per_epoch  # steps of the shortest cascade cycle
    memory = max(
        batch, min(2048, facts.videos * 3 // 4, max(int(least * FILL), per_epoch // 2) * batch) // batch * batch
    )
    top_k = max(1, min(5, memory // 16))
    stages = max((n for n in (1, 3, 5, 7) if int(memory * RATIO ** (n - 1)) > top_k), default=1)
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

[schedule]
cycles = [
{cycles}
]

[run]
out = {out}
"""
