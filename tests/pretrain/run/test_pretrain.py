"""The training loop on random clips: files of a run, determinism, cycles, rows, unreadable files."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small_runs import INDEX, MODERN, assert_same, rows, run, settings, trained
from support.stand_in_loader import RandomLoader

from cpr_fast.config import load
from cpr_fast.data.index.index import Index
from cpr_fast.mining.lab import load_two_view_features, sweep
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.pretrain.state.cascade import rate_names
from cpr_fast.pretrain.state.cycle import initial_encoder
from cpr_fast.runtime.metrics import read_metrics
from cpr_fast.weights.checkpoint import load_checkpoint, load_encoders

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rows_of_a_run(finished):
    first = read_metrics(finished)[0]
    assert first["kind"] == "run"
    written = json.loads((finished / "config.json").read_text())
    assert written.pop("videos")["count"] == len(INDEX)
    assert first["config"] == written == load(finished / "config.json").to_dict()
    assert first["versions"]["torch"] == torch.__version__
    steps = rows(finished, "step")
    assert [row["step"] for row in steps] == list(range(12))
    assert [row["epoch"] for row in steps] == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert [(row["cycle"], row["view"], row["mining"]) for row in steps[5:7]] == [
        (0, "rgb", "none"),
        (1, "flow", "cascade"),
    ]
    # Two steps of each cycle fill the memory.
    assert [row["loss"] is None for row in steps] == [False] * 6 + [True] * 2 + [False] * 4  # the cascade waits
    assert [row["pmr"] is None for row in steps] == [True] * 8 + [False] * 4
    assert [row["lr"] for row in steps] == [1e-3] * 9 + [1e-4] * 3
    epochs = rows(finished, "epoch")
    assert [row["epoch"] for row in epochs] == [0, 1, 2, 3]
    assert epochs[1]["loss"] == pytest.approx(sum(row["loss"] for row in steps[3:6]) / 3)
    for name in ("pmr", "mining_r1", *rate_names(3)):
        assert epochs[3][name] == pytest.approx(sum(row[name] for row in steps[9:]) / 3)
    for row in (*steps[9:], epochs[3]):  # the survivors of the last stage are the mined positives
        assert row["survivor_precision_3"] == pytest.approx(row["pmr"])
        assert row["survivor_recall_1"] >= row["survivor_recall_2"] >= row["survivor_recall_3"]
    assert all(1 <= row["mined_age_steps"] <= 2 for row in steps[9:])  # 10 slots, 6 of them written every step
    right = epochs[3]["right_counts"]  # of 18 queries, two mined for each
    assert sum(right) == 18 and sum(epochs[3]["right_per_class"]) == right[1] + 2 * right[2]
    assert {"hubness", "hub_share", "mined_share", "cmr_mean", "cmr_median_video"} <= epochs[3].keys()
    assert 0 <= epochs[3]["cmr_median"] <= 1
    assert len(epochs[3]["cmr_per_class"]) == 4
    assert epochs[1]["pmr"] is None
    assert epochs[3]["skipped"] == 0


def test_mined_rows_point_into_the_index(finished):
    mined = rows(finished, "mined")
    assert {row["epoch"] for row in mined} == {2, 3}
    for row in mined:
        query = row["query"]["video"]
        assert 1 <= len(row["mined"]) <= 2
        for entry in row["mined"]:
            assert INDEX.source_ids[entry["video"]] != INDEX.source_ids[query]
            assert entry["correct"] == (INDEX.labels[entry["video"]] == INDEX.labels[query])
            assert entry["start"] == entry["video"] + 1  # the loader marks the key clip


def test_checkpoint_holds_the_trained_views(finished):
    config, encoders = load_encoders(finished / "checkpoints" / "last.pt")
    assert set(encoders) == {"rgb", "flow"}
    assert config.run.out == str(finished)
    assert len(list((finished / "checkpoints").glob("step-*.pt"))) == 2
    start = initial_encoder(config, "flow", {})
    moved = [not torch.equal(a, b) for a, b in zip(start.parameters(), encoders["flow"].parameters(), strict=True)]
    assert all(moved)


def test_same_seed_same_run_other_seed_another(finished, tmp_path):
    again = run(settings(tmp_path / "again"))
    assert_same(trained(finished), trained(again))
    for kind in ("step", "epoch", "mined"):
        assert rows(finished, kind) == rows(again, kind)
    other = run(settings(tmp_path / "other", run={"out": str(tmp_path / "other"), "seed": 1}))
    assert rows(other, "step") != rows(finished, "step")


def test_a_view_alone_decodes_alone(tmp_path):
    asked = []

    class Asked(RandomLoader):
        def __init__(self, index, data, views, **kwargs):
            super().__init__(index, data, views, **kwargs)
            asked.append((tuple(views), self))

    cycles = [{"view": "flow", "epochs": 1, "mining": m} for m in ("none", "label", "cascade")]
    run(settings(tmp_path, schedule={"cycles": cycles}), Asked)
    assert [views for views, _ in asked] == [("flow",), ("flow",), ("flow", "rgb")]
    assert all(loader.closed for _, loader in asked)


def test_cycles_of_a_view_go_on_from_its_latest_weights(tmp_path):
    """A cycle that is too short to fill the memory does not change the weights of the previous cycle."""
    first, out = tmp_path / "first", tmp_path / "run"
    cycles = [{"view": "rgb", "epochs": 2, "mining": "none"}, {"view": "rgb", "epochs": 1, "mining": "cascade"}]
    memory = {"size": 18}  # one epoch
    run(settings(first, memory=memory, schedule={"cycles": cycles[:1]}))
    run(settings(out, memory=memory, schedule={"cycles": cycles}))
    weights = [load_encoders(folder / "checkpoints" / "last.pt")[1] for folder in (first, out)]
    assert_same(*[list(encoders["rgb"].parameters()) for encoders in weights])
    assert list(weights[1]) == ["rgb"]  # the untrained flow encoder is not saved as a result


@pytest.mark.parametrize("log_every", [2, 5, 100])
def test_rows_and_checkpoints_come_every_so_many_steps(tmp_path, log_every):
    folder = run(
        settings(
            tmp_path,
            schedule={"cycles": [{"view": "rgb", "epochs": 4, "mining": "none"}]},
            run={"out": str(tmp_path), "log_every": log_every, "checkpoint_every": 2, "keep_checkpoints": 100},
        )
    )
    assert [row["step"] for row in rows(folder, "step")] == [s for s in range(12) if (s + 1) % log_every == 0]
    saved = sorted(int(path.stem.split("-")[1]) for path in (folder / "checkpoints").glob("step-*.pt"))
    assert saved == [2, 3, 4, 6, 8, 9, 10, 12]  # every second step and every end of an epoch


def test_waiting_for_data_is_measured(tmp_path):
    class Sleepy(RandomLoader):
        sleep_s = 0.08

    folder = run(settings(tmp_path, schedule={"cycles": [{"view": "rgb", "epochs": 1, "mining": "none"}]}), Sleepy)
    steps = [row for row in read_metrics(folder) if row["kind"] == "step"]
    assert all(row["data_wait_s"] >= 0.08 for row in steps)
    for row in steps:
        assert row["clips_per_s"] == pytest.approx(12 / (row["data_wait_s"] + row["step_time_s"]))


def test_files_that_could_not_be_read_are_counted_and_named_after_the_first_epoch(tmp_path, caplog):
    class Skipping(RandomLoader):
        skipped = ((Path("/b.mp4"), "is empty"), (Path("/a.mp4"), "no frame decodes"))

    cycles = {"cycles": [{"view": "rgb", "epochs": epochs, "mining": "none"} for epochs in (2, 1)]}
    folder = run(settings(tmp_path, schedule=cycles), Skipping)
    assert [row["skipped"] for row in rows(folder, "epoch")] == [2, 2, 2]
    text = "2 files could not be read and were replaced by other videos: "
    text += "1 file: no frame decodes: /a.mp4; 1 file: is empty: /b.mp4"
    told = [record.getMessage() for record in caplog.records]
    for lines in (
        [row["text"] for row in rows(folder, "note")],
        [line for line in told if "could not be read" in line],
    ):
        assert lines == [f"cycle 1: {text}"]  # the same files again are no news
    order = [row["kind"] for row in read_metrics(folder) if row["kind"] in ("note", "epoch")]
    assert order == ["epoch", "note", "epoch", "epoch"]


def test_progress_is_drawn_on_stderr(tmp_path, capsys):
    cycles = {"cycles": [{"view": "rgb", "epochs": 1, "mining": "none"}]}
    pretrain(settings(tmp_path, schedule=cycles), index=INDEX, make_loader=RandomLoader, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "rgb" in captured.err
    assert "3/3" in captured.err


def test_a_dumped_memory_serves_the_mining_lab(tmp_path):
    folder = run(settings(tmp_path / "run", run={"dump_memory": True}))
    assert [path.name for path in (folder / "memory").iterdir()] == ["cycle-2.npz"]  # the first cycle has one view
    saved = load_checkpoint(folder / "checkpoints" / "last.pt")["cycle_state"]["memory"]
    order = [(saved["count"] + i) % 10 for i in range(10)]  # the oldest slot is the one to be written next
    with np.load(folder / "memory" / "cycle-2.npz") as dumped:
        for name, row in (("flow", 0), ("rgb", 1)):  # the memory of a flow cycle starts with the flow view
            assert np.array_equal(dumped[name], saved["features"][row][order])
        assert np.array_equal(dumped["video"], saved["video"][order])
        assert np.array_equal(dumped["group"], saved["source"][order])
        assert dumped["age"].tolist() == [1] * 4 + [0] * 6
    data = load_two_view_features(folder / "memory" / "cycle-2.npz", raw=True)
    (row,) = sweep(data, stages=[3], top_ks=[2], query_views=["flow"])
    assert 0 <= row["pmr"] <= 1


def test_unlabelled_videos_train_without_mining_metrics(tmp_path):
    unlabelled = Index([dataclasses.replace(video, label="") for video in INDEX])
    folder = pretrain(settings(tmp_path), index=unlabelled, make_loader=RandomLoader, progress=False)
    assert rows(folder, "epoch")[-1]["loss"] is not None
    assert rows(folder, "epoch")[-1]["pmr"] is None


def test_bf16_trains(tmp_path):
    half = run(settings(tmp_path, optim={"precision": "bf16"}))
    assert all(row["loss"] is not None for row in rows(half, "epoch")[1::2])
    for state in trained(half)["encoders"].values():  # weights and memory remain fp32
        assert {tensor.dtype for tensor in state.values()} == {torch.float32, torch.int64}
    assert trained(half)["cycle_state"]["memory"]["features"].dtype == torch.float32


def test_rows_of_steps_hold_what_the_schedules_set(tmp_path):
    run(settings(tmp_path, **MODERN))
    first, second = ([row for row in rows(tmp_path, "step") if row["cycle"] == number] for number in (0, 1))
    rises = [1e-3 * (step + 1) / 4.5 for step in range(4)]
    falls = [1e-5 + 9.9e-4 * (1 + math.cos(math.pi * (step - 4.5) / 1.5)) / 2 for step in (4.5, 5)]
    assert [row["lr"] for row in first] == pytest.approx(rises + falls)
    assert [row["weight_decay"] for row in first] == pytest.approx(
        [0.3 - 0.25 * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    )
    assert (
        [row["loss"] is None for row in second]
        == [row["grad_norm"] is None for row in second]
        == [True] * 2 + [False] * 4
    )
    assert [row["lr"] for row in second[:5]] == pytest.approx([5e-4 / 2.1] * 3 + [1e-3 / 2.1, 5e-4])
    assert [row["ema_momentum"] for row in second] == pytest.approx(
        [0.9] * 2 + [1 - 0.1 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    )
    assert all(row["grad_norm"] > 0 for row in first)


def test_rows_of_steps_hold_nothing_that_does_not_change(finished):
    for row in rows(finished, "step"):
        assert not {"weight_decay", "ema_momentum", "grad_norm"} & row.keys() and "lr" in row
