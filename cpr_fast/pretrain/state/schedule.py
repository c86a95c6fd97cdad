"""Schedules and random draws as pure functions of epoch and step, so that a resumed run needs no history."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from cpr_fast.config import Cycle, OptimConfig, ScheduleConfig


def cycle_epochs(schedule: ScheduleConfig) -> list[range]:
    """Returns the epochs of each cycle. Epochs are numbered from 0 over all cycles."""
    ends = list(itertools.accumulate(cycle.epochs for cycle in schedule.cycles))
    return [range(end - cycle.epochs, end) for end, cycle in zip(ends, schedule.cycles, strict=True)]


def learning_rate(cycle_epoch: int, cycle: Cycle, optim: OptimConfig, gamma: float) -> float:
    """Returns the learning rate of an epoch: the cycle's rate times `gamma` for each milestone reached.

    `cycle_epoch` is counted from 0 within the cycle.
    """
    base = optim.lr if cycle.lr is None else cycle.lr
    return base * gamma ** sum(cycle_epoch >= milestone for milestone in cycle.milestones)


def generator(seed: int, stream: int, step: int) -> np.random.Generator:
    """Returns a random generator that depends only on its arguments. It is counter-based, so every step costs the
    same."""
    # The step is the second word of the counter. Draws within a step advance the first word, so steps never overlap.
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, step, 0, 0]))


def on_device(draws: np.ndarray, device: torch.device) -> Tensor:
    """Copies draws from the host to the device, through pinned memory so that the host need not wait for the device."""
    tensor = torch.from_numpy(draws)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
