"""Settings with which a run would learn nothing are reported before it starts, with the settings to change."""

from __future__ import annotations

import dataclasses
import re

import pytest
from support.numbered_videos import write_numbered
from support.small_runs import INDEX, rows, run, settings
from support.stand_in_loader import RandomLoader

from cpr_fast.config import Config
from cpr_fast.config.epochs import share_epochs
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
         r"steps\). Set memory.size to 6 or less, or schedule.cycles\[0\].epochs \(cycle 1\) to 14 or more",
         {"cycles": [CASCADE | {"epochs": 1}], "memory": {"size": 60}}),
        (r"learns in only 14 of its 24 steps .*the first 10 \(42%\) fill the queue",
         {"cycles": [CASCADE], "memory": {"size": 60}}),
        (r"cycle 2 .*NEVER LEARNS", {"cycles": [FLOW, CASCADE | {"epochs": 1}], "memory": {"size": 18}}),
        (r"cycle 1 .*never fills its queue of memory.size = 60 entries: it ends after 3 steps \(1 epoch of 3 steps\) "
         r"with 18 keys in it, .*Set memory.size to 18 or less, or .*cycles\[0\].epochs \(cycle 1\) to 4",
         {"cycles": [RGB | {"epochs": 1}], "memory": {"size": 60}}),
        (r"cycle 1 .*mining label.*never fills its queue .*random vectors",
         {"cycles": [RGB | {"epochs": 1, "mining": "label"}], "memory": {"size": 19}}),
        (r"cycle 1 .*its bank is full after 3 steps, and it ends after 3. Set .*epochs \(cycle 1\) to 2 or",
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
        (r"loss.temperature is 1e\+06", {"loss": {"temperature": 1e6}}),
        (r"memory.ema_momentum is 1", {"memory": {"size": 10, "ema_momentum": 1.0}}),
        (r"18 of 18 videos are shorter than a clip of 61 frames",
         {"data": {"batch_size": 6, "frames": 61, "size": 16}}),
        (r"18 of 18 videos are shorter than a clip of 60 frames at stride 1 of 5 samples per second",
         {"index": changed(fps=25.0), "data": {"batch_size": 6, "frames": 60, "size": 16, "fps": 5.0}}),
        (r"both clips of a video are the same", {"data": {"batch_size": 6, "frames": 60, "size": 16,
                                                          "augment": "none"}}),
        (r"data.batch_size is 1 with memory.kind = 'batch'",
         {"data": {"batch_size": 1, "frames": 8, "size": 16}, "memory": {"kind": "batch"}}),
        (r"the training set is one video", {"index": Index(list(INDEX)[:1]), "memory": {"kind": "bank"},
                                            "data": {"batch_size": 1, "frames": 8, "size": 16}}),
    ],
)  # fmt: skip
def test_it_is_named_with_what_to_set(expected, given):
    found = warnings(**given)
    assert any(re.search(expected, text) for text in found), found


ONE_STAGE = {"stages": 1}  # which is never idle, however small the memory
ONE, LONG = {"epochs": 1}, {"epochs": 40}


