"""`cpr-fast init`: its recipes load, and the memory fills early enough, for data sets of every size."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from support.stand_in_loader import make_index

from cpr_fast.cli import main
from cpr_fast.config import load
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError
from cpr_fast.experiments.sizing import Facts, sized_recipe
from cpr_fast.mining.stages import stage_keep

SIZES = [8, 9, 10, 13, 17, 31, 32, 50, 64, 100, 127, 500, 1000, 2730, 3783, 9537, 30_000, 100_000]


def facts(videos: int, **changes) -> Facts:
    given = {"sources": max(2, videos // 3), "median_frames": 120, "with_flow": videos, "split": "train", "cores": 8}
    return Facts(videos, **(given | {"gpu": False} | changes))


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


def test_the_facts_are_those_of_the_training_videos():
    labelled = make_index(24)
    assert Facts.of(labelled, cores=2, gpu=False) == Facts(24, 12, 60, 0, "train", 2, False)
    test = [dataclasses.replace(video, split="test") for video in list(labelled)[20:]]
    assert Facts.of(Index([*list(labelled)[:20], *test]), cores=2, gpu=False).videos == 20
    whole = Index(dataclasses.replace(video, split="", label="", flow_path=Path("/f")) for video in labelled)
    assert Facts.of(whole, cores=2, gpu=True) == Facts(24, 12, 60, 24, "", 2, True)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            make_index(6),
            "INDEX: expected at least 8 training videos of at least 2 sources, got 6 of 3 in split 'train'",
        ),
        (Index(dataclasses.replace(v, source="s", split="") for v in make_index(8)), "got 8 of 1"),
        (Index(dataclasses.replace(v, split="test") for v in make_index(8)), "got 0 of 0 in split 'train'"),
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


@pytest.mark.parametrize(
    ("have", "said"),
    [
        ([0], "1 of 24 videos has it (1 of the 16 training videos)\n  the recipe uses differences of frames (residual) "
              "as the second view instead\n  to use stored flow: COMMAND, then this command again with --force\n"),
        ([0, 15, 16, 23], "4 of 24 videos have it (2 of the 16 training videos)\n  the recipe uses differences"),
        (range(16), "16 of 24 videos have it (16 of the 16 training videos)\n  the recipe uses it; evaluating the flow "
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
    assert said.replace("COMMAND", "cpr-fast flow index.csv --out 'my flow'") in out
    assert ("optical flow" in out) == bool(said)
    recipe = Path("recipe.toml").read_text()
    assert len(have) >= 16 or f"{sum(i < 16 for i in have)} of 16 training videos have optical flow" in recipe
