"""The transfer between sets: finished rows stay, and its verdicts are those of its protocol."""

import json
import sys
from pathlib import Path

import pytest
import torch
from support import small_runs

from cpr_fast.data.index.index import Video
from cpr_fast.weights.checkpoint import load_encoders

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def transfer(bench_script):
    return bench_script("training/transfer")


@pytest.fixture
def call(transfer, monkeypatch, tmp_path):
    """Runs the script with stand-ins for videos, training and classification; returns what was classified."""
    classified = []
    base = sys.modules["evidence.settings"].CANDIDATES["jhmdb"][0]
    monkeypatch.setattr(transfer, "prepare", lambda name, folder, progress: folder / "index.csv")
    monkeypatch.setattr(transfer, "description", lambda index: {"digest": index.parent.name})
    monkeypatch.setattr(transfer, "base_of", lambda *rest: base)
    monkeypatch.setattr(transfer, "world", lambda device: {"commit": "a", "device": "cpu", "torch": "2"})
    monkeypatch.setattr(transfer, "trained", lambda base, network, seed, *rest: (None, Path(f"{network}.pt")))
    monkeypatch.setattr(transfer, "untrained", lambda *rest: {})
    monkeypatch.setattr(transfer, "untrained_checkpoint", lambda last, encoders: Path("random.pt"))

    def classify(checkpoint, indexes, *, task, settings, seeds, **rest):
        classified.append((checkpoint.name, indexes[0].parent.name, task, settings.epochs, *seeds))
        accuracy = {"random.pt": 0.2, "infonce.pt": 0.3, "cpr_n7.pt": 0.4}[checkpoint.name] + 0.01 * seeds[0]
        return {"summary": [{"view": view, "accuracy": accuracy} for view in ("rgb", "flow", "two_stream")]}

    monkeypatch.setattr(transfer, "classify", classify)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["transfer.py", str(tmp_path), "--results", str(tmp_path), *arguments])
        transfer.main()

    return classified, run


def test_every_pair_of_sets_and_finished_rows_stay(transfer, call, tmp_path):
    classified, run = call
    run("--seeds", "0", "--targets", "shrec17", "ucf101")
    expected = [
        (f"{name}.pt", target, task, epochs, 0)
        for target, sources in (("shrec17", 1), ("ucf101", 2))
        for _ in range(sources)
        for name in ("random", "infonce", "cpr_n7")
        for task, epochs in (("probe", 100), ("finetune", transfer.EPOCHS[target]))
    ]
    assert classified == expected
    before = (tmp_path / transfer.ROWS).read_text()
    run("--seeds", "0", "1", "--targets", "shrec17")
    after = (tmp_path / transfer.ROWS).read_text()
    assert after.startswith(before) and len(classified) == len(expected) + 6
    assert [json.loads(line)["seed"] for line in after.splitlines()] == [0] * 9 + [1] * 3


def test_the_table(transfer, call, tmp_path):
    (tmp_path / transfer.PAGE).write_text("before\n<!-- written by transfer.py --table -->\nold\n<!-- end -->\nafter\n")
    _, run = call
    run("--seeds", "0", "1", "--targets", "jhmdb")
    run("--table")
    page = (tmp_path / transfer.PAGE).read_text()
    assert page.startswith("before") and page.endswith("after\n") and "old" not in page
    assert "| shrec17 to jhmdb | cpr_n7 | 2 | 0.405 ± 0.005 |" in page
    assert "| shrec17 to jhmdb | finetune | cpr_n7 - untrained | +0.200, +0.200 | +0.200 |" in page
    assert "partial (2 of 5 seeds)" in page


@pytest.mark.parametrize(
    ("differences", "interval", "expected"),
    [
        ([0.1, 0.1, 0.2, 0.1, 0.0], (0.01, 0.2), "**confirmed**"),
        ([0.1, 0.2, 0.2, 0.1, -0.01], (0.01, 0.2), "undecided"),
        ([0.1, 0.2, 0.2, 0.1, 0.1], (-0.01, 0.2), "undecided"),
        ([-0.1, -0.2, -0.2, -0.1, 0.0], (-0.2, -0.01), "**refuted**"),
        ([0.1] * 5, None, "undecided"),
        ([0.1] * 4, (0.01, 0.2), "partial (4 of 5 seeds)"),
    ],
)
def test_verdicts(transfer, differences, interval, expected):
    found = {"seeds": len(differences), "differences": differences, "ci95": interval, "difference": differences[0]}
    assert transfer.verdict(found, None, complete=len(differences) == 5) == expected


def test_the_checkpoint_of_the_untrained_network(transfer, tmp_path):
    start = small_runs.run(small_runs.settings(tmp_path / "seed" / "start")) / "checkpoints" / "last.pt"
    _, before = load_encoders(start)
    others = {view: encoder.__class__(encoder.backbone, encoder.head) for view, encoder in before.items()}
    for encoder in others.values():
        torch.nn.init.ones_(next(encoder.parameters()).data)
    _, after = load_encoders(transfer.untrained_checkpoint(start.resolve(), others))
    assert all((next(encoder.parameters()) == 1).all() for encoder in after.values())
    assert not all((next(encoder.parameters()) == 1).all() for encoder in load_encoders(start)[1].values())


def test_classes_with_two_sources_are_split_by_source(transfer):
    videos = [
        Video(Path(f"/{label}/{source}{clip}"), label, source, "train", 9, 25.0, 8, 8)
        for label, sources in {"one": ["g1"], "two": ["g2", "g1"], "three": ["g3", "g1", "g2"]}.items()
        for source in sources
        for clip in range(2)
    ]
    found = sys.modules["evidence.videos"]._by_group(videos)
    assert [(v.label, v.source, v.split) for v in found][::2] == [
        ("two", "g2", "test"), ("two", "g1", "train"), ("three", "g3", "test"), ("three", "g1", "train"),
        ("three", "g2", "train"),
    ]  # fmt: skip