@pytest.mark.parametrize(
    ("expected", "given"),
    [
        (["cycles 1 to 3 and 5 NEVER LEARN: training starts once the queue of memory.size = 24 entries is full, after "
          "4 steps, but they end after 3 steps (1 epoch of 3 steps). Set memory.size to 6 or less, or the epochs of "
          "each of them (schedule.cycles) to 6 or more (with --epochs: 36 or more for the whole run)",
          "cycle 4 (rgb, mining cascade) learns in only 2 of its 6 steps (2 epochs of 3 steps): the first 4 (67%) fill "
          "the queue of memory.size = 24 entries. Set memory.size to 6 or less, or "
          "schedule.cycles[3].epochs (cycle 4) to 6 or more (with --epochs: 18 or more for the whole run)"],
         {"cycles": [CASCADE | ONE, CASCADE | ONE, CASCADE | ONE, CASCADE | {"epochs": 2}, CASCADE | ONE],
          "memory": {"size": 24}, "model": {"init": {"flow": "f.pt"}, "width": 0.0625, "feature_dim": 8}}),
        (["cycles 1 to 3 never fill their queue of memory.size = 24 entries: they end after 3 steps (1 epoch of 3 "
          "steps) with 18 keys in it, and the other entries are still the random vectors that a queue starts with, "
          "which are easy negatives. Set memory.size to 18 or less, or the epochs of each of them (schedule.cycles) to "
          "2 or more (with --epochs: 10 or more for the whole run)"],
         {"cycles": [RGB | ONE, FLOW | ONE, RGB | ONE | {"mining": "label"}, RGB | {"epochs": 2}],
          "memory": {"size": 24}}),
        (["cycles 2 and 3 learn in only 14 to 20 of their 24 to 30 steps (8 to 10 epochs of 3 steps): the first 10 "
          "(33% to 42%) fill the queue of memory.size = 60 entries. Set memory.size to 36 or less, or the epochs of "
          "each of them (schedule.cycles) to 14 or more (with --epochs: 46 or more for the whole run)"],
         {"cycles": [FLOW, CASCADE, CASCADE | {"epochs": 10}], "memory": {"size": 60}}),
        (["cycles 1 and 2 never mine: their bank is full after 3 steps, and they end after 3. Set the epochs of each "
          "of them (schedule.cycles) to 2 or more (with --epochs: 4 or more for the whole run)"],
         {"cycles": [CASCADE | ONE | {"other": "residual"}, CASCADE | ONE | {"view": "residual", "other": "rgb"}],
          "memory": {"kind": "bank"}, "model": {"shared": True, "width": 0.0625, "feature_dim": 8}}),
        (["cycles 1 and 3 have a learning rate of 1e-09, 1e-08: the weights will hardly change; set optim.lr (the "
          "published value is 0.001)"], {"cycles": [RGB | {"lr": 1e-9}, FLOW, CASCADE | {"lr": 1e-8}]}),
        (["cycles 2 and 3 can mine nothing: all 18 videos have the source 'one', and videos of one source are never "
          "mined for each other. Give them different sources in the index, or set mining = 'none'"],
         {"index": changed(source="one"), "cycles": [FLOW, CASCADE, CASCADE]}),
        (["cycles 2 and 3 mine fewer than top_k = 9 to 10 entries for many queries: 2 of 18 videos have the source "
          "'source0', so about 8.9 of the 10 entries of the memory are of other sources. Set mining.top_k lower, or "
          "correct the column `source` of the index"],
         {"cycles": [FLOW, CASCADE | {"top_k": 9}, CASCADE | {"top_k": 10}], "mining": ONE_STAGE}),
        (["cycles 2 and 3 mine with fewer stages than mining.stages = 7: stages 5, 6 and 7 select nothing, because the "
          "stages keep 20, 10, 5, 2, 2, 2 and 2 of 40 entries. Set mining.stages to 4 or memory.size to 192 or more"],
         {"cycles": [FLOW | LONG, CASCADE | LONG, CASCADE | LONG],
          "mining": {"stages": 7, "ratio": 0.5, "top_k": 2}, "memory": {"size": 40}}),
        (["cycle 1 (rgb, mining cascade) mines with fewer stages than mining.stages = 5: stage 5 selects nothing, "
          "because the stages keep 9, 4, 2, 1 and 1 of 18 entries. Set mining.stages to 4",
          "cycle 2 (rgb, mining cascade) mines with fewer stages than mining.stages = 5: stages 4 and 5 select "
          "nothing, because the stages keep 9, 4, 2, 2 and 2 of 18 entries. Set mining.stages to 3"],
         {"cycles": [CASCADE | {"other": "residual", "top_k": k} for k in (1, 2)], "memory": {"kind": "bank"},
          "model": {"shared": True, "width": 0.125, "feature_dim": 8},
          "mining": {"stages": 5, "ratio": 0.5}}),
        (["cycles 1 and 2 compare features of the flow encoder, which no earlier cycle trains and model.init.flow does "
          "not name: its weights are random. Put a cycle {view = 'flow', mining = 'none'} before them, or name a "
          "checkpoint"], {"cycles": [CASCADE, CASCADE, FLOW, CASCADE]}),
        (["cycles 1 and 2 learn nothing: all 18 videos have the label 'same', so that every entry of the memory is a "
          "positive. Set mining = 'none' or 'cascade'"],
         {"index": changed(label="same"), "cycles": [RGB | {"mining": "label"}] * 2}),
    ],
)  # fmt: skip
def test_a_reason_is_given_once_with_the_cycles_it_concerns(expected, given):
    assert warnings(**given) == expected


