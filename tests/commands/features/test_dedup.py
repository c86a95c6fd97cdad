"""`cpr-fast dedup` as on the command line."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("nvidia.dali", reason="the videos are decoded")

from cpr_fast.cli import main
from cpr_fast.config import Config
from cpr_fast.data.index.index import Index
from cpr_fast.data.synthetic.videos import write_synthetic
from cpr_fast.models import build_encoder
from cpr_fast.weights.checkpoint import save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


CONFIG = Config.from_dict(
    {"data": {"frames": 8, "size": 16, "workers": 1}, "model": {"arch": "r3d", "width": 0.0625, "feature_dim": 8}}
)
CHECKPOINT = ("--checkpoint", "run/checkpoints/last.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Synthetic videos, of which the last is a copy of the first, their index, and a checkpoint with random weights."""
    folder = tmp_path_factory.mktemp("dedup")
    index = Index.load(write_synthetic(folder / "videos", classes=4, videos=4, frames=20, width=40, height=32))
    copy = folder / "videos" / "copy.mp4"
    shutil.copyfile(index[0].path, copy)
    Index([*index, dataclasses.replace(index[0], path=copy, source="copy")]).save(folder / "index.csv")
    torch.manual_seed(0)
    encoder = build_encoder(CONFIG.model)
    payload = {"config": CONFIG.to_dict(), "encoders": {"rgb": encoder.state_dict()}}
    save_checkpoint(folder / "run" / "checkpoints" / "last.pt", payload)
    return folder


