"""Schedules and draws are pure functions of epoch, seed and step: every value is listed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, MultiStepLR, SequentialLR

from cpr_fast.config import Cycle, MemoryConfig, OptimConfig, ScheduleConfig
from cpr_fast.pretrain.state.schedule import CycleRates, Rates, cycle_epochs, generator, learning_rate


def test_learning_rate_of_every_epoch():
    cycle = Cycle("rgb", 8, "none", milestones=(3, 6))
    rates = [learning_rate(epoch, cycle, OptimConfig(lr=0.5), 0.5) for epoch in range(8)]
    assert rates == [0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125]
    own = dataclasses.replace(cycle, lr=2.0)
    assert [learning_rate(epoch, own, OptimConfig(lr=0.5), 0.5) for epoch in (0, 3, 7)] == [2.0, 1.0, 0.5]


def test_epochs_count_on_over_the_cycles():
    schedule = ScheduleConfig((Cycle("rgb", 3), Cycle("flow", 1), Cycle("rgb", 2)))
    assert cycle_epochs(schedule) == [range(3), range(3, 4), range(4, 6)]


def test_draws_depend_on_seed_stream_and_step_alone():
    draws = {
        (seed, stream, step): tuple(generator(seed, stream, step).random(8))
        for seed in (0, 1)
        for stream in (1, 2)
        for step in (0, 1, 10**9)
    }
    assert len(set(sum(draws.values(), ()))) == len(draws) * 8
    assert draws[1, 2, 10**9] == tuple(generator(1, 2, 10**9).random(8))


def cycle_rates(cycle: Cycle, *, memory=None, epoch_steps=7, waiting=0, **optim) -> list[Rates]:
    """Returns the values of every step of a cycle."""
    rates = CycleRates(cycle, OptimConfig(**optim), memory or MemoryConfig(), 0.1, epoch_steps, waiting)
    return [rates.at(epoch, step) for epoch in range(cycle.epochs) for step in range(epoch_steps)]


def of_torch(first: float, make: Callable[[torch.optim.Optimizer], LRScheduler], steps: int) -> list[float]:
    """Returns the learning rates that a scheduler of torch sets before each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], first)
    scheduler, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_by_default_nothing_changes_but_at_milestones():
    cycle = Cycle("rgb", 8, "none", milestones=(3, 6), lr=0.3)
    found = cycle_rates(cycle, lr=0.5, weight_decay=0.07, memory=MemoryConfig(ema_momentum=0.9))
    expected = [learning_rate(epoch, cycle, OptimConfig(lr=0.5), 0.1) for epoch in range(8) for _ in range(7)]
    assert found == [Rates(lr, 0.07, 0.9) for lr in expected]


def test_warm_up_and_cosine_are_those_of_torch():
    found = [rates.lr for rates in cycle_rates(Cycle("rgb", 9), lr=0.3, schedule="cosine", final_lr=0.01,
                                               warmup_epochs=2.0)]  # fmt: skip

    def schedulers(optimizer):
        rise = LinearLR(optimizer, start_factor=1 / 14, total_iters=13)  # from 1 / 14 to 1 in 14 steps
        return SequentialLR(optimizer, [rise, CosineAnnealingLR(optimizer, 63 - 14, eta_min=0.01)], milestones=[14])

    assert found == pytest.approx(of_torch(0.3, schedulers, 63), rel=1e-9)
    assert found[0] == 0.3 * (1 / 14) and found[13] == found[14] == 0.3 and 0.01 < found[-1] < 0.0105


def test_warm_up_and_milestones_are_those_of_torch():
    cycle = Cycle("rgb", 6, milestones=(1, 4))  # the first drop is within the warm-up
    found = [rates.lr for rates in cycle_rates(cycle, lr=0.3, warmup_epochs=2.0)]
    rise = of_torch(1.0, lambda optimizer: LinearLR(optimizer, start_factor=1 / 14, total_iters=13), 42)
    drops = of_torch(0.3, lambda optimizer: MultiStepLR(optimizer, [7, 28], 0.1), 42)
    assert found == pytest.approx([a * b for a, b in zip(rise, drops, strict=True)], rel=1e-9)


@pytest.mark.parametrize("last", [0.0, 0.2, 0.04])
def test_weight_decay_follows_a_cosine_up_or_down(last):
    found = [rates.weight_decay for rates in cycle_rates(Cycle("rgb", 5), weight_decay=0.04, final_weight_decay=last,
                                                         warmup_epochs=1.0)]  # fmt: skip
    cosine = of_torch(0.04, lambda optimizer: CosineAnnealingLR(optimizer, 35, eta_min=last), 35)
    assert found == pytest.approx(cosine, rel=1e-9)  # the warm-up is of the learning rate alone


def test_the_momentum_of_the_key_encoder_is_that_of_byol():
    memory = MemoryConfig(ema_momentum=0.96, final_ema_momentum=1.0)
    found = [rates.ema_momentum for rates in cycle_rates(Cycle("rgb", 3), memory=memory)]
    byol = [1 - (1 - 0.96) * (math.cos(math.pi * k / 21) + 1) / 2 for k in range(21)]  # Grill et al. 2020, section 3.3
    assert found == pytest.approx(byol, rel=1e-12) and found[0] == 0.96


def test_schedules_begin_with_the_first_step_that_learns():
    cosines = {"schedule": "cosine", "final_weight_decay": 0.3, "warmup_epochs": 1.0}
    memory = MemoryConfig(final_ema_momentum=1.0)
    waiting = cycle_rates(Cycle("rgb", 4), waiting=7, memory=memory, **cosines)
    whole = cycle_rates(Cycle("rgb", 3), memory=memory, **cosines)
    assert waiting[:7] == [whole[0]] * 7 and waiting[7:] == whole


@pytest.mark.parametrize(
    ("epochs", "warmup", "rises"),
    [(2, 0.5, [1 / 3.5, 2 / 3.5, 3 / 3.5, 1.0]), (1, 1.0, [step / 7 for step in range(1, 8)]), (2, 0.1, [1.0])],
)
def test_a_warm_up_may_be_a_fraction_of_an_epoch_or_the_whole_cycle(epochs, warmup, rises):
    steps = cycle_rates(Cycle("rgb", epochs), lr=2.0, warmup_epochs=warmup)
    assert [rates.lr / 2 for rates in steps[: len(rises)]] == pytest.approx(rises)
    assert all(rates.lr == 2.0 for rates in steps[len(rises) :])
    assert cycle_rates(Cycle("rgb", epochs), schedule="cosine", warmup_epochs=warmup)[0].lr > 0


def test_a_cycle_replaces_settings_of_the_same_name():
    own = Cycle("rgb", 2, lr=0.2, schedule="cosine", final_lr=0.1, warmup_epochs=1.0, weight_decay=0.3,
                final_weight_decay=0.4, ema_momentum=0.5, final_ema_momentum=0.6)  # fmt: skip
    common = {"lr": 0.2, "schedule": "cosine", "final_lr": 0.1, "warmup_epochs": 1.0, "weight_decay": 0.3,
              "final_weight_decay": 0.4}  # fmt: skip
    memory = MemoryConfig(ema_momentum=0.5, final_ema_momentum=0.6)
    assert cycle_rates(own) == cycle_rates(Cycle("rgb", 2), memory=memory, **common) != cycle_rates(Cycle("rgb", 2))
    assert Cycle("rgb", 2, momentum=0.1).applied_to(OptimConfig(momentum=0.5)) == OptimConfig(momentum=0.1)
    assert Cycle("rgb", 2, momentum=0.1).applied_to(MemoryConfig()) == MemoryConfig()
