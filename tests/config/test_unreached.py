"""Settings beyond the end of a training are named, with their values and where it ends; all others are silent."""

import dataclasses

import pytest

from cpr_fast.config import ClassifierConfig, Config, ProbeConfig, load
from cpr_fast.config.recipes import find_config, recipes
from cpr_fast.config.unreached import unreached_epochs, unreached_in_classifier, unreached_steps, unreached_warmups


def config(cycle, **sections):
    return Config.from_dict({"schedule": {"cycles": [{"view": "rgb", "mining": "none"} | cycle]}, **sections})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epochs": 5, "milestones": [5]},
         "schedule.cycles[0].milestones (cycle 1) lets the learning rate fall after 5 epochs, but "
         "the cycle ends after 5 epochs. Set schedule.cycles[0].milestones below 5 or change the "
         "length with --epochs, which moves them along"),
        ({"epochs": 1, "milestones": [3, 250, 280]}, "fall after 3, 250 and 280 epochs, but the cycle ends after 1 "),
        ({"epochs": 9, "milestones": [4, 250]}, "fall after 250 epochs, but"),
    ],
)  # fmt: skip
def test_a_milestone_after_the_last_epoch_is_named(given, said):
    (text,) = unreached_epochs(config(given))
    assert said in text


def test_an_interval_longer_than_the_run_is_named():
    late = config({"epochs": 5}, health={"online_every": 6}, run={"log_every": 100, "checkpoint_every": 41})
    assert "health.online_every is 6, but the run ends after 5 epochs: best.pt is never" in next(unreached_epochs(late))
    logged, saved = unreached_steps(late, 40)
    assert "run.log_every is 100, but the run ends after 40 steps: no step is logged" in logged
    assert "run.checkpoint_every is 41, but the run ends after 40 steps" in saved
    assert not list(unreached_steps(late, 100))


def test_a_cosine_has_no_milestones_and_only_a_cosine_a_final_rate():
    assert not list(unreached_epochs(config({"epochs": 5, "milestones": [5]}, optim={"schedule": "cosine"})))
    assert not list(unreached_epochs(config({"epochs": 5, "schedule": "cosine", "final_lr": 1e-4})))
    (text,) = unreached_epochs(config({"epochs": 5}, optim={"final_lr": 1e-4}))
    assert text == (
        "final_lr is 0.0001 in 1 cycle with schedule = 'steps', which does not use it. Set optim.schedule = 'cosine'"
    )


def test_a_warm_up_that_the_filling_of_the_queue_leaves_no_time_for_is_named():
    waiting = config({"epochs": 2, "mining": "cascade"}, optim={"warmup_epochs": 1.5})
    (text,) = unreached_warmups(waiting, [14], 10)
    assert "schedule.cycles[0] (cycle 1) learns in 14 steps, fewer than the 15 of its warm-up" in text
    assert not list(unreached_warmups(waiting, [15], 10))
    assert not list(unreached_warmups(waiting, [0], 10))  # it never learns, which is named elsewhere


@pytest.mark.parametrize("settings", [ClassifierConfig(epochs=7, milestones=(3, 7)), ProbeConfig(epochs=61)])
def test_the_milestones_of_a_classifier_are_checked_too(settings):
    (text,) = unreached_in_classifier("probe", settings)
    assert (
        f"probe.milestones lets the learning rate fall after {settings.milestones[-1]} epochs, but the training ends"
        in text
    )


def test_a_plateau_that_cannot_end_in_time_is_named():
    plateau = ClassifierConfig(schedule="plateau", validation=0.1, epochs=50, patience=50, milestones=(999,))
    (text,) = unreached_in_classifier("finetune", plateau)
    assert "finetune.patience is 50, but the training ends after 50 epochs: its learning rate never falls" in text
    assert not list(unreached_in_classifier("finetune", dataclasses.replace(plateau, patience=49)))


@pytest.mark.parametrize("name", recipes())
def test_no_recipe_names_an_epoch_that_it_does_not_reach(name):
    recipe = load(find_config(name))
    assert not list(unreached_epochs(recipe))
    assert not [*unreached_in_classifier("probe", recipe.probe), *unreached_in_classifier("finetune", recipe.finetune)]
