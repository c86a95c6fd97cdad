"""Schedules and random draws as pure functions of epoch and step, so that a resumed run needs no history."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cpr_fast.config import Cycle, MemoryConfig, OptimConfig, ScheduleConfig


def cycle_epochs(schedule: ScheduleConfig) -> list[range]:
    """Returns the epochs of each cycle. Epochs are numbered from 0 over all cycles."""
    ends = list(itertools.accumulate(cycle.epochs for cycle in schedule.cycles))
    return [range(end - cycle.epochs, end) for end, cycle in zip(ends, schedule.cycles, strict=True)]


def learning_rate(cycle_epoch: int, cycle: Cycle, optim: OptimConfig, gamma: float) -> float:
    """Returns the learning rate of an epoch with `optim.schedule` = "steps": the cycle's rate times `gamma` for each
    milestone reached.

    `cycle_epoch` is counted from 0 within the cycle.
    """
    base = optim.lr if cycle.lr is None else cycle.lr
    return base * gamma ** sum(cycle_epoch >= milestone for milestone in cycle.milestones)


@dataclass(frozen=True)
class Rates:
    """The values that the schedules set before a step."""

    lr: float
    weight_decay: float
    ema_momentum: float


@dataclass(frozen=True)
class CycleRates:
    """The learning rate, the weight decay and the momentum of the key encoder of every step of a cycle.

    A warm-up and the cosines begin with the first step that learns: of S such steps and a warm-up of W, step t has
    (t + 1) / W of the learning rate while t + 1 < W, and the cosine of the learning rate falls from step W to S.

    Attributes:
        optim, memory: the settings of all cycles; those of `cycle` replace them.
        gamma: `schedule.gamma`.
        epoch_steps: number of steps per epoch.
        waiting_steps: number of steps at the start of the cycle that only fill the queue.
    """

    cycle: Cycle
    optim: OptimConfig
    memory: MemoryConfig
    gamma: float
    epoch_steps: int
    waiting_steps: int

    def at(self, epoch: int, step: int) -> Rates:
        """Returns the values of a step of an epoch, both counted from 0, the epoch within the cycle."""
        optim, memory = self.cycle.applied_to(self.optim), self.cycle.applied_to(self.memory)
        done = max(0, epoch * self.epoch_steps + step - self.waiting_steps)  # t
        steps = self.cycle.epochs * self.epoch_steps - self.waiting_steps  # S
        warmup = optim.warmup_epochs * self.epoch_steps  # W
        if optim.schedule == "cosine":
            lr = _cosine(optim.lr, optim.final_lr, done - warmup, steps - warmup)
        else:
            lr = learning_rate(epoch, self.cycle, self.optim, self.gamma)
        if done + 1 < warmup:
            lr *= (done + 1) / warmup
        return Rates(
            lr=lr,
            weight_decay=_cosine(optim.weight_decay, optim.final_weight_decay, done, steps),
            ema_momentum=_cosine(memory.ema_momentum, memory.final_ema_momentum, done, steps),
        )


def _cosine(first: float, last: float | None, done: float, steps: float) -> float:
    """Returns the value after `done` of `steps` steps on half a cosine from `first` to `last`; `first` without one."""
    if last is None or done <= 0:
        return first
    return last + (first - last) * (1 + math.cos(math.pi * min(1.0, done / steps))) / 2


def generator(seed: int, stream: int, step: int) -> np.random.Generator:
    """Returns a random generator that depends only on its arguments. It is counter-based, so every step costs the
    same."""
    # The step is the second word of the counter. Draws within a step advance the first word, so steps never overlap.
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, step, 0, 0]))


def on_device(draws: np.ndarray, device: torch.device) -> Tensor:
    """Copies draws from the host to the device; see `to_device`."""
    return to_device(torch.from_numpy(draws), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to the device; from the host through pinned memory, so that the host need not wait."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
