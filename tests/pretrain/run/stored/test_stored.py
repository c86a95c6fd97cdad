"""Pretraining on a store of features: the methods, resuming, processes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support.data_sets.small_stores import make_clips, make_store
from support.small_runs import Killed, assert_same, rows, trained
from torch.nn import functional as F

from cpr_fast.config import Config, load
from cpr_fast.data.features.index import StoredClips
from cpr_fast.data.features.store import FeatureStore
from cpr_fast.data.features.stream import FeatureLoader
from cpr_fast.errors import InputError
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.weights.checkpoint import load_encoders

pytestmark = pytest.mark.usefixtures("one_thread")

CPR = [
    {"view": "rgb", "epochs": 2, "mining": "none"},
    {"view": "flow", "epochs": 2, "mining": "none"},
    {"view": "rgb", "epochs": 3},
]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> FeatureStore:
    return make_store(tmp_path_factory.mktemp("stores") / "s", count=400, noise=2.0)


def settings(store: FeatureStore, out: Path, cycles=tuple(CPR), **sections) -> Config:
    values = {
        "data": {"features": str(store.folder), "batch_size": 16, "window": 128},
        "model": {"feature_dim": 8},
        "memory": {"size": 48},
        "mining": {"stages": 3, "ratio": 0.5, "top_k": 3},
        "optim": {"lr": 0.01},
        "schedule": {"cycles": list(cycles)},
        "run": {"out": str(out)},
    }
    return Config.from_dict(values | {name: values.get(name, {}) | some for name, some in sections.items()})


def run(config: Config, **options) -> Path:
    return pretrain(config, progress=False, **options)


def separation(features: torch.Tensor, labels: np.ndarray) -> float:
    """Returns how much more similar features of one class are than others, in mean cosines."""
    units = F.normalize(features - features.mean(0), dim=1)
    same = torch.from_numpy(labels[:, None] == labels)
    return ((units @ units.T)[same].mean() - (units @ units.T)[~same].mean()).item()


@pytest.mark.parametrize("method", ["infonce", "coclr", "cpr", "ubernce", "bank", "batch"])
def test_every_method_learns_on_features(store, tmp_path, method):
    mining = {"coclr": {"stages": 1, "ratio": 0.5, "top_k": 3}}.get(method, {})
    kind = {"memory": {"kind": method, "size": 48}} if method in ("bank", "batch") else {}
    cycles = CPR if method in ("coclr", "cpr") else [
        {"view": "rgb", "epochs": 4, "mining": "label" if method == "ubernce" else "none"}]  # fmt: skip
    out = run(settings(store, tmp_path / "run", cycles, mining=mining, **kind))
    config, encoders = load_encoders(out / "checkpoints" / "last.pt")
    assert config.model.arch == "features" and config.model.args == {"width": 16} and config.data.index == ""
    held_out = StoredClips(store).select("test")
    stored = torch.from_numpy(np.concatenate(list(store.evaluation("rgb", held_out.rows))))
    before, after = separation(stored, held_out.labels), separation(encoders["rgb"].features(stored), held_out.labels)
    assert after > before + 0.1, (before, after)


def test_the_encoder_is_two_linear_layers_and_the_loss_gets_unit_features(store, tmp_path):
    cycles = [{"view": "rgb", "epochs": 1, "mining": "none"}]
    out = run(settings(store, tmp_path / "run", cycles))
    _, encoders = load_encoders(out / "checkpoints" / "last.pt")
    encoder, x = encoders["rgb"], torch.randn(5, 16)
    first, second = encoder.backbone[0], encoder.backbone[2]
    wanted = (x @ first.weight.T + first.bias).clamp(min=0) @ second.weight.T + second.bias
    torch.testing.assert_close(encoder.features(x), wanted)
    torch.testing.assert_close(encoder(x), F.normalize(wanted, dim=1))


class Dying(FeatureLoader):
    at = (0, 0)

    def epoch(self, number, start_step=0):
        for i, batch in enumerate(super().epoch(number, start_step), start_step):
            if (number, i) == self.at:
                raise Killed
            yield batch


@pytest.mark.parametrize("death", [(0, 5), (4, 2), (5, 13)])
def test_resume_equals_straight_through(store, tmp_path, death):
    every = {"checkpoint_every": 3}
    straight = run(settings(store, tmp_path / "a", run={"out": str(tmp_path / "a"), **every}))
    config = settings(store, tmp_path / "b", run={"out": str(tmp_path / "b"), **every})
    with pytest.raises(Killed):
        run(config, make_loader=type("Dying", (Dying,), {"at": death}))
    again = load(tmp_path / "b" / "config.json")  # the settings that the run recorded
    run(again, resume=True)
    assert_same(trained(straight), trained(tmp_path / "b"))
    assert rows(straight, "step") == rows(tmp_path / "b", "step")
    assert rows(straight, "epoch") == rows(tmp_path / "b", "epoch")


def test_a_run_is_not_resumed_on_other_features(store, tmp_path):
    cycles = [{"view": "rgb", "epochs": 1, "mining": "none"}]
    out = run(settings(store, tmp_path / "run", cycles))
    other = make_store(tmp_path / "other", count=400, samples=2)
    fewer = make_store(tmp_path / "fewer", count=390)
    for features, came in ((other, "other features, or those of other clips"), (fewer, "312 videos")):
        said = rf"data.features: the run in '{out}' was trained on 320 videos, got {came} \('{features.folder}'\)\. "
        with pytest.raises(InputError, match=f"^{said}Resume with the store it began with"):
            run(settings(features, out, cycles), resume=True)
    moved = tmp_path / "moved"
    store.folder.rename(moved)
    try:
        run(settings(FeatureStore(moved), out, cycles), resume=True)
    finally:
        moved.rename(store.folder)


def test_heads_start_from_those_of_another_run(store, tmp_path):
    cycles = [{"view": "rgb", "epochs": 1, "mining": "none"}]
    last = run(settings(store, tmp_path / "a", cycles)) / "checkpoints" / "last.pt"
    config = settings(store, tmp_path / "b", cycles, model={"feature_dim": 8, "init": {"rgb": str(last)}})
    run(config)
    other = make_store(tmp_path / "wide", count=60, widths={"rgb": 24})
    with pytest.raises(InputError, match=r"model.init.rgb: .* has model.args \{'width': 16\}, got \{'width': 24\}"):
        run(settings(other, tmp_path / "c", cycles, model={"feature_dim": 8, "init": {"rgb": str(last)}}))


def test_only_some_queries_are_measured_by_stage(store, tmp_path):
    cycles = [{"view": "rgb", "epochs": 2}]
    few = run(settings(store, tmp_path / "few", cycles, health={"mining_queries": 4}))
    every = run(settings(store, tmp_path / "all", cycles, health={"mining_queries": 16}))
    assert_same(trained(few)["encoders"], trained(every)["encoders"])  # measuring changes no training
    (a, b) = (rows(folder, "epoch")[-1] for folder in (few, every))
    assert a["pmr"] == b["pmr"] and a["mining_r1"] == b["mining_r1"]
    assert a["view_agreement"] != b["view_agreement"] and abs(a["view_agreement"] - b["view_agreement"]) < 0.15


def test_online_retrieval_reads_the_store(store, tmp_path):
    cycles = [{"view": "rgb", "epochs": 1, "mining": "none"}]
    out = run(settings(store, tmp_path / "run", cycles, health={"online_every": 1, "online_split": "test"}))
    (row,) = rows(out, "online")
    assert row["videos"] == 80 and row["r@1"] > 2 * row["chance_r@1"]


def test_the_score_without_labels_reads_two_samples_of_the_store(store, tmp_path):
    cycles = [{"view": "rgb", "epochs": 2, "mining": "none"}]
    health = {"online_every": 1, "online_measure": "score", "online_videos": 40}
    out = run(settings(store, tmp_path / "run", cycles, health=health))
    found = rows(out, "online")
    assert [row["videos"] for row in found] == [32, 32] and found[0]["same_video"] > 0.1  # two batches of 16
    assert_same(trained(out)["encoders"], trained(run(settings(store, tmp_path / "bare", cycles)))["encoders"])


def test_bad_input_is_named_before_any_work(store, tmp_path):
    def refused(said, config):
        with pytest.raises(InputError, match=said):
            run(config)
        assert not (tmp_path / "run").exists()

    out = tmp_path / "run"
    refused(r"data.features: cycle 1 \(residual, mining none\): expected features of the view 'residual'.*rgb, flow",
            settings(store, out, [{"view": "residual", "epochs": 1, "mining": "none"}]))  # fmt: skip
    refused("data.split: split 'nope': the store", settings(store, out, data={
        "features": str(store.folder), "batch_size": 16, "split": "nope"}))  # fmt: skip
    refused("data.features: expected a store of features", settings(store, out, data={"features": str(tmp_path)}))
    for section, values, said in (
        ("model", {"head": "pooled", "feature_dim": 16}, "model.head: expected 'mlp'"),
        ("model", {"arch": "features", "args": {"width": 0}}, r"model.args: expected \{'width': D\}"),
        ("data", {"window": 0}, "data.window: expected a positive number, got 0"),
        ("health", {"mining_queries": 0}, "health.mining_queries: expected a positive number, got 0"),
    ):
        with pytest.raises(InputError, match=said):
            settings(store, out, **{section: values})
    with pytest.raises(InputError, match="data.features: expected a store of features, because model.arch"):
        Config.from_dict({"model": {"arch": "features", "args": {"width": 4}}})


def test_features_that_are_not_finite_stop_the_run_with_the_name_of_the_clip(tmp_path):
    bad = make_store(tmp_path / "s", make_clips(100), samples=2)
    path = bad.folder / "rgb-00001.safetensors"
    tensors = load_file(path)
    tensors["samples"][3, :, 0] = np.nan
    save_file(tensors, path)
    cycles = [{"view": "rgb", "epochs": 1, "mining": "none"}]
    with pytest.raises(InputError, match="rgb-00001.safetensors: expected finite features, .* 'c1/v26.avi'"):
        run(settings(bad, tmp_path / "run", cycles))


def test_one_sample_per_clip_is_warned_of(tmp_path, caplog):
    store = make_store(tmp_path / "s", count=60, samples=1)
    run(settings(store, tmp_path / "run", [{"view": "rgb", "epochs": 1, "mining": "none"}]))
    assert "query and key are the same features: cycle 1 (rgb, mining none) has nothing to learn" in caplog.text
