"""Checks before the first step: for how many steps each cycle learns, and reasons why it would learn little or nothing.

Letters: B clips per process, R processes, K memory entries, N training videos.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cpr_fast.config import Config, Cycle
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError

LONG_FILL = 0.25  # if filling the queue takes a larger share of a cycle's steps, a warning is given
TEMPERATURES = (0.005, 2.0)  # beyond these the softmax of the loss is nearly one-hot, or nearly uniform


@dataclass(frozen=True)
class CyclePlan:
    """The steps of one cycle.

    number: position in `schedule.cycles`, from 0.
    clips: number of videos per step, over all processes; epoch_steps: number of steps per epoch.
    fill_steps: number of steps after which the memory is full; it may exceed the number of steps of the cycle.
    learns_while_filling: True for a bank and a batch. With a queue, the encoder learns only once the queue is full.
    """

    number: int
    cycle: Cycle
    clips: int
    epoch_steps: int
    fill_steps: int
    learns_while_filling: bool

    @property
    def steps(self) -> int:
        return self.cycle.epochs * self.epoch_steps

    @property
    def waiting_steps(self) -> int:
        """Number of steps that only fill the queue."""
        return 0 if self.learns_while_filling else min(self.fill_steps, self.steps)

    @property
    def fill_share(self) -> float:
        """Share of the cycle's steps after which the memory is full; above 1, it is never full."""
        return self.fill_steps / self.steps

    @property
    def name(self) -> str:
        return f"cycle {self.number + 1} ({self.cycle.view}, mining {self.cycle.mining})"

    @property
    def key(self) -> str:
        """Name of the setting that defines the cycle."""
        return f"schedule.cycles[{self.number}]"


