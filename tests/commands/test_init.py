"""`cpr-fast init`: its recipes load, and the memory fills early enough, for data sets of every size."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from support.stand_in_loader import make_index

from cpr_fast.cli import main
from cpr_fast.commands.training.init import _step_time
from cpr_fast.config import load
from cpr_fast.data.index.index import Index
from cpr_fast.doctor import bottleneck
from cpr_fast.errors import InputError
from cpr_fast.experiments.sizing import Facts, sized_recipe
from cpr_fast.mining.stages import stage_keep

SIZES = [8, 9, 10, 13, 17, 31, 32, 50, 64, 100, 127, 500, 1000, 2730, 3783, 9537, 30_000, 100_000]


def facts(videos: int, **changes) -> Facts:
    given = {"sources": max(2, videos // 3), "largest_source": 3, "median_frames": 120, "with_flow": videos}
    return Facts(videos, **(given | {"split": "train", "cores": 8, "gpu": False} | changes))


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("videos", SIZES)
def test_a_recipe_of_every_size_can_learn(tmp_path, videos, gpu):
    for with_flow in (0, videos - 1, videos):
        for frames in (3, 12, 400):
            made = facts(videos, gpu=gpu, with_flow=with_flow, median_frames=frames)
            sized = sized_recipe(made, "a \"b\" \\ 'c'.csv", "runs/mine")
            path = tmp_path / "recipe.toml"
            path.write_text(sized.text, encoding="utf-8")
            config = load(path)
            assert config == sized.config and config.data.index == "a \"b\" \\ 'c'.csv"
            batch, size, mining = config.data.batch_size, config.memory.size, config.mining
            per_epoch = videos // batch
            assert math.ceil(size / batch) < per_epoch  # full within the first epoch of every cycle
            assert size % batch == 0 and batch >= 2
            keep = stage_keep(mining.stages, size, mining.ratio, mining.top_k)
            assert all(number > mining.top_k for number in (size, *keep[:-1])) and keep[-1] == mining.top_k >= 1
            cycles = config.schedule.cycles
            assert sized.steps == per_epoch * sum(cycle.epochs for cycle in cycles)
            assert all(0 < milestone < cycle.epochs for cycle in cycles for milestone in cycle.milestones)
            assert [cycle.mining for cycle in cycles] == ["none", "none", "cascade", "cascade"]
            views = {cycle.view for cycle in cycles}
            assert views == ({"rgb", "flow"} if with_flow == videos or gpu else {"rgb", "residual"})
            assert (config.data.flow == "on_the_fly") == (gpu and with_flow < videos)


@pytest.mark.parametrize("total", [4, 5, 7, 12, 60, 1000])
@pytest.mark.parametrize("videos", [8, 13, 100, 9537])
def test_a_number_of_epochs_is_kept_and_divided_as_the_default_plan(videos, total):
    whole = [cycle.epochs for cycle in sized_recipe(facts(videos), "i", "o").config.schedule.cycles]
    sized = sized_recipe(facts(videos), "i", "o", total)
    config, per_epoch = sized.config, videos // sized.config.data.batch_size
    epochs = [cycle.epochs for cycle in config.schedule.cycles]
    assert sum(epochs) == total and sized.steps == total * per_epoch
    assert all(n == 1 or abs(n - total * part / sum(whole)) < 1 for n, part in zip(epochs, whole, strict=True))
    for cycle in config.schedule.cycles:
        assert all(0 < milestone < cycle.epochs for milestone in cycle.milestones)
        assert len(cycle.milestones) == (cycle.epochs > 1)  # the learning rate falls once, if there is room for it
    # At most a quarter of a cascade cycle fills the memory; a memory has at least one batch.
    fill = math.ceil(config.memory.size / config.data.batch_size)
    assert 1 <= fill <= min(epochs[2:]) * per_epoch / 4
    if min(epochs[2:]) > 1:
        assert config.memory.size >= min(2048, videos // 3)  # a cascade needs entries to choose from


def test_the_facts_are_those_of_the_training_videos():
    labelled = make_index(24)
    assert Facts.of(labelled, cores=2, gpu=False) == Facts(24, 12, 2, 60, 0, "train", 2, False)
    test = [dataclasses.replace(video, split="test") for video in list(labelled)[20:]]
    assert Facts.of(Index([*list(labelled)[:20], *test]), cores=2, gpu=False).videos == 20
    whole = Index(dataclasses.replace(video, split="", label="", flow_path=Path("/f")) for video in labelled)
    assert Facts.of(whole, cores=2, gpu=True) == Facts(24, 12, 2, 60, 24, "", 2, True)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            make_index(6),
            "INDEX: expected at least 8 training videos of at least 2 sources, got 6 videos of 3 sources in split "
            "'train'",
        ),
        (Index(dataclasses.replace(v, source="s", split="") for v in make_index(8)), "got 8 videos of 1 source"),
        (
            Index(dataclasses.replace(v, split="test") for v in make_index(8)),
            "got 0 videos of 0 sources in split 'train'",
        ),
    ],
)
def test_too_few_videos_are_refused(index, message):
    with pytest.raises(InputError, match=message):
        Facts.of(index, cores=2, gpu=False)


def test_the_command_writes_a_recipe_that_names_the_index_and_replaces_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    videos = []
    for i, video in enumerate(make_index(16)):
        (tmp_path / f"{i}.mp4").write_bytes(b"x")
        videos.append(dataclasses.replace(video, path=tmp_path / f"{i}.mp4", label="", split=""))
    Index(videos).save(tmp_path / "index.csv")
    assert main(["init", "index.csv", "--out", "deep/recipe.toml", "--seconds", "0", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    config = load("deep/recipe.toml")
    assert (tmp_path / config.data.index).samefile(tmp_path / "index.csv")
    assert config.data.split == "" and result["recipe"] == "deep/recipe.toml" and result["step_s"] is None
    before = Path("deep/recipe.toml").read_bytes()
    assert main(["init", "index.csv", "--out", "deep/recipe.toml", "--seconds", "0"]) == 2
    assert "--force" in capsys.readouterr().err and Path("deep/recipe.toml").read_bytes() == before
    assert main(["init", "index.csv", "--out", "deep/recipe.toml", "--seconds", "0", "--force"]) == 0
    out = capsys.readouterr().out
    assert "optical flow: 0 of 16 videos have it\n" in out and "next: cpr-fast pretrain deep/recipe.toml" in out


def test_the_run_folder_is_named_after_the_recipe_and_is_a_new_one(listed, capsys):
    def following(*options):
        assert main(["init", "index.csv", "--seconds", "0", *options]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    assert following() == "next: cpr-fast pretrain recipe.toml" and load("recipe.toml").run.out == "runs/recipe"
    checkpoint = Path("runs/recipe/checkpoints/last.pt")
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    assert following("--force") == "next: cpr-fast pretrain recipe.toml"
    assert load("recipe.toml").run.out == "runs/recipe-2"
    # A folder that is asked for stays in the recipe, and the command does not fail.
    asked = following("--force", "--run", "runs/recipe")
    assert asked == "next: cpr-fast pretrain recipe.toml --run.out runs/recipe-2"
    assert load("recipe.toml").run.out == "runs/recipe"
    assert main(["explain", "recipe.toml"]) == 0
    assert capsys.readouterr().out.endswith("\nnext: cpr-fast pretrain recipe.toml --run.out runs/recipe-2\n")


@pytest.mark.parametrize(
    ("have", "said"),
    [
        ([0], "1 of 24 videos has it (1 of the 16 training videos)\n  STOPPED\n"
              "  the recipe uses differences of frames (residual) "
              "as the second view instead\n  to use stored flow: COMMAND, then this command again with --force\n"),
        ([0, 15, 16, 23], "4 of 24 videos have it (2 of the 16 training videos)\n  `cpr-fast flow` was stopped"),
        (range(16), "16 of 24 videos have it (16 of the 16 training videos)\n  STOPPED\n"
                    "  the recipe uses it; evaluating the flow "
                    "encoder needs it for the other videos, too\n  to complete it: COMMAND\n"),
        (range(24), ""),
    ],
)  # fmt: skip
def test_missing_flow_is_told_with_what_the_recipe_does_and_the_command(tmp_path, monkeypatch, capsys, have, said):
    monkeypatch.chdir(tmp_path)
    videos = []
    for i, video in enumerate(make_index(24)):
        path, flow = tmp_path / "set" / f"{i}.mp4", tmp_path / "my flow" / "set" / f"{i}.flow.mp4"
        for file in (path, flow):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        split = "train" if i < 16 else "test"
        videos.append(dataclasses.replace(video, path=path, split=split, flow_path=flow if i in have else None))
    Index(videos).save("index.csv")
    assert main(["init", "index.csv", "--seconds", "0"]) == 0
    out = capsys.readouterr().out
    said = said.replace(
        "STOPPED", "`cpr-fast flow` was stopped, is still running, or could not compute it for the others"
    )
    assert said.replace("COMMAND", "cpr-fast flow index.csv --out 'my flow'") in out
    assert ("optical flow" in out) == bool(said)
    recipe = Path("recipe.toml").read_text()
    assert len(have) >= 16 or f"{sum(i < 16 for i in have)} of 16 training videos have optical flow" in recipe


BUSY = "Other programs use 1.2 of 2 processor cores, so that this takes longer than on an idle machine"


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """An index of 100 videos in the working directory; a step is measured as 2 seconds, beside other programs."""
    monkeypatch.chdir(tmp_path)
    videos = []
    for i, video in enumerate(make_index(100)):
        (tmp_path / f"{i}.mp4").touch()
        videos.append(dataclasses.replace(video, path=tmp_path / f"{i}.mp4"))
    Index(videos).save("index.csv")
    measured = {"loader_s_per_step": 2.0, "stage_s_per_step": {"step": 0.5}, "other_programs": BUSY}
    monkeypatch.setattr("cpr_fast.doctor.bottleneck.breakdown", lambda *a, **k: measured)
    monkeypatch.setattr("cpr_fast.doctor.bottleneck.least_step_s", lambda *a, **k: 0.5)


def test_a_long_plan_says_how_long_it_takes_and_how_to_shorten_it(listed, capsys):
    assert main(["init", "index.csv"]) == 0
    out, err = capsys.readouterr()
    assert "300 epochs of 4 steps: about 40 min at 2 s per step, as measured now\n" in out
    assert f"  {BUSY}\n" in out
    assert "`cpr-fast init index.csv --force --minutes 10` writes a recipe for 10 minutes" in out
    assert "`cpr-fast pretrain recipe.toml --epochs N` trains" in out and "Measuring training steps" in err
    assert main(["init", "index.csv", "--epochs", "60", "--out", "a b.toml"]) == 0
    out = capsys.readouterr().out
    assert "60 epochs of 4 steps: about 8 min" in out and "shorten" not in out
    assert out.endswith("next: cpr-fast pretrain 'a b.toml'\n")
    assert main(["init", "index.csv", "--seconds", "0", "--out", "b.toml"]) == 0
    out = capsys.readouterr().out
    assert "300 epochs of 4 steps; the time was not measured (--seconds 0)" in out
    assert "`cpr-fast init index.csv --out b.toml --force --minutes 10`" in out


def test_minutes_cut_the_plan_to_what_fits(listed, capsys):
    assert main(["init", "index.csv", "--minutes", "10", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["epochs"], result["steps"]) == (67, 268)  # 9 min of 8 s an epoch; the tenth for start and end
    assert sum(cycle.epochs for cycle in load("recipe.toml").schedule.cycles) == 67
    assert main(["init", "index.csv", "--minutes", "10", "--force"]) == 0
    out = capsys.readouterr().out
    assert "67 epochs of 4 steps: about 9 min" in out
    assert "  cut from 300 epochs (about 40 min) to fit --minutes 10; fewer epochs learn less\n" in out
    assert main(["init", "index.csv", "--minutes", "60", "--force"]) == 0
    assert "--minutes 60 cuts nothing: the whole plan of 300 epochs (about 40 min) fits" in capsys.readouterr().out
    assert main(["init", "index.csv", "--minutes", "60", "--epochs", "12", "--force"]) == 0
    assert "the whole plan of 12 epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.0341, "0.034 s"), (1.24, "1.2 s"), (9.96, "10 s"), (12.4, "12 s"), (151.0, "150 s")]
)
def test_the_time_of_a_step_has_two_digits_and_no_exponent(seconds, said):
    assert _step_time(seconds) == said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--minutes", "0.5"], "--minutes: expected at least 0.6, the time of one epoch for each of the 4 cycles (an "
         "epoch takes a few seconds), got 0.5; --epochs 4 writes that recipe and prints its time. " + BUSY),
        (["--minutes", "0"], "--minutes: expected more than 0, got 0.0"),
        (["--minutes", "nan"], "--minutes: expected more than 0, got nan"),
        (["--minutes", "5", "--seconds", "0"], "--minutes: expected --seconds above 0 with it"),
        (["--epochs", "3"], "--epochs: expected 4 or more, at least one for each of the 4 cycles, got 3"),
        (["--epochs", "0"], "--epochs: expected 1 or more, got 0"),
    ],
)  # fmt: skip
def test_a_length_that_cannot_be_is_refused_and_nothing_is_written(listed, capsys, options, said):
    assert main(["init", "index.csv", *options]) == 2
    assert said in capsys.readouterr().err and not Path("recipe.toml").exists()


def test_minutes_that_the_network_alone_exceeds_are_refused_before_the_measurement(listed, monkeypatch, capsys):
    def measured(*_arguments, **_options):
        raise AssertionError("a step was measured")

    monkeypatch.setattr("cpr_fast.doctor.bottleneck.breakdown", measured)
    monkeypatch.setattr("cpr_fast.runtime.busy.OtherPrograms.sentence", lambda self: "")
    assert main(["init", "index.csv", "--minutes", "0.1"]) == 2  # 4 epochs of 4 steps of 0.5 s take 8 s
    said = (
        "--minutes: expected more than 0.15, the time of one epoch for each of the 4 cycles (an epoch takes more than"
    )
    err = capsys.readouterr().err
    assert said in err and "Measuring the network of a training step" in err and not Path("recipe.toml").exists()


def test_minutes_that_an_idle_machine_may_keep_are_not_refused_before_the_measurement(listed, monkeypatch, capsys):
    monkeypatch.setattr("cpr_fast.runtime.busy.OtherPrograms.sentence", lambda self: BUSY)
    assert main(["init", "index.csv", "--minutes", "0.1"]) == 2
    err = capsys.readouterr().err
    assert "expected at least" in err and f". {BUSY}" in err


def test_the_network_alone_is_measured_without_the_videos():
    config = sized_recipe(facts(8), "i", "o").config
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, width=1 / 16))
    assert 0 < bottleneck.least_step_s(small, 2, 2, device=torch.device("cpu")) < 60


def test_a_time_that_was_measured_on_some_clips_of_a_step_says_so(listed, monkeypatch, capsys):
    measured = {"loader_s_per_step": 1.0, "stage_s_per_step": {"step": 2.0}, "other_programs": ""}
    measured |= {"batch_size": 24, "step_measured_on_clips": 2}
    monkeypatch.setattr("cpr_fast.doctor.bottleneck.breakdown", lambda *a, **k: measured)
    assert main(["init", "index.csv"]) == 0
    assert "about 40 min at 2 s per step, as measured now on 2 of its 24 clips\n" in capsys.readouterr().out


def test_a_recipe_that_another_command_wrote_during_the_measurement_is_not_replaced(listed, monkeypatch, capsys):
    def meanwhile(*_arguments, **_options):
        Path("recipe.toml").write_text("by another command")
        return {"loader_s_per_step": 2.0, "stage_s_per_step": {"step": 0.5}, "other_programs": BUSY}

    monkeypatch.setattr("cpr_fast.doctor.bottleneck.breakdown", meanwhile)
    assert main(["init", "index.csv"]) == 2
    assert "--out: 'recipe.toml' exists" in capsys.readouterr().err
    assert Path("recipe.toml").read_text() == "by another command"
    assert main(["init", "index.csv", "--force"]) == 0
