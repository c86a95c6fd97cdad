"""Extracted frames, whose rate no file states, and networks that sample videos by time: --pictures-fps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.data_sets.flow import write_video

pytest.importorskip("nvidia.dali", reason="the pictures are cut by the loaders")

from cpr_fast.cli import main
from cpr_fast.config import Config
from cpr_fast.data.features.store import FeatureStore
from cpr_fast.models import build_encoder
from cpr_fast.weights.checkpoint import save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

RATE, FRAMES = 20, 41  # of the pictures; the networks see ten frames per second


def write_pictures(folder: Path, frames: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"img_{number:05d}.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Frames of eight videos, `fast` at 20 per second and `slow` at ten; a network that takes ten frames per second
    (timed.pt), and the same one that takes every frame (every.pt)."""
    folder = tmp_path_factory.mktemp("rates")
    for number in range(8):
        noise = np.random.default_rng(number).integers(0, 256, (FRAMES, 6, 8, 3), np.uint8)
        frames, name = noise.repeat(4, 1).repeat(4, 2), f"{('train', 'test')[number // 4]}/{'ab'[number % 2]}/v{number}"
        write_pictures(folder / "fast" / name, frames)
        write_pictures(folder / "slow" / name, frames[::2])
    for name in ("fast", "slow"):
        assert main(["index", str(folder / name), "--layout", "rawframes", "--out", str(folder / f"{name}.csv")]) == 0
    clips, model = {"frames": 8, "size": 16, "workers": 1}, {"arch": "r3d", "width": 0.0625, "feature_dim": 8}
    for name, fps in (("timed", 10.0), ("every", 0.0)):
        config = Config.from_dict({"data": clips | {"fps": fps}, "model": model})
        torch.manual_seed(0)
        state = build_encoder(config.model).state_dict()
        payload = {"config": config.to_dict(), "encoders": {"rgb": state}}
        save_checkpoint(folder / name / "checkpoints" / "last.pt", payload)
    return folder


@pytest.fixture
def here(made, monkeypatch) -> Path:
    monkeypatch.chdir(made)
    return made


TIMED, EVERY = (f"{name}/checkpoints/last.pt" for name in ("timed", "every"))


def run(capsys, *words: str) -> dict:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_features_are_those_of_the_frames_at_these_times(here, capsys):
    capsys.readouterr()
    run(capsys, "embed", "fast.csv", "--encoder", TIMED, "--pictures-fps", "20", "--out", "s1", "--dtype", "float32")
    run(capsys, "embed", "slow.csv", "--encoder", EVERY, "--out", "s2", "--dtype", "float32")
    run(capsys, "embed", "fast.csv", "--encoder", TIMED, "--pictures-fps", "10", "--out", "s3", "--dtype", "float32")
    rows = np.arange(8)
    found = [np.concatenate(list(FeatureStore(Path(name), "").evaluation("rgb", rows))) for name in ("s1", "s2", "s3")]
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])
    assert "--pictures-fps 20" in json.loads(Path("s1/store.json").read_text())["encoder"]["rgb"]


COMMANDS = {
    "retrieve": "retrieve {checkpoint} --index {index}",
    "probe": "probe {checkpoint} --index {index} --epochs 2",
    "finetune": "finetune {checkpoint} --index {index} --epochs 1 --crops 1 --batch-size 4",
    "dedup": "dedup {index} --checkpoint {checkpoint} --neighbours 3",
    "search": "search query.mkv --index {index} --checkpoint {checkpoint}",
}


def numbers(result: dict) -> dict:
    """The measured values of a result, which names files and rates beside them."""
    if "queries" in result:  # of `search`
        return {
            "found": [(Path(row["path"]).parent.name, row["similarity"]) for row in result["queries"][0]["results"]]
        }
    names = ("map", "r@1", "accuracy", "accuracy_ci95", "thresholds", "duplicate", "sibling")
    found = {name: result[name] for name in names if name in result}
    for row in found.get("thresholds", ()):
        row.pop("frames_agree", None)  # of the files, which hold more or fewer frames
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_an_evaluation_of_them_is_that_of_the_frames_at_these_times(here, capsys, command):
    write_video(here / "query.mkv", 20, width=32, height=24)  # ten frames per second
    words = {index: COMMANDS[command].format(index=f"{index}.csv", checkpoint=checkpoint).split()
             for index, checkpoint in (("fast", TIMED), ("slow", EVERY))}  # fmt: skip
    assert main(words["fast"]) == 2
    error = capsys.readouterr().err
    assert "data.pictures_fps: expected the frames per second" in error and "--pictures-fps" in error
    timed = run(capsys, *words["fast"], "--pictures-fps", str(RATE))
    every = run(capsys, *words["slow"])
    assert numbers(timed) == numbers(every) and numbers(timed)
    if command in ("retrieve", "probe", "finetune"):
        assert timed["checkpoint"] == f"{TIMED} --pictures-fps 20"
        other = run(capsys, *words["fast"], "--pictures-fps", "10")
        assert other["file"] != timed["file"] and Path(timed["file"]).exists()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "words, message",
    [
        (["retrieve", TIMED, "--index", "fast.csv", "--pictures-fps", "1e9"], "--pictures-fps: expected frames per"),
        (["dedup", "fast.csv", "--features", "begun", "--pictures-fps", "5"], "--pictures-fps: expected it with"),
        (["retrieve", EVERY, "--index", "fast.csv", "--pictures-fps", "20"],
         "--pictures-fps: expected it with a network that samples videos by time (data.fps), got 20"),
        (["retrieve", TIMED, "--index", "fast.csv", "--pictures-fps", "0"], "--pictures-fps: expected frames per"),
        (["retrieve", TIMED, "--index", "fast.csv", "--pictures-fps", "nan"], "--pictures-fps: expected frames per"),
        (["embed", "--features", "x.npy", "--out", "s", "--pictures-fps", "5"], "--pictures-fps: expected --encoder"),
    ],
)  # fmt: skip
def test_a_rate_that_is_none_or_has_no_use_is_named(capsys, words, message):
    Path("begun").mkdir(exist_ok=True)
    Path("begun/store.json").touch()
    assert main(words) == 2
    assert message in capsys.readouterr().err
