"""Settings with which a run would learn nothing are reported before it starts, with the settings to change."""

from __future__ import annotations

import dataclasses
import re

import pytest
from support.small_runs import INDEX, rows, run, settings
from support.stand_in_loader import RandomLoader

from cpr_fast.config import Config
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError
from cpr_fast.pretrain.run.checks import check_run, plan_cycles
from cpr_fast.pretrain.run.loop import pretrain

pytestmark = pytest.mark.usefixtures("one_thread")

RGB = {"view": "rgb", "epochs": 8, "mining": "none"}
CASCADE = {"view": "rgb", "epochs": 8, "mining": "cascade"}


def warnings(index: Index = INDEX, cycles=(RGB,), **sections) -> list[str]:
    config = settings("run", schedule={"cycles": list(cycles)}, **sections)
    return check_run(config, index, plan_cycles(config, len(index), 1), stored_flow=False)


def changed(**values) -> Index:
    return Index([dataclasses.replace(video, **values) for video in INDEX])


FLOW = {"view": "flow", "epochs": 8, "mining": "none"}  # before a cascade, whose frozen features are then not random


@pytest.mark.parametrize(
    ("expected", "given"),
    [
        # 18 videos in batches of 6 are 3 steps an epoch.
        (r"cycle 1 .*NEVER LEARNS.*memory.size = 60 .*after 10 steps, but the cycle ends after 3 steps \(1 epoch of 3 "
         r"steps\). Set memory.size to 6 or less, or schedule.cycles\[0\].epochs to 14 or more",
         {"cycles": [RGB | {"epochs": 1}], "memory": {"size": 60}}),
        (r"learns in only 14 of its 24 steps .*the first 10 \(42%\) fill the queue", {"memory": {"size": 60}}),
        (r"cycle 2 .*NEVER LEARNS", {"cycles": [RGB, RGB | {"epochs": 1}], "memory": {"size": 18}}),
        (r"cycle 1 .*never mines: its bank is full after 3 steps, and it ends after 3. Set .*epochs to at least 2",
         {"cycles": [CASCADE | {"epochs": 1, "other": "residual"}], "memory": {"kind": "bank"}}),
        (r"cycle 2 .*can mine nothing: all 18 videos have the source 'one'",
         {"index": changed(source="one"), "cycles": [FLOW, CASCADE]}),
        (r"every entry is a positive and nothing is learnt",
         {"index": changed(source="one"), "cycles": [FLOW, CASCADE], "loss": {"protocol": "coclr"}}),
        (r"mines fewer than top_k = 10 entries .*2 of 18 videos have the source 'source0', so about 8.9 of the 10",
         {"cycles": [FLOW, CASCADE | {"top_k": 10}]}),
        (r"all 18 videos have the label 'same', so that every entry", {"index": changed(label="same"),
         "cycles": [RGB | {"mining": "label"}]}),
        (r"compares features of the flow encoder, which no earlier cycle trains", {"cycles": [CASCADE]}),
        (r"a learning rate of 1e-09", {"optim": {"lr": 1e-9}}),
        (r"schedule.gamma is 0", {"schedule_gamma": 0.0, "cycles": [RGB | {"milestones": [1]}]}),
        (r"loss.temperature is 1e\+06", {"loss": {"temperature": 1e6}}),
        (r"memory.ema_momentum is 1", {"memory": {"size": 10, "ema_momentum": 1.0}}),
        (r"18 of 18 videos are shorter than a clip of 61 frames",
         {"data": {"batch_size": 6, "frames": 61, "size": 20}}),
        (r"both clips of a video are the same", {"data": {"batch_size": 6, "frames": 60, "size": 20,
                                                          "augment": "none"}}),
        (r"data.batch_size is 1 with memory.kind = 'batch'",
         {"data": {"batch_size": 1, "frames": 5, "size": 20}, "memory": {"kind": "batch"}}),
        (r"the training set is one video", {"index": Index(list(INDEX)[:1]), "memory": {"kind": "bank"},
                                            "data": {"batch_size": 1, "frames": 5, "size": 20}}),
    ],
)  # fmt: skip
def test_it_is_named_with_what_to_set(expected, given):
    gamma = given.pop("schedule_gamma", None)
    if gamma is None:
        found = warnings(**given)
    else:
        values = settings("run", schedule={"cycles": given["cycles"], "gamma": gamma})
        found = check_run(values, INDEX, plan_cycles(values, len(INDEX), 1), stored_flow=False)
    assert any(re.search(expected, text) for text in found), found


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"cycles": [FLOW, CASCADE]},
        {"cycles": [RGB | {"mining": "label"}]},
        {"memory": {"kind": "bank"}, "cycles": [FLOW, CASCADE]},
        {"memory": {"kind": "batch"}, "cycles": [FLOW, CASCADE]},
        {"memory": {"kind": "bank"}, "model": {"shared": True, "width": 0.125, "feature_dim": 8},
         "cycles": [CASCADE | {"other": "residual"}]},
    ],
)  # fmt: skip
def test_sound_settings_raise_no_warning(given):
    assert warnings(**given) == []


def test_the_advice_that_is_given_is_sound():
    """Following either part of the advice removes the warning about the memory."""
    assert len(warnings(cycles=[RGB | {"epochs": 1}], memory={"size": 60})) == 1
    assert warnings(cycles=[RGB | {"epochs": 14}], memory={"size": 60}) == []
    assert warnings(cycles=[RGB], memory={"size": 36}) == []


@pytest.mark.parametrize("size", [6, 7, 12, 13, 17, 18])
def test_the_plan_is_what_the_loop_does(tmp_path, size):
    """The first step with a loss is the one after `waiting_steps`."""
    config = settings(tmp_path, memory={"size": size}, schedule={"cycles": [RGB | {"epochs": 2}]})
    (plan,) = plan_cycles(config, len(INDEX), 1)
    losses = [row["loss"] for row in rows(run(config), "step")]
    assert len(losses) == plan.steps
    assert [loss is None for loss in losses] == [step < plan.waiting_steps for step in range(plan.steps)]


def test_flow_that_is_not_there_is_named_before_the_first_cycle():
    cycles = [RGB, {"view": "flow", "epochs": 1, "mining": "none"}]
    config = settings("run", schedule={"cycles": cycles})
    with pytest.raises(InputError, match=r"cycle 2 .*needs optical flow, but 18 of 18 videos have no flow_path"):
        check_run(config, INDEX, plan_cycles(config, len(INDEX), 1), stored_flow=True)


def test_a_run_warns_at_its_start_and_at_its_end(tmp_path, caplog):
    config: Config = settings(tmp_path, memory={"size": 60}, schedule={"cycles": [RGB | {"epochs": 1}]})
    pretrain(config, index=INDEX, make_loader=RandomLoader, progress=False)
    text = caplog.text
    assert "NEVER LEARNS" in text and "This run has learnt nothing" in text
    assert text.index("NEVER LEARNS") < text.index("This run has learnt nothing")
