"""Evaluations of one checkpoint with both views and of two files with one view each are the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from support.data_sets.small_stores import make_store

pytest.importorskip("nvidia.dali", reason="the data pipeline needs NVIDIA DALI")

from cpr_fast.cli import main
from cpr_fast.commands.evaluation.retrieve import lines_of
from cpr_fast.config import Config
from cpr_fast.data.features.clips import ClipTable
from cpr_fast.data.flow.write import write_flow
from cpr_fast.data.index.index import Index
from cpr_fast.data.synthetic.videos import write_synthetic
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.pretrained import load_pretrained
from cpr_fast.evaluate.features.results import checkpoint_files, run_of
from cpr_fast.evaluate.retrieval.queries import QueryScores
from cpr_fast.evaluate.retrieval.retrieve import retrieve
from cpr_fast.models import build_encoder
from cpr_fast.runtime.metrics import read_metrics
from cpr_fast.weights.checkpoint import save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = {"data": {"frames": 8, "size": 32, "workers": 1}, "model": {"width": 0.0625, "conv_std": 0.15}}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints in run folders: `both`, its single views as `rgb` and `flow`, and `longer`, which has clips of 9
    frames.
    """
    folder = tmp_path_factory.mktemp("pretrained")
    config = Config.from_dict(TINY)
    torch.manual_seed(0)
    states = {view: build_encoder(config.model).state_dict() for view in ("rgb", "flow")}
    longer = dataclasses.replace(config, data=dataclasses.replace(config.data, frames=9))

    def save(name: str, config: Config, views: tuple[str, ...]) -> Path:
        (folder / name).mkdir()
        (folder / name / "metrics.jsonl").touch()
        payload = {"config": config.to_dict(), "encoders": {view: states[view] for view in views}}
        return save_checkpoint(folder / name / "checkpoints" / "last.pt", payload)

    kinds = {"both": ("rgb", "flow"), "rgb": ("rgb",), "flow": ("flow",)}
    saved = {name: save(name, config, views) for name, views in kinds.items()}
    return saved | {"longer": save("longer", longer, ("flow",))}


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Path:
    """12 encoded videos of 4 classes, with flow."""
    folder = tmp_path_factory.mktemp("data")
    index = write_synthetic(folder, classes=4, videos=2, frames=12, width=48, height=32)
    write_flow(index, folder / "flow")
    return index


def test_a_store_that_is_evaluated_as_it_is_is_opened_once(tmp_path, monkeypatch):
    store, other = (make_store(tmp_path / name).folder for name in ("store", "other"))
    opened = []
    load = ClipTable.load
    monkeypatch.setattr(ClipTable, "load", lambda path: opened.append(path.parent) or load(path))
    networks = load_pretrained(str(store))
    clips = networks.open("--index", tmp_path / "." / "store")
    assert opened == [store] and clips.store is networks.stored
    with pytest.raises(InputError, match="--index: expected the store '.*store' itself"):
        networks.open("--index", other)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="--index: expected a store of features"):
        networks.open("--index", tmp_path / "empty")


def test_retrieval_with_two_files_is_that_with_one(files, index):
    one = retrieve(files["both"], index, device="cpu")
    two = retrieve([files["rgb"], f"flow={files['both']}"], index, device="cpu")
    assert two["view"] == "two_stream" and two["results"] == one["results"]
    assert two["checkpoint"] == f"{files['rgb']} flow={files['both']}"
    assert Path(two["file"]).parent == files["rgb"].parents[1] / "evaluations"


