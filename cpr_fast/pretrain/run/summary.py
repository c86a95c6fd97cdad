"""The text that a run prints on stderr: a summary at the start, the time left, and a summary at the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpr_fast.config import Config
from cpr_fast.data.index.index import Index
from cpr_fast.pretrain.run.checks import CyclePlan
from cpr_fast.runtime.distributed import World
from cpr_fast.runtime.progress import FEW_S, about, rounded
from cpr_fast.wording import counted

MEASURED = 5  # learning steps after which the expected time is printed
PATIENCE_S = 60.0  # if filling takes longer, a first estimate is printed after this time
LONGEST_MEAN = 20  # steps, or two epochs if they are longer: the running mean of step times covers about as many


def start_lines(config: Config, index: Index, plans: Sequence[CyclePlan], folder: Path, world: World) -> list[str]:
    """Returns the summary that is printed before the first step."""
    labelled = sum(bool(video.label) for video in index)
    classes = len({video.label for video in index if video.label})
    labels = f"{counted(classes, 'class', 'classes')}" if labelled else "no labels (PMR and CMR will be missing)"
    if 0 < labelled < len(index):
        labels += f" ({counted(len(index) - labelled, 'video')} without a label)"
    sources = len({video.source for video in index})
    batch = f"{config.data.batch_size}" + (f" x {world.size} processes" if world.size > 1 else "")
    lines = [
        f"Pretraining on {counted(len(index), 'video')} of {counted(sources, 'source')}, {labels}",
        f"  {counted(plans[0].epoch_steps, 'step')} per epoch (batch size {batch}), "
        f"{counted(sum(p.steps for p in plans), 'step')} in total, "
        f"on {world.device.type}",
    ]
    lines += [f"  {plan.name}: {counted(plan.cycle.epochs, 'epoch')}, {_memory(config, plan)}" for plan in plans]
    return [*lines, f"  Run folder: {folder}"]


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
    pass.

    Args:
        filling, learning: number of steps of each kind that are left, over all cycles.
        epoch_steps: number of steps of an epoch. The last step of each also saves a checkpoint and may measure
            retrieval, so the mean covers whole epochs; otherwise the expected time would jump after each.
    """

    def __init__(self, filling: int, learning: int, epoch_steps: int = 1) -> None:
        self.window = max(LONGEST_MEAN, 2 * epoch_steps)
        self.left = {False: filling, True: learning}
        self.mean_s: dict[bool, float] = {}
        self.counted = {False: 0, True: 0}
        self.began = time.monotonic()
        self.told = {False: False, True: False}

    def step(self, seconds: float, *, learns: bool) -> None:
        """Records the wall time of one step, including the time spent waiting for data."""
        self.left[learns] = max(0, self.left[learns] - 1)
        self.counted[learns] += 1
        if self.counted[learns] <= 1 < self.left[learns]:
            return  # the first step of a kind also sets up caches and kernels
        before = self.mean_s.get(learns, seconds)
        self.mean_s[learns] = before + (seconds - before) / min(self.counted[learns], self.window)

    def left_s(self) -> float | None:
        """Returns the seconds that the rest of the run takes at this pace, or None before any step was timed."""
        if not self.mean_s:
            return None
        known = max(self.mean_s.values())
        return sum(self.left[kind] * self.mean_s.get(kind, known) for kind in (False, True))

    def news(self) -> str | None:
        """Returns a sentence about the expected time as soon as it can be estimated, at most once for each kind of
        step."""
        left = self.left_s()
        if left is None:
            return None
        if not self.told[True] and self.counted[True] >= MEASURED and True in self.mean_s:
            self.told[True] = self.told[False] = True
            return f"Expected time: {about(left)} left ({self.mean_s[True]:.2g} s per step, measured)"
        if not self.told[False] and not self.counted[True] and time.monotonic() - self.began > PATIENCE_S:
            self.told[False] = True
            if self.left[True] and left >= FEW_S:
                return f"Expected time: at least {rounded(left)} left (steps take longer once the queue is full)"
        return None

    def text(self) -> str:
        """Returns the time left of the whole run for the progress line, or "" where it is not known or nothing is left.

        While no step has learnt, the time is a lower bound, and is shown as one."""
        left = self.left_s()
        if not left:
            return ""
        if self.left[True] and True not in self.mean_s:
            return f"at least {rounded(left)} left in total" if left >= FEW_S else ""
        return f"{about(left)} left in total"