def plan_cycles(config: Config, videos: int, processes: int) -> list[CyclePlan]:
    """Returns the plan of every cycle.

    Raises:
        InputError: fewer videos than one batch, so that an epoch would have no step.
    """
    clips = config.data.batch_size * processes  # per step
    if videos < clips:
        by = f" x {processes} processes" if processes > 1 else ""
        raise InputError(
            f"data.batch_size: the index holds {videos} training videos, fewer than one batch of "
            f"{config.data.batch_size}{by}. Set data.batch_size to at most {videos // processes}"
            if videos >= processes
            else f"data.index: expected at least one training video per process ({processes}), got {videos}"
        )
    fill = {"queue": math.ceil(config.memory.size / clips), "bank": math.ceil(videos / clips), "batch": 0}
    kind = config.memory.kind
    return [
        CyclePlan(number, cycle, clips, videos // clips, fill[kind], learns_while_filling=kind != "queue")
        for number, cycle in enumerate(config.schedule.cycles)
    ]


def check_run(config: Config, index: Index, plans: list[CyclePlan], *, stored_flow: bool) -> list[str]:
    """Checks every cycle of a run before the run starts.

    Args:
        stored_flow: whether flow is read from the flow files of the index, which must then exist.
    Returns:
        One sentence for each reason why the run, or a cycle of it, will learn little or nothing.
    Raises:
        InputError: a cycle could not start, or could not learn from any data.
    """
    for plan in plans:
        _check_cycle(config, index, plan, stored_flow)
    warnings = [*_about_settings(config), *_about_videos(config, index)]
    seen = {str(view) for view in ("rgb", "flow", "residual") if getattr(config.model.init, view)}
    for plan in plans:
        warnings += _about_memory(config, plan)
        if plan.cycle.mining == "cascade":
            warnings += _about_mining(config, index, plan, seen)
        if plan.cycle.mining == "label":
            warnings += _about_labels(index, plan)
        seen.add(plan.cycle.view)
    return warnings


def _check_cycle(config: Config, index: Index, plan: CyclePlan, stored_flow: bool) -> None:
    """Raises InputError for problems that would otherwise stop the run when this cycle starts, perhaps days later."""
    cycle = plan.cycle
    if cycle.lr is not None and not cycle.lr > 0:
        raise InputError(f"{plan.key}.lr: expected a positive number, got {cycle.lr}; nothing would be learnt")
    if cycle.mining == "label" and (missing := int((index.labels < 0).sum())):
        raise InputError(
            "schedule.cycles: mining = 'label' expects every video of the index to have a label, "
            f"but {missing} of {len(index)} have none"
        )
    top_k = config.mining.top_k if cycle.top_k is None else cycle.top_k
    entries = {"queue": config.memory.size, "bank": len(index), "batch": 2 * config.data.batch_size}
    if cycle.mining == "cascade" and config.memory.kind != "batch" and top_k > entries[config.memory.kind]:
        raise InputError(
            f"top_k: expected at most the {entries[config.memory.kind]} entries of a {config.memory.kind}, got {top_k}"
        )
    if stored_flow and "flow" in cycle.views(shared=config.model.shared):
        bare = [video.path for video in index if video.flow_path is None]
        if bare:
            raise InputError(
                f"data.flow: {plan.name} needs optical flow, but {len(bare)} of {len(index)} videos have no flow_path "
                f"in the index (first: {str(bare[0])!r}). Run `cpr-fast flow` first, or set data.flow = 'on_the_fly'"
            )


def _about_settings(config: Config) -> Iterator[str]:
    low, high = TEMPERATURES
    if not low <= config.loss.temperature <= high:
        yield (
            f"loss.temperature is {config.loss.temperature:g}: outside {low:g} to {high:g} the loss hardly depends on "
            "the features, so that little is learnt; the published value is 0.07"
        )
    if config.schedule.gamma <= 0 and any(cycle.milestones for cycle in config.schedule.cycles):
        yield f"schedule.gamma is {config.schedule.gamma:g}: nothing is learnt after a cycle's first milestone"
    if config.memory.ema_momentum == 1 and config.memory.kind != "batch" and not config.model.shared:
        yield "memory.ema_momentum is 1: the key encoder keeps its initial weights, and the keys never improve"
    for number, cycle in enumerate(config.schedule.cycles):
        lr = config.optim.lr if cycle.lr is None else cycle.lr
        if lr < 1e-7:
            yield (
                f"cycle {number + 1} has a learning rate of {lr:g}: the weights will hardly change; "
                "set optim.lr (the published value is 0.001)"
            )


def _about_videos(config: Config, index: Index) -> Iterator[str]:
    span = (config.data.frames - 1) * config.data.stride + 1
    short = sum(video.num_frames < span for video in index)
    if 2 * short >= len(index):
        yield (
            f"{short} of {len(index)} videos are shorter than a clip of {config.data.frames} frames at stride "
            f"{config.data.stride} and are padded: set data.frames or data.stride lower"
        )
    fits = sum(video.num_frames > span for video in index)
    if config.data.augment == "none" and not fits:
        yield (
            "data.augment is 'none' and no video is longer than a clip: both clips of a video are the same, so that "
            "there is nothing to learn from a pair; choose another data.augment or a lower data.frames"
        )
    if config.memory.kind == "batch" and len(index) and config.data.batch_size == 1:
        yield (
            "data.batch_size is 1 with memory.kind = 'batch': on one process a clip is compared with no other video, "
            "so that nothing is learnt; set data.batch_size to 2 or more"
        )
    if config.memory.kind == "bank" and len(index) == 1:
        yield "the training set is one video: with memory.kind = 'bank' nothing is left to compare it with"
    if _all_positive(config, index):
        yield (
            f"loss.protocol is 'coclr', which counts videos of the same source as positives, and all {len(index)} "
            "videos are of one source: every entry is a positive and nothing is learnt. Give the clips of different "
            "videos different sources in the index"
        )


def _all_positive(config: Config, index: Index) -> bool:
    mines = any(cycle.mining == "cascade" for cycle in config.schedule.cycles)
    return mines and config.loss.protocol == "coclr" and len(set(index.source_ids.tolist())) == 1


def _about_memory(config: Config, plan: CyclePlan) -> Iterator[str]:
    if plan.learns_while_filling:
        if plan.cycle.mining == "cascade" and plan.steps <= plan.fill_steps:
            epochs = math.ceil((plan.fill_steps + 1) / plan.epoch_steps)
            yield (
                f"{plan.name} never mines: its bank is full after {plan.fill_steps} steps, and it ends after "
                f"{plan.steps}. Set {plan.key}.epochs to at least {epochs}"
            )
        return
    size = max(plan.clips, int(plan.steps * plan.clips * LONG_FILL))
    epochs = math.ceil(plan.fill_steps / LONG_FILL / plan.epoch_steps)
    ways = f"Set memory.size to {size} or less, or {plan.key}.epochs to {epochs} or more"
    length = f"{plan.steps} steps ({_count(plan.cycle.epochs, 'epoch')} of {_count(plan.epoch_steps, 'step')})"
    if plan.waiting_steps == plan.steps:
        yield (
            f"{plan.name} NEVER LEARNS: training starts once the queue of memory.size = {config.memory.size} entries "
            f"is full, after {plan.fill_steps} steps, but the cycle ends after {length}. {ways}"
        )
    elif plan.fill_share > LONG_FILL:
        yield (
            f"{plan.name} learns in only {plan.steps - plan.waiting_steps} of its {length}: the first "
            f"{plan.waiting_steps} ({plan.fill_share:.0%}) fill the queue of memory.size = {config.memory.size} "
            f"entries. {ways}"
        )


def _about_mining(config: Config, index: Index, plan: CyclePlan, seen: set[str]) -> Iterator[str]:
    """Yields reasons why a cascade would mine nothing, too little, or with the features of a random network."""
    sources = np.bincount(index.source_ids)
    if len(sources) == 1:
        yield (
            f"{plan.name} can mine nothing: all {len(index)} videos have the source {index[0].source!r}, and videos "
            "of one source are never mined for each other. Give them different sources in the index, or set "
            "mining = 'none'"
        )
        return
    top_k = config.mining.top_k if plan.cycle.top_k is None else plan.cycle.top_k
    entries = {"queue": config.memory.size, "bank": len(index), "batch": 2 * config.data.batch_size}
    size = entries[config.memory.kind]
    largest = int(sources.argmax())
    others = size * (1 - sources[largest] / len(index))
    if others < top_k:
        name = index[int(np.flatnonzero(index.source_ids == largest)[0])].source
        yield (
            f"{plan.name} mines fewer than top_k = {top_k} entries for many queries: {sources[largest]} of "
            f"{len(index)} videos have the source {name!r}, so about {others:.1f} of the {size} entries of the memory "
            "are of other sources. Set mining.top_k lower, or correct the column `source` of the index"
        )
    other = plan.cycle.views(shared=config.model.shared)[1]
    if not config.model.shared and other not in seen:
        yield (
            f"{plan.name} compares features of the {other} encoder, which no earlier cycle trains and model.init."
            f"{other} does not name: its weights are random. Put a cycle {{view = '{other}', mining = 'none'}} before "
            "it, or name a checkpoint"
        )


def _about_labels(index: Index, plan: CyclePlan) -> Iterator[str]:
    if len(set(index.labels.tolist())) == 1:
        yield (
            f"{plan.name} learns nothing: all {len(index)} videos have the label {index[0].label!r}, so that every "
            "entry of the memory is a positive. Set mining = 'none' or 'cascade'"
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
