"""A command that refuses its input leaves the folder as it found it: no empty folder, no lock, no journal, and no file
replaced by a result."""

from __future__ import annotations

import csv

import pytest
import torch
from support.data_sets.flow import write_video

from cpr_fast.cli import main
from cpr_fast.config import Config
from cpr_fast.models import build_encoder
from cpr_fast.weights.checkpoint import save_checkpoint

FIELDS = ["path", "label", "source", "split", "num_frames", "fps", "width", "height", "flow_path"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of a tiny network, an index of four labelled videos, one of videos that do not decode, and a folder
    of such videos."""
    folder = tmp_path_factory.mktemp("refused")
    for number in range(4):
        write_video(folder / f"{number}.mkv", 12, width=32, height=32)
        (folder / "broken" / "a").mkdir(parents=True, exist_ok=True)
        (folder / "broken" / "a" / f"{number}.mkv").write_text("no video")
    for name, place in (("index.csv", ""), ("broken.csv", "broken/a/")):
        with open(folder / name, "w", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(FIELDS)
            for i in range(4):
                rows.writerow([f"{place}{i}.mkv", "ab"[i % 2], i, ("train", "test")[i // 2], 12, 25, 32, 32, ""])
    config = Config.from_dict(
        {"data": {"frames": 8, "size": 16, "workers": 1}, "model": {"arch": "r3d", "width": 0.0625}}
    )
    save_checkpoint(
        folder / "net.pt",
        {"config": config.to_dict(), "encoders": {"rgb": build_encoder(config.model).state_dict()}, "step": 1},
    )
    return folder


REFUSED = [
    "probe net.pt --index index.csv --inputs clips --epochs 1 --batch-size 1",
    "finetune net.pt --index index.csv --epochs 1 --batch-size 1",
    "finetune net.pt --index broken.csv --epochs 1 --batch-size 2",
    "probe net.pt --index broken.csv",
    "retrieve net.pt --index broken.csv",
    "flow broken.csv --out new/deep/flow",
    "flow broken.csv --out new/deep/flow.lmdb --storage lmdb",
    "index broken --out new/deep/index.csv",
    "index broken --out new/deep/index.csv --transcode new/small",
    "show-sample broken.csv --out new/deep/sample.png",
    "init broken.csv --out new/deep/recipe.toml --seconds 0",
    "export index.csv --out new/deep/net.safetensors",
    "import-checkpoint index.csv --out new/deep/net.pt",
    # the file to write is one that is read, or one of another kind
    "index . --out 0.mkv",
    "index . --out net.pt",
    "show-sample index.csv --out 0.mkv",
    "show-sample index.csv --out broken/../0.mkv",
    "export net.pt --out net.pt",
    "import-checkpoint net.pt --out net.pt",
    "init index.csv --out index.csv --force --seconds 0",
    "flow index.csv --out 0.mkv",
    "flow index.csv --out 0.mkv --storage lmdb",
    "synth 0.mkv --classes 4 --videos 4",
]


@pytest.mark.parametrize("command", REFUSED)
def test_a_refused_command_leaves_nothing(folder, monkeypatch, capsys, command):
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    folders = {path for path in folder.rglob("*") if path.is_dir()}
    assert main(command.split()) == 2, capsys.readouterr().err
    assert capsys.readouterr().err.splitlines()[-1].startswith("cpr-fast: ")
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after == before
    assert {path for path in folder.rglob("*") if path.is_dir()} == folders
