"""Schedules and draws are pure functions of epoch, seed and step: every value is listed."""

from __future__ import annotations

import dataclasses

from cpr_fast.config import Cycle, OptimConfig, ScheduleConfig
from cpr_fast.pretrain.state.schedule import cycle_epochs, generator, learning_rate


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
