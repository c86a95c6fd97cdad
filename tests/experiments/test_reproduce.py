"""`reproduce` end to end on a few tiny videos: shared starts, result cards, resuming, the table, and refused input."""

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("nvidia.dali", reason="the data pipeline needs NVIDIA DALI")

from cpr_fast.cli import main
from cpr_fast.config import Config, load
from cpr_fast.data.flow.write import write_flow
from cpr_fast.data.index.index import Index
from cpr_fast.data.synthetic.videos import write_synthetic
from cpr_fast.experiments.reproduce import CONFIGS, Scale
from cpr_fast.report.sections.published import published_tables

SETTINGS = """
data = { frames = 8, size = 32, batch_size = 4 }
model = { arch = "r3d", width = 0.125 }
memory = { size = 8, shuffle_bn_groups = 2 }
"""


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    path = write_synthetic(folder, classes=4, videos=4, frames=8, width=64, height=48)
    write_flow(path, folder / "flow")
    return path


def run(tmp_path, index, *arguments):
    (tmp_path / "small.toml").write_text(
        "\ufeff" + SETTINGS.replace("\n", "\r\n"), encoding="utf-8", newline=""
    )  # as editors on Windows do
    common = ["--index", index, "--scale", 0.001, "--settings", tmp_path / "small.toml", "--out", tmp_path / "out"]
    return main(["reproduce", *map(str, (*arguments, *common))])


@pytest.mark.slow
def test_two_rows_two_seeds_and_going_on(tmp_path, index, one_thread, capsys):
    command = ("stages", "--rows", "n1", "n7", "--seeds", "0", "1", "--json")
    assert run(tmp_path, index, *command) == 0
    first = json.loads(capsys.readouterr().out)
    runs = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out/runs/*/checkpoints/last.pt")}
    assert len(list(tmp_path.glob("out/runs/infonce*"))) == 2  # one start for each seed, shared by both rows
    assert len(list(tmp_path.glob("out/runs/*"))) == 6 and len(first["cards"]) == 4 and runs
    card = json.loads((tmp_path / "out" / first["cards"][0].split("out/")[1]).read_text())
    assert card["published"]["r@1"] == pytest.approx(0.451) and card["seed"] == 0 and "0.1 %" in card["scale"]["text"]
    assert set(card["metrics"]) == {"r@1", "r@5", "r@10", "probe", "finetune"} and card["versions"]["torch"]
    values = [json.loads(Path(path).read_text())["metrics"]["r@1"] for path in first["cards"][:2]]
    assert first["rows"][0]["r@1"]["mean"] == pytest.approx(sum(values) / 2)
    assert first["rows"][0]["r@1"]["standard_error"] == pytest.approx(abs(values[0] - values[1]) / 2)

    kept = {path: Path(path).read_text() for path in first["cards"][1:]}
    (tmp_path / "out" / first["cards"][0].split("out/")[1]).unlink()
    assert run(tmp_path, index, *command) == 0
    assert json.loads(capsys.readouterr().out) == first  # from the same checkpoints: the same numbers
    assert all(Path(path).read_text() == text for path, text in kept.items())
    assert len(list(tmp_path.glob("out/runs/*"))) == 6
    table = (tmp_path / "out" / "stages.md").read_text()
    assert "(45.1)" in table and "±" in table and "0.1 % of the paper's epochs" in table

    assert (
        run(tmp_path, index, "mining", "--rows", "n7", "--seeds", "0") == 0
    )  # trains again, because the recipe file differs
    assert "PMR (published)" in capsys.readouterr().out


def test_what_is_missing_is_named_before_anything_is_trained(tmp_path, index, capsys):
    videos = list(Index.load(index))
    bare, unlabelled = tmp_path / "bare.csv", tmp_path / "unlabelled.csv"
    Index([dataclasses.replace(video, flow_path=None) for video in videos]).save(bare)
    Index([dataclasses.replace(video, label="") for video in videos]).save(unlabelled)
    for arguments, message in [
        ((index, "nonsense"), "'nonsense'"),
        ((index, "6"), "retrieval_ucf101 and retrieval_hmdb51"),
        ((index, "stages", "--rows", "n2"), "has n1, n3, n5, n7, got n2"),
        ((index, "retrieval_hmdb51"), "expected its index"),
        ((index, "finetune", "--rows", "k400_rgb"), "--k400"),
        ((bare, "stages"), "have no flow"),
        ((unlabelled, "stages"), "labelled"),
        ((unlabelled, "mining"), "a label for every training video"),
        ((index, "stages", "--seeds", "0", "--rows", "n1", "--scale", "2"), "scale"),
        ((index, "progressive"), "larger scale"),
        ((tmp_path / "no.csv", "stages"), "no.csv"),
    ]:
        chosen, *words = arguments
        extra = [] if "--scale" in words else ["--scale", "0.001"]
        (tmp_path / "small.toml").write_text(SETTINGS)
        given = [*words, *extra, "--index", chosen, "--settings", tmp_path / "small.toml", "--out", tmp_path / "out"]
        assert main(["reproduce", *map(str, given)]) == 2, arguments
        assert message in capsys.readouterr().err, arguments
    assert not (tmp_path / "out").exists()
    assert main(["reproduce", "stages"]) == 2


def test_every_row_has_its_recipe_and_the_list_says_so(capsys):
    assert main(["reproduce"]) == 0
    listed = capsys.readouterr().out
    for table in published_tables().values():
        for row in table.rows:
            load(CONFIGS / f"{row.config}.toml")
            assert row.id in listed and f"configs/{row.config}.toml" in listed


def test_scale_moves_milestones_and_keeps_the_whole_batch():
    config = load(CONFIGS / "table6_ucf101.toml")
    assert Scale().apply(config).data.batch_size == 32
    small = Scale(0.1).apply(config)
    assert [(c.epochs, c.milestones) for c in small.schedule.cycles] == [(40, (30, 35))] * 2
    assert (small.finetune.epochs, small.finetune.milestones, small.probe.epochs) == (50, (40, 45), 10)
    assert small.mining == config.mining and isinstance(small, Config)
