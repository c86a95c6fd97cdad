"""Checks before the first step: for how many steps each cycle learns, and reasons why it would learn little or nothing.

Letters: B clips per process, R processes, K memory entries, N training videos.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cpr_fast.config import Config, Cycle
from cpr_fast.config.checks import batch_norm_groups
from cpr_fast.config.sections import with_cycle
from cpr_fast.config.unreached import unreached_epochs, unreached_steps, unreached_warmups
from cpr_fast.data.features.index import StoredClips
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError
from cpr_fast.mining.stages import idle_stages, most_stages, stage_keep
from cpr_fast.pretrain.run.videos import about_lengths, require_vectors
from cpr_fast.runtime.writers import require_packages
from cpr_fast.wording import counted, listed

LONG_FILL = 0.25  # if waiting for the queue takes a larger share of a cycle's steps, a warning is given
TEMPERATURES = (0.005, 2.0)  # beyond these the softmax of the loss is nearly one-hot, or nearly uniform


@dataclass(frozen=True)
class CyclePlan:
    """The steps of one cycle.

    Attributes:
        number: Position in `schedule.cycles`, from 0.
        clips: Number of videos per step, over all processes.
        epoch_steps: Number of steps per epoch.
        fill_steps: Number of steps after which the memory is full; it may exceed the number of steps of the cycle.
        learns_while_filling: False for a cascade on a queue, which waits until the queue is full.
    """

    number: int
    cycle: Cycle
    clips: int
    epoch_steps: int
    fill_steps: int
    learns_while_filling: bool

    @property
    def steps(self) -> int:
        """Number of steps of the whole cycle."""
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
        """The cycle in messages: "cycle 2 (rgb, mining none)"."""
        return cycle_names([(self.number, self.cycle)])

    def key(self, setting: str) -> str:
        """Returns the name of a setting of the cycle in messages."""
        return with_cycle(f"schedule.cycles[{self.number}].{setting}")


def cycle_names(cycles: Sequence[tuple[int, Cycle]]) -> str:
    """Returns "cycle 2 (rgb, mining none)", or of several cycles "cycles 1 to 3 and 6", given with their positions."""
    if len(cycles) == 1:
        ((number, cycle),) = cycles
        return f"cycle {number + 1} ({cycle.view}, mining {cycle.mining})"
    parts: list[list[int]] = []
    for number in sorted(number + 1 for number, _ in cycles):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    texts = [text for part in parts for text in ([f"{part[0]} to {part[-1]}"] if len(part) > 2 else map(str, part))]
    return f"cycles {listed(texts)}"


def plan_cycles(config: Config, videos: int, processes: int) -> list[CyclePlan]:
    """Returns the plan of every cycle.

    Raises:
        InputError: fewer videos than one batch, so that an epoch would have no step, or clips that cannot be divided
            among the BatchNorm groups.
    """
    clips = config.data.batch_size * processes  # per step
    if videos < clips:
        by = f" x {counted(processes, 'process', 'processes')}" if processes > 1 else ""
        raise InputError(
            f"data.batch_size: the index holds {counted(videos, 'training video')}, fewer than one batch of "
            f"{config.data.batch_size}{by}. Set data.batch_size to at most {videos // processes}"
            if videos >= processes
            else f"data.index: expected at least one training video per process ({processes}), got {videos}"
        )
    batch_norm_groups(config.memory.shuffle_bn_groups, clips, processes, config.optim.accumulate)
    fill = {"queue": math.ceil(config.memory.size / clips), "bank": math.ceil(videos / clips), "batch": 0}
    kind = config.memory.kind
    return [
        CyclePlan(number, cycle, clips, videos // clips, fill[kind], not cycle.waits_for_queue(config.memory))
        for number, cycle in enumerate(config.schedule.cycles)
    ]


def check_run(config: Config, index: Index, plans: list[CyclePlan], *, stored_flow: bool) -> list[str]:
    """Checks every cycle of a run before the run starts.

    Args:
        stored_flow: whether flow is read from the flow files of the index, which must then exist.
    Returns:
        One text for each kind of reason why the run will learn little or nothing; it names the cycles it concerns.
    Raises:
        InputError: a cycle could not start, or could not learn from any data, or a package is missing.
    """
    require_packages(config.run)
    for plan in plans:
        _check_cycle(config, index, plan, stored_flow)
    reading = [plan for plan in plans if "flow" in plan.cycle.views(shared=config.model.shared)]
    if config.data.flow == "vectors" and reading and not isinstance(index, StoredClips):
        require_vectors(index, reading[0].name)
    return [
        *_about_settings(config),
        *unreached_epochs(config),
        *unreached_steps(config, sum(plan.steps for plan in plans)),
        *unreached_warmups(config, [plan.steps - plan.waiting_steps for plan in plans], plans[0].epoch_steps),
        *_about_videos(config, index),
        *_about_memory(config, plans),
        *_about_mining(config, index, [plan for plan in plans if plan.cycle.mining == "cascade"]),
        *_about_stages(config, index, [plan for plan in plans if plan.cycle.mining == "cascade"]),
        *_about_random_encoders(config, plans),
        *_about_labels(index, [plan for plan in plans if plan.cycle.mining == "label"]),
    ]


def _check_cycle(config: Config, index: Index, plan: CyclePlan, stored_flow: bool) -> None:
    """Raises InputError for problems that would otherwise stop the run when this cycle starts, perhaps days later."""
    cycle = plan.cycle
    if cycle.mining == "label" and (missing := int((index.labels < 0).sum())):
        raise InputError(
            "schedule.cycles: mining = 'label' expects every video of the index to have a label, "
            f"but {missing} of {len(index)} have none"
        )
    top_k, size = _top_k(config, cycle), _entries(config, index)
    if cycle.mining == "cascade" and config.memory.kind != "batch" and top_k > size:
        name = "mining.top_k" if cycle.top_k is None else plan.key("top_k")
        raise InputError(f"{name}: expected at most the {size} entries of a {config.memory.kind}, got {top_k}")
    if isinstance(index, StoredClips):
        index.store.require_views(f"data.features: {plan.name}", cycle.views(shared=config.model.shared))
    elif stored_flow and "flow" in cycle.views(shared=config.model.shared):
        bare = [video.path for video in index if video.flow_path is None]
        if bare:
            raise InputError(
                f"data.flow: {plan.name} needs optical flow, but {len(bare)} of "
                f"{counted(len(index), 'video')} have no flow_path "
                f"in the index (first: {str(bare[0])!r}). Run `cpr-fast flow` first, or set data.flow = "
                "'on_the_fly' or 'vectors'"
            )


def _about_settings(config: Config) -> Iterator[str]:
    low, high = TEMPERATURES
    if not low <= config.loss.temperature <= high:
        yield (
            f"loss.temperature is {config.loss.temperature:g}: outside {low:g} to {high:g} the loss hardly depends on "
            "the features, so that little is learnt; the published value is 0.07"
        )
    moving = [cycle.applied_to(config.memory) for cycle in config.schedule.cycles]
    fixed = any(memory.ema_momentum == 1 and memory.final_ema_momentum in (None, 1) for memory in moving)
    if fixed and config.memory.kind != "batch" and not config.model.shared:
        yield "memory.ema_momentum is 1: the key encoder keeps its initial weights, and the keys never improve"
    rates = [(n, c, c.applied_to(config.optim).lr) for n, c in enumerate(config.schedule.cycles)]
    if slow := [(number, cycle) for number, cycle, lr in rates if lr < 1e-7]:
        found = ", ".join(f"{lr:g}" for lr in dict.fromkeys(lr for _, _, lr in rates if lr < 1e-7))
        yield (
            f"{cycle_names(slow)} {'has' if len(slow) == 1 else 'have'} a learning rate of {found}: the weights will "
            "hardly change; set optim.lr (the published value is 0.001)"
        )


def _about_videos(config: Config, index: Index) -> Iterator[str]:
    if isinstance(index, StoredClips):
        yield from _about_samples(index, config)
    else:
        yield from about_lengths(config, index)
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


def _about_samples(index: StoredClips, config: Config) -> Iterator[str]:
    if index.store.about.samples == 1:
        alone = [(n, cycle) for n, cycle in enumerate(config.schedule.cycles) if cycle.mining == "none"]
        if alone:
            yield (
                f"the store holds one sample of each clip, so that query and key are the same features: "
                f"{cycle_names(alone)} {'has' if len(alone) == 1 else 'have'} nothing to learn from a pair. Embed with "
                "--samples 2 or more, or mine positives"
            )


def _all_positive(config: Config, index: Index) -> bool:
    mines = any(cycle.mining == "cascade" for cycle in config.schedule.cycles)
    return mines and config.loss.protocol == "coclr" and index.source_count == 1


def _about_memory(config: Config, plans: Sequence[CyclePlan]) -> Iterator[str]:
    """Yields the cycles that never learn or mine, and those that learn late, because of the size of the memory."""
    if config.memory.kind != "queue":
        if late := [p for p in plans if p.cycle.mining == "cascade" and p.steps <= p.fill_steps]:
            epochs = math.ceil((late[0].fill_steps + 1) / late[0].epoch_steps)
            yield (
                f"{_named(late)} never {_verb(late, 'mines: its', 'mine: their')} bank is full after "
                f"{counted(late[0].fill_steps, 'step')}, and {_verb(late, 'it ends', 'they end')} after "
                f"{_span(p.steps for p in late)}. Set {_longer(config, late, epochs)}"
            )
        return
    yield from _about_random_entries(config, [plan for plan in plans if plan.learns_while_filling])
    size, filled = config.memory.size, plans[0].fill_steps  # equal in all cycles, as are the steps per epoch
    waiting = [plan for plan in plans if not plan.learns_while_filling]
    if never := [plan for plan in waiting if plan.waiting_steps == plan.steps]:
        yield (
            f"{_named(never)} NEVER {_verb(never, 'LEARNS', 'LEARN')}: training starts once the queue of memory.size = "
            f"{size} entries is full, after {counted(filled, 'step')}, but "
            f"{_verb(never, 'the cycle ends', 'they end')} after "
            f"{_length(never)}. {_ways(config, never)}"
        )
    if slow := [plan for plan in waiting if plan not in never and plan.fill_share > LONG_FILL]:
        yield (
            f"{_named(slow)} {_verb(slow, 'learns', 'learn')} in only {_span(p.steps - filled for p in slow)} of "
            f"{_verb(slow, 'its', 'their')} {_length(slow)}: the first {filled} "
            f"({_span((p.fill_share for p in slow), '.0%')}) fill the queue of memory.size = {size} entries. "
            f"{_ways(config, slow)}"
        )


def _about_random_entries(config: Config, plans: Sequence[CyclePlan]) -> Iterator[str]:
    """Yields the cycles that learn from the first step, but keep random vectors in their queue to the end."""
    if short := [plan for plan in plans if plan.fill_share > 1]:
        epochs = math.ceil(short[0].fill_steps / short[0].epoch_steps)
        yield (
            f"{_named(short)} never {_verb(short, 'fills its', 'fill their')} queue of memory.size = "
            f"{config.memory.size} entries: "
            f"{_verb(short, 'it ends', 'they end')} after {_length(short)} with "
            f"{_span(plan.steps * plan.clips for plan in short)} keys in it, and the other entries are still the "
            f"random vectors that a queue starts with, which are easy negatives. Set memory.size to "
            f"{min(plan.steps for plan in short) * short[0].clips} or less, or {_longer(config, short, epochs)}"
        )


def largest_queue(steps: int, clips: int) -> int:
    """Returns the largest size of a queue that is filled early enough by a cascade cycle of `steps` steps: within
    LONG_FILL of them, or within one step. It is a multiple of `clips`, the number of keys of a step."""
    return max(1, int(steps * LONG_FILL)) * clips


def other_entries(size: int, largest: int, videos: int) -> float:
    """Returns about how many of the `size` entries of a memory are of other sources than a query of the largest source,
    which has `largest` of the `videos`."""
    return size * (1 - largest / videos)


def _ways(config: Config, plans: Sequence[CyclePlan]) -> str:
    """Returns the settings with which the queue is full early enough in each of the cycles."""
    size = min(largest_queue(plan.steps, plan.clips) for plan in plans)
    epochs = math.ceil(plans[0].fill_steps / LONG_FILL / plans[0].epoch_steps)
    return f"Set memory.size to {size} or less, or {_longer(config, plans, epochs)}"


def _length(plans: Sequence[CyclePlan]) -> str:
    epochs = _span(plan.cycle.epochs for plan in plans)
    steps = f"{_span(plan.steps for plan in plans)} steps"
    return f"{steps} ({epochs} epoch{'' if epochs == '1' else 's'} of {counted(plans[0].epoch_steps, 'step')})"


def _about_mining(config: Config, index: Index, plans: Sequence[CyclePlan]) -> Iterator[str]:
    """Yields reasons why cascades would mine nothing, or too little."""
    sources = np.bincount(index.source_ids)
    if plans and len(sources) == 1:
        yield (
            f"{_named(plans)} can mine nothing: all {counted(len(index), 'video')} have the source "
            f"{index[0].source!r}, and "
            "videos of one source are never mined for each other. Give them different sources in the index, or set "
            "mining = 'none'"
        )
        return
    size = _entries(config, index)
    largest = int(sources.argmax())
    others = other_entries(size, sources[largest], len(index))
    wanted = {plan: _top_k(config, plan.cycle) for plan in plans}
    if poor := [plan for plan in plans if others < wanted[plan]]:
        name = index[int(np.flatnonzero(index.source_ids == largest)[0])].source
        yield (
            f"{_named(poor)} {_verb(poor, 'mines', 'mine')} fewer than top_k = {_span(wanted[plan] for plan in poor)} "
            f"entries for many queries: {sources[largest]} of {counted(len(index), 'video')} have the "
            f"source {name!r}, so about "
            f"{others:.1f} of the {counted(size, 'entry', 'entries')} of the memory are of other "
            f"sources. Set mining.top_k lower, or "
            "correct the column `source` of the index"
        )


def _about_stages(config: Config, index: Index, plans: Sequence[CyclePlan]) -> Iterator[str]:
    """Yields the cascades of which a stage selects nothing, so that they are cascades of fewer stages."""
    stages, ratio, size = config.mining.stages, config.mining.ratio, _entries(config, index)
    if stages == "auto":
        return
    cascades: dict[int, list[CyclePlan]] = {}  # by top-k
    for plan in plans:
        cascades.setdefault(_top_k(config, plan.cycle), []).append(plan)
    for top_k, same in cascades.items():
        keep = stage_keep(stages, size, ratio, top_k)
        if not (idle := idle_stages(keep, size)) or top_k >= size:
            continue
        ways = [f"mining.stages to {most_stages(range(1, stages), size, ratio, top_k)}"]
        if config.memory.kind == "queue" and ratio < 1:
            ways.append(f"memory.size to {math.ceil((top_k + 1) / ratio ** (stages - 1))} or more")
        which = f"stage {idle[0]} selects" if len(idle) == 1 else f"stages {listed([*map(str, idle)])} select"
        yield (
            f"{_named(same)} {_verb(same, 'mines', 'mine')} with fewer stages than mining.stages = {stages}: {which} "
            f"nothing, because the stages keep {listed([*map(str, keep)])} of "
            f"{counted(size, 'entry', 'entries')}. Set {' or '.join(ways)}"
        )


def _top_k(config: Config, cycle: Cycle) -> int:
    return config.mining.top_k if cycle.top_k is None else cycle.top_k


def _entries(config: Config, index: Index) -> int:
    """Returns K, the number of entries of the memory, on one process."""
    return {"queue": config.memory.size, "bank": len(index), "batch": 2 * config.data.batch_size}[config.memory.kind]


def _about_random_encoders(config: Config, plans: Sequence[CyclePlan]) -> Iterator[str]:
    """Yields the views that cascades compare although no cycle before them trains an encoder of that view."""
    trained = {str(view) for view in ("rgb", "flow", "residual") if getattr(config.model.init, view)}
    found: dict[str, list[CyclePlan]] = {}
    for plan in plans:
        other = "" if config.model.shared or plan.cycle.mining != "cascade" else plan.cycle.views(shared=False)[1]
        if other and other not in trained:
            found.setdefault(other, []).append(plan)
        trained.add(plan.cycle.view)
    for other, untrained in found.items():
        yield (
            f"{_named(untrained)} {_verb(untrained, 'compares', 'compare')} features of the {other} encoder, which no "
            f"earlier cycle trains and model.init.{other} does not name: its weights are random. Put a cycle {{view = "
            f"'{other}', mining = 'none'}} before {_verb(untrained, 'it', 'them')}, or name a checkpoint"
        )


def _about_labels(index: Index, plans: Sequence[CyclePlan]) -> Iterator[str]:
    if plans and len(np.unique(index.labels)) == 1:
        yield (
            f"{_named(plans)} {_verb(plans, 'learns', 'learn')} nothing: all "
            f"{counted(len(index), 'video')} have the label "
            f"{index[0].label!r}, so that every entry of the memory is a positive. Set mining = 'none' or 'cascade'"
        )


def _named(plans: Sequence[CyclePlan]) -> str:
    return cycle_names([(plan.number, plan.cycle) for plan in plans])


def _longer(config: Config, plans: Sequence[CyclePlan], epochs: int) -> str:
    """Returns the two settings that give each of the cycles at least `epochs` epochs: its own, and that of the whole
    run, which --epochs shares among the cycles and which takes precedence over the first."""
    name = plans[0].key("epochs") if len(plans) == 1 else "the epochs of each of them (schedule.cycles)"
    parts = [cycle.epochs for cycle in config.schedule.cycles]
    least = max(math.ceil(sum(parts) * epochs / plan.cycle.epochs) for plan in plans)
    return f"{name} to {epochs} or more (with --epochs: {least} or more for the whole run)"


def _verb(plans: Sequence[CyclePlan], one: str, several: str) -> str:
    return one if len(plans) == 1 else several


def _span(values: Iterable[float], form: str = "") -> str:
    """Returns "4", or "4 to 8" if the values differ."""
    found = sorted(values)
    ends = dict.fromkeys(format(value, form) for value in (found[0], found[-1]))
    return " to ".join(ends)
