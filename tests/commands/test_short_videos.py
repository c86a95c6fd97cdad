"""`data.short_videos = "drop"` acts in every command that chooses videos."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("nvidia.dali", reason="the commands need NVIDIA DALI")

from cpr_fast.cli import main
from cpr_fast.config import Config
from cpr_fast.data.index.index import Index
from cpr_fast.data.synthetic.videos import write_synthetic
from cpr_fast.doctor.data import training_part
from cpr_fast.evaluate.classify.classify import load_split
from cpr_fast.models import build_encoder
from cpr_fast.pretrain.run.videos import training_videos
from cpr_fast.report.run_folder.run import Run
from cpr_fast.weights.checkpoint import save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = {"arch": "r3d", "width": 0.125, "head": "pooled", "feature_dim": 64}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(index, config, checkpoint): the first video of either split counts 5 frames, half a clip and one."""
    folder = tmp_path_factory.mktemp("short")
    path = write_synthetic(folder / "data", classes=4, videos=4, frames=12, width=64, height=48)
    videos, seen = [], set()
    for video in Index.load(path):
        videos.append(video if video.split in seen else dataclasses.replace(video, num_frames=5))
        seen.add(video.split)
    Index(videos).save(path)
    data = {"index": str(path), "frames": 8, "size": 32, "workers": 1, "batch_size": 2, "short_videos": "drop"}
    cycles = [{"view": "rgb", "epochs": 1, "mining": "none"}]
    config = Config.from_dict({"data": data, "model": MODEL, "schedule": {"cycles": cycles}})
    torch.manual_seed(0)
    payload = {"config": config.to_dict(), "encoders": {"rgb": build_encoder(config.model).state_dict()}}
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").write_text(json.dumps({"kind": "run", "config": config.to_dict()}) + "\n")
    return Index.load(path), config, save_checkpoint(folder / "run" / "checkpoints" / "last.pt", payload)


def test_training(made):
    index, config, checkpoint = made
    kept = [video for video in index.select("train") if video.num_frames > 5]
    assert len(kept) == len(index.select("train")) - 1 > 0
    assert list(training_videos(config.data)) == kept
    assert list(training_part(index, config, [])) == kept
    assert list(Run(checkpoint.parents[1]).index) == kept
    everything = dataclasses.replace(config.data, short_videos="keep")
    assert list(training_videos(everything)) == list(index.select("train"))


def test_evaluation(made, tmp_path, capsys):
    index, config, checkpoint = made
    train, test = (len(index.select(split)) - 1 for split in ("train", "test"))
    split = load_split(config.data.index, config.data)
    assert (len(split.train), len(split.test)) == (train, test)
    common = [str(checkpoint), "--index", config.data.index, "--json"]
    assert main(["retrieve", *common]) == 0
    row = json.loads(capsys.readouterr().out)["results"][0]
    assert (row["gallery"], row["queries"]) == (train, test)
    query = str(index.select("train")[1].path)
    assert main(["search", query, "--checkpoint", str(checkpoint), "--index", config.data.index, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["videos"] == len(index) - 2


def test_show_sample(made, tmp_path, capsys):
    index, config, _ = made
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[data]\nframes = 8\nsize = 32\nshort_videos = "drop"\n')
    count = len(index.select("train")) - 1
    arguments = ["show-sample", config.data.index, "--config", str(recipe), "--out", str(tmp_path / "a.png"), "--index"]
    assert main([*arguments, str(count - 1)]) == 0
    assert main([*arguments, str(count)]) == 2