def test_the_advice_for_several_cycles_is_sound():
    short = [FLOW | {"epochs": 2}, CASCADE | {"epochs": 4}, CASCADE | {"epochs": 2}, CASCADE | {"epochs": 3}]
    (warning,) = warnings(cycles=short, memory={"size": 24}, mining=ONE_STAGE)
    assert "Set memory.size to 6 or less, or the epochs of each of them (schedule.cycles) to 6 or more" in warning
    assert warnings(cycles=short, memory={"size": 6}, mining=ONE_STAGE) == []
    assert warnings(cycles=[cycle | {"epochs": 6} for cycle in short], memory={"size": 24}, mining=ONE_STAGE) == []
    total = int(re.search(r"with --epochs: (\d+) or more", warning).group(1))

    def left(total: int) -> list[str]:
        parts = share_epochs([cycle["epochs"] for cycle in short], total)
        cycles = [cycle | {"epochs": n} for cycle, n in zip(short, parts, strict=True)]
        return warnings(cycles=cycles, memory={"size": 24}, mining=ONE_STAGE)

    assert left(total - len(short)) and not any(left(total + more) for more in range(40))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"cycles": [FLOW, CASCADE]},
        {"cycles": [RGB | {"mining": "label"}]},
        {"cycles": [RGB | {"epochs": 1}], "memory": {"size": 18}},  # full with the last step, and learns from the first
        {"cycles": [RGB | {"epochs": 4}], "memory": {"size": 60}},
        {"memory": {"kind": "bank"}, "cycles": [FLOW, CASCADE]},
        {"memory": {"kind": "batch"}, "cycles": [FLOW, CASCADE]},
        {"memory": {"kind": "bank"}, "model": {"shared": True, "width": 0.0625, "feature_dim": 8},
         "cycles": [CASCADE | {"other": "residual"}]},
    ],
)  # fmt: skip
def test_sound_settings_raise_no_warning(given):
    assert warnings(**given) == []


def test_the_advice_that_is_given_is_sound():
    """Following either part of the advice removes the warning about the memory."""
    assert len(warnings(cycles=[FLOW, CASCADE | {"epochs": 1}], memory={"size": 60})) == 1
    assert warnings(cycles=[FLOW, CASCADE | {"epochs": 14}], memory={"size": 60}) == []
    assert warnings(cycles=[FLOW, CASCADE], memory={"size": 36}) == []
    assert len(warnings(cycles=[RGB | {"epochs": 1}], memory={"size": 19})) == 1
    assert warnings(cycles=[RGB | {"epochs": 2}], memory={"size": 19}) == []


@pytest.mark.parametrize(
    ("mining", "size", "waiting"),
    [("cascade", 6, 1), ("cascade", 13, 3), ("cascade", 18, 3), ("none", 13, 0), ("label", 18, 0)],
)
def test_the_plan_is_what_the_loop_does(tmp_path, mining, size, waiting):
    """The first step with a loss is the one after `waiting_steps`: a cascade waits for its queue, others do not."""
    config = settings(tmp_path, memory={"size": size}, schedule={"cycles": [CASCADE | {"epochs": 2, "mining": mining}]})
    (plan,) = plan_cycles(config, len(INDEX), 1)
    losses = [row["loss"] for row in rows(run(config), "step")]
    assert len(losses) == plan.steps and plan.waiting_steps == waiting
    assert [loss is None for loss in losses] == [step < waiting for step in range(plan.steps)]


def test_flow_that_is_not_there_is_named_before_the_first_cycle():
    cycles = [RGB, {"view": "flow", "epochs": 1, "mining": "none"}]
    config = settings("run", schedule={"cycles": cycles})
    with pytest.raises(InputError, match=r"cycle 2 .*needs optical flow, but 18 of 18 videos have no flow_path"):
        check_run(config, INDEX, plan_cycles(config, len(INDEX), 1), stored_flow=True)


def test_motion_vectors_that_are_not_there_are_named_before_the_first_cycle(tmp_path):
    cycles = [RGB, {"view": "flow", "epochs": 1, "mining": "none"}]
    config = settings("run", schedule={"cycles": cycles}, data={"flow": "vectors"})
    plans = plan_cycles(config, len(INDEX), 1)
    coded, other = write_numbered(tmp_path / "a", 4), write_numbered(tmp_path / "b", 4, "vp9")
    pictures = tmp_path / "img_%05d.jpg"

    def check(*paths) -> None:
        videos = [dataclasses.replace(video, path=paths[i % len(paths)]) for i, video in enumerate(INDEX)]
        check_run(config, Index(videos), plans, stored_flow=False)

    with pytest.raises(InputError, match=r"data\.flow: cycle 2 .*each of 8 videos .* has none: pictures \(first: "):
        check(pictures)
    with pytest.raises(InputError, match=r"has none: vp9 \(first: .*b\.webm"):
        check(other)
    check(coded, other, pictures)
    check(tmp_path / "missing.mp4")  # it is reported where it is read


def test_a_run_warns_at_its_start_and_at_its_end(tmp_path, caplog):
    config: Config = settings(tmp_path, memory={"size": 60}, schedule={"cycles": [CASCADE | {"epochs": 1}]})
    pretrain(config, index=INDEX, make_loader=RandomLoader, progress=False)
    text = caplog.text
    assert "NEVER LEARNS" in text and "This run has learnt nothing" in text
    assert text.index("NEVER LEARNS") < text.index("This run has learnt nothing")
