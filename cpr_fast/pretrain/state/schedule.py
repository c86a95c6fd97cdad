"""When things happen: pure functions of epoch and step, so that a resumed run needs no history."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from cpr_fast.config import Cycle, OptimConfig, ScheduleConfig


def cycle_epochs(schedule: ScheduleConfig) -> list[range]:
    """The epochs of each cycle; epochs count on over all cycles, from 0."""
    ends = list(itertools.accumulate(cycle.epochs for cycle in schedule.cycles))
    return [range(end - cycle.epochs, end) for end, cycle in zip(ends, schedule.cycles, strict=True)]


def learning_rate(cycle_epoch: int, cycle: Cycle, optim: OptimConfig, gamma: float) -> float:
    """The rate in an epoch of a cycle (both from 0): the cycle's, times `gamma` for each milestone reached."""
    base = optim.lr if cycle.lr is None else cycle.lr
    return base * gamma ** sum(cycle_epoch >= milestone for milestone in cycle.milestones)


def generator(seed: int, stream: int, step: int) -> np.random.Generator:
    """A generator that depends on nothing but its arguments: counter-based, so step 10^6 costs what step 0 does."""
    # The step sits in the counter's second word: draws within a step advance the first and never meet the next step's.
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, step, 0, 0]))


def on_device(draws: np.ndarray, device: torch.device) -> Tensor:
    """What was drawn on the host, as a tensor on the device; through pinned memory, so that the host does not wait for
    what the device still has to do."""
    tensor = torch.from_numpy(draws)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
