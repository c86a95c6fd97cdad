"""The text that a run prints on stderr: a summary at the start, the time left, and a summary at the end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from cpr_fast.config import Config
from cpr_fast.data.index.index import Index
from cpr_fast.pretrain.run.checks import CyclePlan
from cpr_fast.runtime.distributed import World
from cpr_fast.runtime.progress import FEW_S, about
from cpr_fast.wording import counted

MEASURED = 5  # number of steps after which their time is known well enough to be printed
PATIENCE_S = 60.0  # if filling takes longer, the time until its end is printed after this time
UNSTEADY = (
    3.0  # the longest of some times over the shortest: times that differ more are measured for LONGEST_MEAN steps
)
LONGEST_MEAN = 20  # steps, or two epochs if they are longer: the mean of step times covers as many at most


def start_lines(config: Config, index: Index, plans: Sequence[CyclePlan], folder: Path, world: World) -> list[str]:
    """Returns the summary that is printed before the first step."""
    labelled = int((index.labels >= 0).sum())
    classes = counted(index.class_count, "class", "classes")
    labels = classes if labelled else "no labels (PMR and CMR will be missing)"
    if 0 < labelled < len(index):
        labels += f" ({counted(len(index) - labelled, 'video')} without a label)"
    batch = f"{config.data.batch_size}" + (f" x {world.size} processes" if world.size > 1 else "")
    lines = [
        f"Pretraining on {counted(len(index), 'video')} of {counted(index.source_count, 'source')}, {labels}",
        f"  {counted(plans[0].epoch_steps, 'step')} per epoch (batch size {batch}), "
        f"{counted(sum(p.steps for p in plans), 'step')} in total, "
        f"on {world.device.type}",
    ]
    lines += [f"  {plan.name}: {counted(plan.cycle.epochs, 'epoch')}, {_memory(config, plan)}" for plan in plans]
    return [*lines, f"  Run folder: {folder.absolute()}"]


def end_line(row: dict[str, Any]) -> str:
    """Returns the summary of a finished run: `row` is its `outcome`."""
    return f"Finished after {counted(row['step'], 'step')}. {row['text']}"


def _memory(config: Config, plan: CyclePlan) -> str:
    kind, share = config.memory.kind, plan.fill_share
    if kind == "batch":
        return f"compared with the {counted(2 * plan.clips, 'clip')} of the batch"
    entries = "bank of one entry per video" if kind == "bank" else f"queue of {config.memory.size} entries"
    if kind == "queue" and plan.learns_while_filling:
        entries += " that starts with random vectors"
    if plan.waiting_steps == plan.steps or share > 1:
        return f"{entries}, never full" + ("" if plan.learns_while_filling else ", so that nothing is learnt")
    full = f"{entries}, full after {counted(plan.fill_steps, 'step')} ({share:.0%} of the cycle)"
    return full if plan.learns_while_filling else f"{full}; learning starts then"


class Pace:
    """Measures the time of steps and estimates the time left of the whole run.

    Steps that only fill the queue of a cascade are timed separately from those that learn, which also run a backward
    pass: they say nothing about the time of the whole run, because they may take more or less time than the others.
    The first steps of a kind set up kernels and read videos that no cache holds yet, so that one of them may take as
    long as fifty others. Therefore the mean is that of the later half of the steps so far, and nothing is said before
    the fifth, or before the twentieth while these times differ much.

    Args:
        filling: number of steps until the queue of this cycle is full.
        learning: number of steps that learn, over all cycles that are left.
        later: number of steps that fill the queues of later cycles.
        epoch_steps: number of steps of an epoch. The last step of each also saves a checkpoint and may measure
            retrieval, so the mean covers whole epochs; otherwise the expected time would jump after each.
    """

    def __init__(self, filling: int, learning: int, later: int = 0, epoch_steps: int = 1) -> None:
        self.left, self.later = {False: filling + later, True: learning}, later
        self.counted = {False: 0, True: 0}
        window = max(LONGEST_MEAN, 2 * epoch_steps)
        self.times: dict[bool, deque[float]] = {False: deque(maxlen=window), True: deque(maxlen=window)}
        self.began = time.monotonic()
        self.told = {False: False, True: False}

    def step(self, seconds: float, *, learns: bool) -> None:
        """Records the wall time of one step, including the time spent waiting for data."""
        self.left[learns] = max(0, self.left[learns] - 1)
        self.counted[learns] += 1
        self.times[learns].append(seconds)

    def mean_s(self, *, learns: bool) -> float | None:
        """Returns the seconds of a step of this kind, or None before enough of them were timed."""
        times, counted = self.times[learns], self.counted[learns]
        if counted < MEASURED:
            return None
        later = list(islice(reversed(times), min(-(-counted // 2), len(times))))
        unsteady = max(later) > UNSTEADY * min(later)
        return None if unsteady and counted < LONGEST_MEAN else fmean(later)

    def left_s(self) -> float | None:
        """Returns the seconds that the rest of the run takes at this pace, or None where it is not known."""
        known = {kind: self.mean_s(learns=kind) for kind in (False, True)}
        if known[True] is None and (self.left[True] or known[False] is None):
            return None
        either = known[False] if known[True] is None else known[True]
        return sum(self.left[kind] * (either if known[kind] is None else known[kind]) for kind in (False, True))

    def full_s(self) -> float | None:
        """Returns the seconds until the queue is full and learning starts, or None where it is not known."""
        step_s, steps = self.mean_s(learns=False), self.left[False] - self.later
        return steps * step_s if step_s is not None and steps > 0 else None

    def news(self) -> str | None:
        """Returns a sentence about the expected time as soon as it can be estimated, at most once for each kind of
        step."""
        step_s, left, full = self.mean_s(learns=True), self.left_s(), self.full_s()
        if step_s is not None and left is not None and not self.told[True]:
            self.told[True] = self.told[False] = True
            return f"Expected time: {about(left)} left ({step_s:.2g} s per step, measured)"
        if full is not None and not self.told[False] and time.monotonic() - self.began > PATIENCE_S:
            self.told[False] = True
            if self.left[True] and full >= FEW_S:
                return f"Expected time: {about(full)} until the queue is full; then the time of the run is measured"
        return None

    def text(self) -> str:
        """Returns the time left of the whole run for the progress line, or until the queue is full while that of the
        run is not known, or "" where neither is known or nothing is left."""
        left, full = self.left_s(), self.full_s()
        if left is not None:
            return f"{about(left)} left in total" if left else ""
        return f"{about(full)} until the queue is full" if full is not None and self.left[True] else ""