@pytest.fixture
def here(folder, tmp_path, monkeypatch) -> Path:
    shutil.copytree(folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def run(capsys, *arguments: object) -> dict:
    assert main(["dedup", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_copy_gets_the_source_of_its_original(here, capsys, caplog):
    caplog.set_level("INFO")
    before = (here / "index.csv").read_bytes()
    result = run(capsys, "index.csv", *CHECKPOINT, "--duplicate", 0.9999, "--sibling", 0.9999)
    assert result["duplicate"]["groups"] == 1 and result["duplicate"]["clips"] == 2
    assert result["thresholds"][0]["frames_agree"] == 1 and (here / "index.csv").read_bytes() == before
    new = Index.load("index-dedup.csv")
    assert new[-1].source == new[0].source != "copy" and result["sources"] == result["sources_before"] - 1
    page = (here / "index-dedup.html").read_text()
    assert "copy.mp4" in page and "data:image/jpeg" in page and "Near-duplicates: 1 group<" in page
    table = page[page.index("<summary>Pairs of near-duplicates<") :]
    assert table.index("copy.mp4") < table.index("</table>")
    assert not re.search(r'(src|href)="(?!data:|#)', page) and "<script" not in page
    assert "videos/copy.mp4" in (here / "index-dedup-groups.csv").read_text()
    assert main(["dedup", "index.csv", *CHECKPOINT, "--sibling", "0.5", "--duplicate", "0.6"]) == 0
    out = capsys.readouterr().out
    assert "groups by the least similarity" in out and "100 % of its pairs are compared already" in caplog.text
    assert "next: open index-dedup.html" in out and (here / "index-dedup.old.csv").exists()


def test_a_store_of_features_takes_the_place_of_a_checkpoint(here, capsys):
    assert main(["embed", "index.csv", "--encoder", "run/checkpoints/last.pt", "--samples", "1", "--out", "store"]) == 0
    capsys.readouterr()
    result = run(capsys, "index.csv", "--features", "store", "--out", "new/found.csv", "--duplicate", 0.9999)
    assert result["duplicate"]["clips"] >= 2 and result["features"] == "store store"
    new = Index.load("new/found.csv")
    assert new[-1].source == new[0].source


def test_flow_that_videos_lack_is_left_out_as_in_a_search(here, capsys, caplog):
    encoders = {view: build_encoder(CONFIG.model).state_dict() for view in ("rgb", "flow")}
    for views in (("rgb", "flow"), ("flow",)):
        payload = {"config": CONFIG.to_dict(), "encoders": {view: encoders[view] for view in views}}
        save_checkpoint(here / "two" / f"{'-'.join(views)}.pt", payload)
    lines = Path("index.csv").read_text().splitlines()
    named = [lines[0], f"{lines[1].rpartition(',')[0]},gone.mp4", *lines[2:]]  # a file of flow that does not exist
    Path("index.csv").write_text("\n".join(named) + "\n")
    said = "flow is left out: it is missing for 25 of 25 videos of the index; run `cpr-fast flow` first"
    assert run(capsys, "index.csv", "--checkpoint", "two/rgb-flow.pt")["views"] == ["rgb"] and said in caplog.text
    video = str(Index.load("index.csv", require_flow=False)[0].path)
    assert main(["search", video, "--index", "index.csv", "--checkpoint", "two/rgb-flow.pt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["note"] == said
    expected = "expected stored flow of every video, got none of 25 of 25 videos; run `cpr-fast flow` first"
    assert main(["dedup", "index.csv", "--checkpoint", "two/flow.pt"]) == 2
    assert f"INDEX: {expected}" in capsys.readouterr().err
    assert main(["search", video, "--index", "index.csv", "--checkpoint", "two/flow.pt"]) == 2
    assert f"--index: {expected}" in capsys.readouterr().err


def test_three_shards_write_what_one_command_writes(here, capsys):
    assert main(["embed", "index.csv", "--encoder", "run/checkpoints/last.pt", "--samples", "1", "--out", "store"]) == 0
    capsys.readouterr()
    words = ("index.csv", "--features", "store", "--duplicate", 0.9999, "--neighbours", 3, "--out")
    whole = run(capsys, *words, "whole/new.csv")
    left = [run(capsys, *words, "parts/new.csv", "--shard", f"{number}/3").get("waiting") for number in (2, 0)]
    assert left == [["0/3", "1/3"], ["1/3"]] and not Path("parts/new.csv").exists()
    assert main(["dedup", *map(str, words), "parts/new.csv", "--shard", "2/3"]) == 0
    out = capsys.readouterr().out
    assert "1 shard of 3 is left, the last of which writes parts/new.csv" in out
    line = next(line for line in out.splitlines() if line.startswith("next: "))
    command = shlex.split(line.removeprefix("next: "))
    assert command[:2] == ["cpr-fast", "dedup"] and command[-2:] == ["--shard", "1/3"]
    last = run(capsys, *command[2:])
    names = ("new.csv", "new-groups.csv", "new-graph.safetensors", "new.html")
    assert {path.name for path in Path("parts").iterdir()} == set(names)
    for name in names[:3]:
        assert Path("parts", name).read_bytes() == Path("whole", name).read_bytes(), name
    pages = [Path(folder, "new.html").read_text() for folder in ("whole", "parts")]
    own = r"whole/|parts/|(?<=[\"#])f[0-9a-f]{8}\w*"  # also the random names of the parts of figures
    assert re.sub(own, "", pages[0]) == re.sub(own, "", pages[1])
    places = ("out", "groups", "page")
    assert {**last, **dict.fromkeys(places)} == {**whole, **dict.fromkeys(places)}


def test_parquet_is_refused_before_any_work_where_it_cannot_be_written(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["dedup", "index.csv", *CHECKPOINT, "--out", "new.parquet"]) == 2
    assert "--out: reading and writing Parquet needs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--checkpoint, --features: expected one of the two, got none"),
        ([*CHECKPOINT, "--features", "store"], "--features: expected a store"),
        (["--checkpoint", "gone.pt"], "--checkpoint"),
        (["--features", "run"], "--features: expected a store of features"),
        ([*CHECKPOINT, "--duplicate", "1.5"], "--duplicate: expected a similarity above 0"),
        ([*CHECKPOINT, "--sibling", "nan"], "--sibling: expected a similarity above 0"),
        ([*CHECKPOINT, "--sibling", ".99"], "--sibling: expected at most --duplicate, 0.95"),
        ([*CHECKPOINT, "--neighbours", "0"], "--neighbours: expected 1 or more, got 0"),
        ([*CHECKPOINT, "--shard", "3/3"], "--shard: expected i/n with 0 <= i < n, got '3/3'"),
        ([*CHECKPOINT, "--shard", "0/3"], "`cpr-fast embed INDEX --encoder CHECKPOINT --out STORE --shard 0/3`"),
        ([*CHECKPOINT, "--out", "index.csv"], "--out: expected the name of a new file"),
        ([*CHECKPOINT, "--out", "new.html"], "--out: expected the name of an index"),
        ([*CHECKPOINT, "--out", "run"], "--out: expected the name of an index"),
    ],
)
def test_bad_input_is_named_before_any_work(here, capsys, arguments, message):
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    assert main(["dedup", "index.csv", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


@pytest.mark.parametrize("name", ["found.old.csv", "found-groups.csv"])
def test_no_file_that_is_written_beside_the_new_index_is_the_index(here, capsys, name):
    shutil.copyfile("index.csv", name)
    assert main(["dedup", name, *CHECKPOINT, "--out", "found.csv"]) == 2
    assert f"--out: expected the name of a new file, got '{name}'" in capsys.readouterr().err
    assert Path(name).read_bytes() == Path("index.csv").read_bytes()
