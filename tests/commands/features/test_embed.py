"""A store of features from its making to the report, as on the command line."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import own_networks
from support.data_sets.small_stores import make_store

pytest.importorskip("nvidia.dali", reason="the videos are decoded")

from cpr_fast.cli import main
from cpr_fast.config import Config, DataConfig, ModelConfig
from cpr_fast.data.clips.loader import TrainLoader, WindowLoader
from cpr_fast.data.features.index import StoredClips
from cpr_fast.data.index.index import Index
from cpr_fast.data.synthetic.videos import write_synthetic
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.embed import embed_videos, load_networks
from cpr_fast.mining.auto import choose
from cpr_fast.models import build_encoder
from cpr_fast.ops import cascade_select
from cpr_fast.weights.checkpoint import load_encoders, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = {"frames": 8, "size": 16, "workers": 1}
RECIPE = """
[data]
frames = 8
size = 16
workers = 1
batch_size = 8
[model]
arch = "net.py:Tokens"
args = { depth = 1 }
"""
TRAINING = """
[data]
features = "store"
batch_size = 8
[model]
feature_dim = 8
[memory]
size = 8
[mining]
stages = 1
top_k = 2
[schedule]
cycles = [{ view = "rgb", epochs = 2, mining = "none" }]
[run]
out = "run"
device = "cpu"
"""
EMBED = ["embed", "data/index.csv", "--encoder", "clips.toml", "--samples", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with videos, a network, a recipe, and the store of the network's features."""
    folder = tmp_path_factory.mktemp("stores")
    write_synthetic(folder / "data", classes=4, videos=4, frames=12, width=32, height=32)
    own_networks.write(folder)
    (folder / "clips.toml").write_text(RECIPE)
    (folder / "train.toml").write_text(TRAINING)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*EMBED, "--out", "store", "--dtype", "float32", "--device", "cpu"]) == 0
        assert main(["pretrain", "train.toml"]) == 0
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def network(folder):
    model = ModelConfig(arch=f"{folder / 'net.py'}:Tokens", args={"depth": 1}, feature_dim=8)
    torch.manual_seed(0)
    return build_encoder(model, DataConfig(**DATA)).eval()


def test_shards_of_the_command_write_the_store_of_one_command(here, capsys, monkeypatch):
    from cpr_fast.evaluate.features import embed as module

    monkeypatch.setattr(module, "SHARD_VIDEOS", 5)
    options = ["--samples", "1", "--device", "cpu", "--dtype", "float32"]
    command = ["embed", "data/index.csv", "--encoder", "clips.toml", *options, "--out"]
    assert main([*command, "one shard"]) == 0
    for number in (1, 0):
        assert main([*command, "a store", "--shard", f"{number}/2"]) == 0
        printed = capsys.readouterr().out
        again = "cpr-fast embed data/index.csv --encoder clips.toml --out 'a store' --samples 1 --dtype float32 " \
                "--device cpu --shard 0/2"  # fmt: skip
        assert (again in printed) == (number == 1) and ("the store is not finished" in printed) == (number == 1)
    assert {path.name: path.read_bytes() for path in Path("a store").iterdir()} == {
        path.name: path.read_bytes() for path in Path("one shard").iterdir()
    }
    assert main(["embed", "--features", "f.npz", "--out", "x", "--shard", "0/2"]) == 2
    assert "--shard: expected --encoder" in capsys.readouterr().err
    assert main([*command, "x", "--shard", "2/2"]) == 2
    assert "--shard: expected i/n" in capsys.readouterr().err and not Path("x").exists()


def test_the_store_holds_the_features_of_augmented_clips_and_of_windows(here):
    index, clips, encoder = Index.load("data/index.csv"), StoredClips.open("store"), network(here)
    assert [v.path.resolve() for v in clips] == [v.path.resolve() for v in index]
    assert [(v.label, v.source, v.split) for v in clips] == [(v.label, v.source, v.split) for v in index]
    stored, data = clips.store, DataConfig(**DATA)
    (evaluation,) = stored.evaluation("rgb", np.arange(len(index)))
    train = TrainLoader(index, data, ["rgb"], seed=0)
    windows = WindowLoader(index, data, ["rgb"], clips_per_video=2)
    with torch.no_grad():
        for video, sample in ((0, 0), (5, 2), (len(index) - 1, 1)):  # sample m is the first clip of epoch m
            wanted = encoder.features(train.sample(sample, video).clips["rgb"][:, 0])
            found = torch.from_numpy(stored.samples("rgb", video, video + 1)[:, sample])
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        features = {video: [] for video in range(len(index))}
        for batch in windows:
            for video, feature in zip(batch.video.tolist(), encoder.features(batch.clips["rgb"]), strict=True):
                features[video].append(feature)
    train.close()
    windows.close()
    wanted = torch.stack([torch.stack(some).mean(0) for some in features.values()])
    torch.testing.assert_close(torch.from_numpy(evaluation), wanted, rtol=1e-4, atol=1e-5)