def test_retrieval_over_splits_gives_means_and_deviations(files, index):
    """In one split all videos have one class, so every result is right; in the other, the gallery lacks the
    queries' class.
    """
    videos, swap = list(Index.load(index)), {"train": "test", "test": "train"}
    paths = [index.with_name(f"split{number}.csv") for number in (1, 2)]
    Index(dataclasses.replace(video, label="one") for video in videos).save(paths[0])
    Index(dataclasses.replace(v, split=swap[v.split], label=v.split) for v in videos).save(paths[1])
    result = retrieve(files["flow"], paths, device="cpu", run_dir=files["flow"].parents[1])
    apart = [retrieve(files["flow"], path, device="cpu") for path in paths]
    rows = [[row for row in found["results"] if row["name"] == "trained"] for found in (result, *apart)]
    assert [row["split"] for row in rows[0]] == [1, 2]
    for both, alone in zip(rows[0], (rows[1][0], rows[2][0]), strict=True):
        assert {key: both[key] for key in alone if key != "split"} == {k: v for k, v in alone.items() if k != "split"}
    summary = result["summary"][0]
    assert [row["r@1"] for row in rows[0]] == [1, 0] and result["r@1"] == summary["r@1"] == 0.5
    assert summary["r@1_std"] == pytest.approx(0.5**0.5)
    assert (
        rows[0][0]["gallery"] != rows[0][1]["gallery"] and result["r@5"] is summary["r@5_std"] is None
    )  # the gallery has 4 videos
    assert summary["splits"] == 2 and apart[0]["summary"][0]["r@1_std"] is None
    assert [row["map"] for row in rows[0]] == [1, None] and summary["map"] is summary["map_ci95"] is None
    assert summary["map_left_out"] == rows[0][1]["queries"]
    stored = QueryScores.load(Path(result["queries_file"]))
    assert stored.splits.bincount().tolist()[1:] == [row["queries"] for row in rows[0]]
    table = "\n".join(lines_of(result))
    assert "mAP  deviation   R@1  deviation" in table and " 70.7" in table and "95 %" not in table
    assert f"mAP leaves out {rows[0][1]['queries']} queries" in table
    told = [row for row in read_metrics(files["flow"].parents[1]) if row["kind"] == "retrieval"]
    assert [(row["name"], row["r@1"]) for row in told] == [(row["name"], row["r@1"]) for row in result["summary"]]
    with pytest.raises(InputError, match="--index: expected at least one"):
        retrieve(files["flow"], [], device="cpu")


def test_probe_and_finetune_average_the_probabilities_of_two_files(files, index, capsys):
    for task, settings in {"probe": ["--epochs", "2"], "finetune": ["--epochs", "1", "--clips", "1"]}.items():
        results = []
        for checkpoint in ([files["both"]], [f"rgb={files['rgb']}", f"flow={files['flow']}"]):
            command = [task, *map(str, checkpoint), "--index", str(index), "--crops", "1", "--json", *settings]
            assert main(command) == 0
            results.append(json.loads(capsys.readouterr().out))
        assert [row["view"] for row in results[0]["results"]] == ["rgb", "flow", "two_stream"]
        assert results[0]["results"] == results[1]["results"]
    assert not (
        files["rgb"].parents[1] / "metrics.jsonl"
    ).read_text()  # the files are of two runs, and the result belongs to neither
    assert (files["both"].parents[1] / "metrics.jsonl").read_text()


def test_what_a_checkpoint_argument_names(files):
    assert checkpoint_files("runs/lr=1/last.pt") == [(None, Path("runs/lr=1/last.pt"))]
    assert checkpoint_files(["flow=a.pt", Path("b.pt")]) == [("flow", Path("a.pt")), (None, Path("b.pt"))]
    assert run_of(files["rgb"]) == run_of([f"rgb={files['rgb']}"]) == files["rgb"].parents[1]
    assert list(load_pretrained(f"flow={files['both']}").encoders) == ["flow"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "expected at least one file, got none"),
        (["both", "flow"], "expected each view once, got 'flow' again from .*flow"),
        (["flow=rgb"], "holds the views rgb, got flow="),
        (["rgb", "longer"], "expected files of equal data.frames, got 8 in .* and 9 in .*longer"),
    ],
)
def test_files_that_do_not_go_together_are_named(files, names, message):
    named = [f"{view}{equals}{files[name]}" for view, equals, name in (text.rpartition("=") for text in names)]
    with pytest.raises(InputError, match=message):
        load_pretrained(named)
