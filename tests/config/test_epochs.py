"""`--epochs`: a run has exactly the requested number of epochs, and every drop of the learning rate takes place."""

import dataclasses

import pytest

from cpr_fast.config import (
    ClassifierConfig,
    Config,
    ConfigError,
    Cycle,
    OptimConfig,
    ProbeConfig,
    ScheduleConfig,
    load,
    override_classifier,
)
from cpr_fast.config.epochs import scale_epochs, scale_milestones
from cpr_fast.config.recipes import find_config, recipes


def drops(milestones, epochs):
    """Number of times that the learning rate falls during a training that starts at the full rate."""
    return sum(0 < milestone < epochs for milestone in milestones)


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_keeps_total_and_drops(name):
    config = load(find_config(name))
    before = config.schedule.cycles
    total = sum(cycle.epochs for cycle in before)
    for epochs in {len(before), len(before) + 1, 7, 10, 37, 100, 333, total, total + 1, 3 * total}:
        if epochs < len(before):
            continue
        after = scale_epochs(config, epochs).schedule.cycles
        assert sum(cycle.epochs for cycle in after) == epochs
        for old, new in zip(before, after, strict=True):
            assert new.epochs >= 1
            assert abs(new.epochs - old.epochs * epochs / total) < max(1, len(before) - 1)
            assert list(new.milestones) == sorted(set(new.milestones))
            assert len(new.milestones) == drops(new.milestones, new.epochs)
            assert len(new.milestones) == min(drops(old.milestones, old.epochs), new.epochs - 1)
            kept = {name: getattr(old, name) for name in ("epochs", "milestones", "warmup_epochs")}
            assert dataclasses.replace(new, **kept) == old
    assert scale_epochs(config, total) == config


def test_warm_ups_are_scaled_along_and_fit_into_their_cycles():
    cycles = (Cycle("rgb", 30, "none"), Cycle("flow", 8, warmup_epochs=2.0), Cycle("rgb", 2, lr=1e-4))
    config = Config(schedule=ScheduleConfig(cycles), optim=OptimConfig(warmup_epochs=2.0))
    half, tiny = scale_epochs(config, 20), scale_epochs(config, 3)
    assert (half.optim.warmup_epochs, tiny.optim.warmup_epochs) == (1.0, pytest.approx(0.15))
    assert [cycle.warmup_epochs for cycle in half.schedule.cycles] == [None, 1.0, None]
    assert [cycle.warmup_epochs for cycle in tiny.schedule.cycles] == [None, 0.25, None]
    shorter = scale_epochs(Config(schedule=ScheduleConfig((Cycle("rgb", 4), Cycle("flow", 1))),
                                  optim=OptimConfig(warmup_epochs=1.0)), 7)  # fmt: skip
    assert [cycle.warmup_epochs for cycle in shorter.schedule.cycles] == [None, 1.0]  # 1.4 of 1 epoch


def test_the_share_of_each_cycle_is_the_largest_remainder():
    cycles = (Cycle("rgb", 300, "none"), Cycle("flow", 300, "none"), Cycle("rgb", 1), Cycle("flow", 99))
    config = dataclasses.replace(Config(), schedule=dataclasses.replace(Config().schedule, cycles=cycles))
    # Of 10 epochs: 4.28, 4.28, .01 and 1.41. The third cycle needs one epoch, so the others get one less in total.
    assert [cycle.epochs for cycle in scale_epochs(config, 10).schedule.cycles] == [4, 4, 1, 1]
    assert [cycle.epochs for cycle in scale_epochs(config, 4).schedule.cycles] == [1, 1, 1, 1]
    with pytest.raises(ConfigError, match="--epochs: expected at least one epoch for each of the 4 cycles, got 3"):
        scale_epochs(config, 3)


@pytest.mark.parametrize(
    ("milestones", "old", "new", "expected"),
    [
        ((250, 280), 300, 30, (25, 28)),
        ((250, 280), 300, 10, (8, 9)),
        ((250, 280), 300, 3, (1, 2)),
        ((250, 280), 300, 2, (1,)),
        ((250, 280), 300, 1, ()),
        ((60, 80), 100, 4, (2, 3)),
        ((299,), 300, 10, (9,)),  # would be epoch 10, which does not exist
        ((80, 100, 200), 100, 50, (40,)),  # the other drops never took effect
        ((), 100, 5, ()),
    ],
)
def test_milestones_stay_inside_and_distinct(milestones, old, new, expected):
    assert scale_milestones(milestones, old, new) == expected


@pytest.mark.parametrize("settings", [ClassifierConfig(), ProbeConfig()])
@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 17, 1000])
def test_a_classifier_keeps_its_drops(settings, epochs):
    changed = override_classifier("probe", settings, epochs=epochs, lr=None)
    assert changed.epochs == epochs and changed.lr == settings.lr
    assert len(changed.milestones) == drops(changed.milestones, epochs) == min(2, epochs - 1)


@pytest.mark.parametrize("epochs", [0, -3])
def test_a_classifier_without_epochs_is_refused(epochs):
    with pytest.raises(ConfigError, match=f"finetune.epochs: expected a positive number, got {epochs}"):
        override_classifier("finetune", ClassifierConfig(), epochs=epochs)