def test_a_stopped_store_is_continued_with_the_same_bits(here, monkeypatch, capsys):
    monkeypatch.setattr("cpr_fast.evaluate.features.embed.SHARD_VIDEOS", 10)
    command = [*EMBED, "--out", "parts", "--dtype", "float32", "--device", "cpu", "--json"]
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in (here / "parts").iterdir()}
    whole = StoredClips.open("store").store.samples("rgb", 0, 24)
    np.testing.assert_allclose(StoredClips.open("parts").store.samples("rgb", 0, 24), whole, rtol=1e-4, atol=1e-5)
    (here / "parts" / "rgb-00001.safetensors").unlink()
    capsys.readouterr()
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["computed"] == 1
    assert {path.name: path.read_bytes() for path in (here / "parts").iterdir()} == before


@pytest.mark.parametrize("name", ["path", "flow_path", "record"])
def test_a_store_is_not_continued_after_a_video_or_its_flow_was_changed(here, tmp_path, name):
    videos = list(Index.load("data/index.csv"))[:3]
    for video in videos:
        (tmp_path / f"{video.path.stem}.flow.mp4").write_bytes(b"not read by the view rgb")
    records = tmp_path / "flow.lmdb"
    records.mkdir()
    (records / "data.mdb").touch()
    flow = [
        tmp_path / f"{v.path.stem}.flow.mp4" if name != "record" else Path(f"{records}#{v.path.stem}") for v in videos
    ]
    index = Index([dataclasses.replace(v, flow_path=file) for v, file in zip(videos, flow, strict=True)])
    networks = load_networks(["clips.toml"])
    assert embed_videos(index, networks, tmp_path / "s", samples=1)["computed"] == 1
    assert embed_videos(index, networks, tmp_path / "s", samples=1)["computed"] == 0
    changed = getattr(index[2], name) if name != "record" else records / "data.mdb"
    state = changed.stat()
    os.utime(changed, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    with pytest.raises(InputError, match="--out: .* holds a store of other features"):
        embed_videos(index, networks, tmp_path / "s", samples=1)
    os.utime(changed, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert embed_videos(index, networks, tmp_path / "s", samples=1)["computed"] == 0


def test_the_weights_of_a_recipe_are_those_of_its_checkpoint_or_are_called_random(here, caplog):
    config = Config.from_dict({"data": DATA, "model": {"arch": "r3d", "width": 0.0625, "feature_dim": 8}})
    torch.manual_seed(3)
    encoder = build_encoder(config.model, config.data)
    payload = {"config": config.to_dict(), "encoders": {"rgb": encoder.state_dict()}}
    save_checkpoint(here / "theirs" / "r3d.pt", payload)
    recipe = RECIPE.split("[model]")[0] + '[model]\narch = "r3d"\nwidth = 0.0625\nfeature_dim = 8\n'
    (here / "theirs" / "random.toml").write_text(recipe)
    (here / "theirs" / "init.toml").write_text(f'{recipe}[model.init]\nrgb = "r3d.pt"\n')
    loaded = load_networks(["theirs/init.toml"])
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(loaded.encoders["rgb"].state_dict()[name], tensor), name
    assert "r3d.pt" in loaded.name and "random" not in loaded.name + caplog.text
    assert not loaded.encoders["rgb"].training
    fresh = load_networks(["theirs/random.toml"])
    assert fresh.name == "theirs/random.toml with random weights (run.seed 0)"
    assert "the weights of r3d are random, because theirs/random.toml has no model.init.rgb" in caplog.text
    caplog.clear()
    load_networks(["flow=theirs/init.toml"])  # whose init is of the other view
    assert "has no model.init.flow" in caplog.text
    caplog.clear()
    assert "random" not in load_networks(["clips.toml"]).name + caplog.text
    (here / "theirs" / "init.toml").write_text(f'{recipe.replace("= 8", "= 9")}[model.init]\nrgb = "r3d.pt"\n')
    with pytest.raises(InputError, match=r"model.init.rgb: '.*r3d.pt' has model.feature_dim 8, got 9"):
        load_networks(["theirs/init.toml"])


def test_an_unreadable_video_is_left_out_and_named(here, capsys, caplog):
    shutil.copytree(here / "data", here / "broken")
    index = Index.load("broken/index.csv")
    index[3].path.write_bytes(index[3].path.read_bytes()[:900])
    assert main([*EMBED[:1], "broken/index.csv", *EMBED[2:], "--out", "holed", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["left_out"] == 1 and report["clips"] == len(index) - 1
    assert [path for path, _ in report["skipped"]] == [str(index[3].path)] and index[3].path.name in caplog.text
    names = [v.path.name for v in StoredClips.open("holed")]
    assert names == [v.path.name for i, v in enumerate(index) if i != 3]


def test_retrieve_compares_the_heads_with_the_features_that_they_were_trained_on(here, capsys):
    assert main(["retrieve", "run/checkpoints/last.pt", "--index", "store", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in result["summary"]}
    assert list(rows) == ["trained", "untrained", "stored"]
    clips = StoredClips.open("store")
    test, train = clips.select("test"), clips.select("train")
    (query,), (gallery,) = (list(part.store.evaluation("rgb", part.rows)) for part in (test, train))
    _, encoders = load_encoders("run/checkpoints/last.pt")
    with torch.no_grad():
        heads = [encoders["rgb"].features(torch.from_numpy(some)) for some in (query, gallery)]
    for name, pair in (("trained", heads), ("stored", [torch.from_numpy(some) for some in (query, gallery)])):
        units = [torch.nn.functional.normalize(some, dim=1) for some in pair]
        units = [torch.nn.functional.normalize(some - some.mean(0), dim=1) for some in units]
        nearest = (units[0] @ units[1].T).argmax(1)
        assert rows[name]["r@1"] == pytest.approx((train.labels[nearest] == test.labels).mean())
    assert main(["retrieve", "store", "--index", "store", "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in alone["summary"]] == ["stored"] and alone["r@1"] == rows["stored"]["r@1"]
    assert main(["retrieve", "run/checkpoints/last.pt", "--index", "store", "--protocol", "leave_source_out"]) == 0
    assert "Stored features · RGB" in capsys.readouterr().out


def store_of(folder, widths):
    """Writes a store of 40 labelled clips with random features."""
    return str(make_store(folder, widths=widths, count=40, dtype="float32").folder)


def test_features_of_another_store_are_not_evaluated_as_those_of_the_first(here, tmp_path, capsys):
    stores = [store_of(tmp_path / name, {"rgb": 16}) for name in ("a", "b")]
    link = tmp_path / "link"
    link.symlink_to(stores[0])
    for task in ("retrieve", "probe"):
        assert main([task, stores[0], "--index", stores[1]]) == 2
        said = capsys.readouterr().err
        assert f"--index: expected the store '{stores[0]}' itself" in said and f"got '{stores[1]}'" in said
    assert main(["retrieve", stores[0], "--index", str(link), "--json"]) == 0


def test_heads_are_evaluated_on_views_of_the_width_that_they_were_trained_on(tmp_path, capsys):
    (tmp_path / "two.toml").write_text(TRAINING)
    first, swapped = (store_of(tmp_path / name, {"rgb": rgb, "flow": 21 - rgb}) for name, rgb in (("a", 16), ("b", 5)))
    given = ["--data.features", first, "--run.out", str(tmp_path / "run")]
    assert main(["pretrain", str(tmp_path / "two.toml"), *given]) == 0
    heads = str(tmp_path / "run" / "checkpoints" / "last.pt")
    assert main(["retrieve", heads, "--index", first]) == 0
    capsys.readouterr()
    for other, said in (
        (swapped, "expected features of 16 dimensions of the view 'rgb'"),
        (store_of(tmp_path / "c", {"rgb": 17}), "expected features of 16 dimensions of the view 'rgb'"),
        (store_of(tmp_path / "d", {"flow": 16}), "expected features of the view 'rgb', but the store"),
    ):
        assert main(["retrieve", heads, "--index", other]) == 2
        error = capsys.readouterr().err
        assert f"--index: {said}" in error and other in error


def test_probe_and_report_work_on_the_run(here, capsys):
    for given in ("run/checkpoints/last.pt", "store"):
        assert main(["probe", given, "--index", "store", "--epochs", "2", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert 0 <= result["accuracy"] <= 1 and result["crops"] == 1
    assert main(["report", "run", "--json"]) == 0
    page = (here / "run" / "report.html").read_text()
    assert "Training features" in page and "Best stored features (RGB)" in page and "Best pixel baseline" not in page


def test_a_store_without_labels_and_splits_is_enough(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    features = np.random.default_rng(0).standard_normal((40, 2, 6))
    np.savez("theirs.npz", features=features, names=np.array([f"v{i}" for i in range(40)]))
    (tmp_path / "train.toml").write_text(TRAINING)
    assert main(["embed", "--features", "theirs.npz", "--out", "store"]) == 0
    assert main(["explain", "train.toml"]) == 0
    said = capsys.readouterr().out
    assert "features: store: 40 training videos of 40 sources, no labels" in said and "s3d" not in said
    assert main(["pretrain", "train.toml"]) == 0
    assert main(["retrieve", "run/checkpoints/last.pt", "--index", "store"]) == 0
    assert "The store has no labels, so R@k and mAP cannot be measured." in capsys.readouterr().out
    assert main(["report", "run"]) == 0
    assert [path.name for path in (tmp_path / "run").glob("*.html")] == ["report.html"]
    assert main(["probe", "run/checkpoints/last.pt", "--index", "store"]) == 2
    assert "--index: expected videos of the splits train and test" in capsys.readouterr().err


def test_mine_reads_stores_of_two_views_and_their_projections(here, capsys, tmp_path):
    random = np.random.default_rng(0)
    centres = random.standard_normal((3, 6))
    for view in ("rgb", "flow"):
        rows = (centres[np.arange(60) % 3] + random.standard_normal((60, 6))).astype("f4")
        np.savez(tmp_path / f"{view}.npz", features=rows, names=np.array([f"c{i % 3}/{i}" for i in range(60)]))
    both = [f"{view}={tmp_path / view}.npz" for view in ("rgb", "flow")]
    store = str(tmp_path / "two")
    assert main(["embed", "--features", *both, "--out", store, "--dtype", "float32", "--json"]) == 0
    capsys.readouterr()
    mine = ["mine", store, "--stages", "3", "--json"]
    assert main(mine) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    arrays = {view: np.load(tmp_path / f"{view}.npz")["features"] for view in ("rgb", "flow")}
    labels = np.arange(60) % 3
    np.savez(tmp_path / "plain.npz", **arrays, label=labels, group=np.arange(60))
    assert main(["mine", str(tmp_path / "plain.npz"), "--stages", "3", "--json"]) == 0
    assert found == json.loads(capsys.readouterr().out)["results"]
    recipe, run = tmp_path / "two.toml", tmp_path / "run"
    text = TRAINING.replace('"store"', f'"{store}"').replace('"run"', f'"{run}"')
    recipe.write_text(text.replace("cycles = [{", "cycles = [{ view = 'flow', epochs = 1, mining = 'none' }, {"))
    assert main(["pretrain", str(recipe)]) == 0
    capsys.readouterr()
    checkpoint = run / "checkpoints" / "last.pt"
    assert main([*mine, "--checkpoint", str(checkpoint), "--raw"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    heads = load_encoders(checkpoint)[1]
    with torch.no_grad():
        projected = [heads[view].backbone(torch.from_numpy(arrays[view])) for view in ("rgb", "flow")]
    features, ids = F.normalize(torch.stack(projected), dim=2), torch.arange(60)
    mined = cascade_select(features, features, [1, 0, 1], [30, 15, 5], query_ids=ids, memory_ids=ids)[0]
    assert row["pmr"] == pytest.approx((labels[mined] == labels[:, None]).mean(), abs=1e-6)
    assert main([*mine, "--checkpoint", str(checkpoint)]) == 0
    assert json.loads(capsys.readouterr().out)["results"] not in ([row], found)


def test_clips_of_one_source_in_a_store_are_siblings_whatever_their_labels(tmp_path, capsys):
    random, labels, sources = np.random.default_rng(0), np.arange(60) % 3, np.arange(60) // 4
    names = [f"v{i}" for i in range(60)]
    table = "".join(f"{name},c{c},s{source}\n" for name, c, source in zip(names, labels, sources, strict=True))
    (tmp_path / "table.csv").write_text(f"path,label,source\n{table}")
    scenes, views = random.standard_normal((15, 6)), []
    for view in ("rgb", "flow"):
        views.append((2 * scenes[sources] + random.standard_normal((60, 6))).astype("f4"))
        np.savez(tmp_path / f"{view}.npz", features=views[-1], names=np.array(names))
    both = [f"{view}={tmp_path / view}.npz" for view in ("rgb", "flow")]
    store = str(tmp_path / "two")
    embed = ["embed", str(tmp_path / "table.csv"), "--features", *both, "--out", store, "--dtype", "float32", "--json"]
    assert main(embed) == 0
    capsys.readouterr()
    assert main(["mine", store, "--stages", "1", "--top-k", "3", "--raw", "--auto", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    features, ids = torch.from_numpy(np.stack(views)), torch.from_numpy(sources)
    mined = cascade_select(features, features, [1], [3], query_ids=ids, memory_ids=ids)[0].numpy()
    assert found["results"][0]["pmr"] == pytest.approx((labels[mined] == labels[:, None]).mean(), abs=1e-6)
    assert found["auto"]["text"] == choose(features, ids, 3).reason(("rgb", "flow"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["embed", "--out", "x"], "--encoder, --features: expected one of the two, got none"),
        (["embed", "--encoder", "net.py:Tokens", "--out", "x"], "INDEX: expected the index of the videos that"),
        (["embed", "data/index.csv", "--encoder", "net.py:Tokens", "clips.toml", "--out", "x"],
         "--encoder: expected one network, or checkpoints, got net.py:Tokens clips.toml"),
        (["embed", "data/index.csv", "--encoder", "net.py:No", "--out", "x"], "model.arch 'net.py:No': expected a"),
        (["embed", "data/index.csv", "--encoder", "train.toml", "--out", "x"], "--encoder: embed expects a network"),
        (["embed", "--features", "rgb=a", "b", "--out", "x"], "--features: expected each view once"),
        ([*EMBED[:-1], "0", "--out", "x"], "--samples: expected 1 or more, got 0"),
        ([*EMBED, "--out", "data"], "--out: expected a new folder or a store of features, got 'data'"),
        ([*EMBED, "--out", "store", "--seed", "1"], "--out: 'store' holds a store of other features"),
        (["mine", "store"], "FEATURES: expected features of the view 'flow', but the store 'store' has rgb"),
        (["mine", "net.py", "--checkpoint", "x.pt"], "--checkpoint: expected a store of features with it"),
        (["retrieve", "run/checkpoints/last.pt", "--index", "data/index.csv"],
         "--index: expected a store of features (see `cpr-fast embed`), but 'data/index.csv' is a file"),
        (["probe", "run/checkpoints/last.pt", "--index", "store", "--inputs", "clips"],
         "CHECKPOINT: probe --inputs clips expects a network that encodes videos"),
        (["probe", "store", "--index", "store", "--recipe", "coclr"],
         "--recipe: expected no such option with the store of features 'store', got coclr"),
        (["retrieve", "run/checkpoints/last.pt", "--index", "store", "--clips", "3"],
         "--clips: expected no such option"),
        (["retrieve", "store", "--index", "store", "--crops", "1"], "--crops: expected no such option with the store"),
        (["probe", "run/checkpoints/last.pt", "--index", "store", "--crops", "5"], "--crops: expected no such option"),
        (["finetune", "run/checkpoints/last.pt", "--index", "store"], "CHECKPOINT: finetune expects a network that"),
        (["export", "run/checkpoints/last.pt", "--to", "onnx", "--out", "x.onnx"], "--to: expected safetensors"),
        (["pretrain", "train.toml", "--data.features", "data", "--run.out", "x"],
         "data.features: expected a store of features (see `cpr-fast embed`), but 'data' holds no store.json"),
        (["pretrain", "train.toml", "--data.features", "no"], "--data.features: expected a folder, but 'no' does not"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_that_names_it(here, capsys, arguments, said):
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"cpr-fast: {said}"), error
    assert not (here / "x").exists()
