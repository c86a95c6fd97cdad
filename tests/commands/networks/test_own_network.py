"""Every command with a network of the user's own: a recipe names its file, and the checkpoint finds it again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from support import own_networks

pytest.importorskip("nvidia.dali", reason="the videos are decoded")

from cpr_fast.cli import main
from cpr_fast.config import ClassifierConfig, DataConfig, ModelConfig
from cpr_fast.data.synthetic.videos import write_synthetic
from cpr_fast.evaluate.classify.classifier import Classifier
from cpr_fast.models import build_encoder
from cpr_fast.weights.checkpoint import load_checkpoint, load_encoders
from cpr_fast.weights.reading import CheckpointError

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = """
[data]
index = "data/index.csv"
frames = 8
size = 16
batch_size = 4
workers = 1
[model]
arch = "{arch}"
feature_dim = 8
args = {args}
[memory]
size = 8
[schedule]
cycles = [{{ view = "rgb", epochs = 1, mining = "none" }}]
[run]
out = "{out}"
device = "cpu"
"""
NETWORKS = {
    "own": ("net.py:Tokens", "{ depth = 2 }"),
    "vit": ("vit", "{ depth = 1, width = 24, heads = 2, tubelet = [4, 8, 8], class_token = true }"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with videos, net.py and a recipe for each network."""
    folder = tmp_path_factory.mktemp("own")
    write_synthetic(folder / "data", classes=4, videos=2, frames=12, width=32, height=32)
    own_networks.write(folder)
    for name, (arch, args) in NETWORKS.items():
        (folder / f"{name}.toml").write_text(RECIPE.format(arch=arch, args=args, out=name))
    return folder


@pytest.fixture(params=NETWORKS)
def trained(request, folder, monkeypatch):
    """The name of a network that was trained in the working directory, and its checkpoint."""
    monkeypatch.chdir(folder)
    name = request.param
    if not Path(name).exists():
        assert main(["pretrain", f"{name}.toml", "--model.args.depth", "3"]) == 0
    return name, f"{name}/checkpoints/last.pt"


def answer(capsys, *words: str) -> dict:
    """Returns the JSON object that a command prints."""
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_checkpoint_records_the_network_and_its_arguments(trained, monkeypatch):
    name, checkpoint = trained
    model = load_checkpoint(checkpoint)["config"]["model"]
    assert model["args"]["depth"] == 3
    assert model["arch"] == ("vit" if name == "vit" else f"{Path.cwd()}/net.py:Tokens")
    assert isinstance(torch.load(checkpoint, weights_only=True), dict)
    checkpoint = Path(checkpoint).absolute()
    monkeypatch.chdir("/")
    assert len(load_encoders(checkpoint)[1]["rgb"].backbone.blocks) == 3


def test_retrieval_probe_finetuning_and_search(trained, capsys, tmp_path):
    _, checkpoint = trained
    data = ["--index", "data/index.csv"]
    found = answer(capsys, "retrieve", checkpoint, *data, "--clips", "1")
    assert 0 <= found["r@1"] <= 1
    answer(capsys, "retrieve", checkpoint, *data, "--recipe", "iic", "--clips", "1")
    answer(capsys, "probe", checkpoint, *data, "--clips", "1", "--crops", "1", "--epochs", "1")
    tuned = answer(
        capsys, "finetune", checkpoint, *data, "--clips", "1", "--crops", "1", "--epochs", "1",
        "--layer-decay", "0.5",
    )  # fmt: skip
    assert tuned["settings"]["layer_decay"] == 0.5
    video = next(Path("data").rglob("*.mp4"))
    shutil.copy(video, tmp_path / "query.mp4")
    searched = answer(capsys, "search", str(tmp_path / "query.mp4"), *data, "--checkpoint", checkpoint,
                      "--out", str(tmp_path))  # fmt: skip
    assert searched["queries"]


def test_export(trained, capsys, tmp_path):
    name, checkpoint = trained
    pytest.importorskip("safetensors")
    answer(capsys, "export", checkpoint, "--to", "safetensors", "--out", str(tmp_path / "net.safetensors"))
    from safetensors.torch import load_file

    state = load_checkpoint(checkpoint)["encoders"]["rgb"]
    exported = load_file(tmp_path / "net.safetensors")
    assert all(torch.equal(exported[f"rgb.{key}"], value) for key, value in state.items())
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    answer(capsys, "export", checkpoint, "--to", "onnx", "--out", str(tmp_path / "net.onnx"))
    clips = torch.randn(3, 3, 8, 16, 16)
    features, _ = onnxruntime.InferenceSession(str(tmp_path / "net.onnx")).run(None, {"clips": clips.numpy()})
    with torch.no_grad():
        ours = load_encoders(checkpoint)[1]["rgb"].features(clips)
    torch.testing.assert_close(torch.from_numpy(features), ours, atol=1e-4, rtol=1e-4)


def test_doctor_and_explain(trained, capsys):
    name, _ = trained
    explained = answer(capsys, "explain", f"{name}.toml")
    assert NETWORKS[name][0] in json.dumps(explained)
    found = answer(
        capsys, "doctor", "data/index.csv", "--config", f"{name}.toml", "--seconds", "0.5", "--device", "cpu"
    )
    assert found["breakdown"]["stage_s_per_step"]["step"] > 0


def test_the_doctor_reports_a_network_that_cannot_be_built(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    Path("bad.toml").write_text(RECIPE.format(arch="net.py:refuses", args="{}", out="bad"))
    with pytest.raises(SystemExit):
        main(["doctor", "data/index.csv", "--config", "bad.toml", "--seconds", "0", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert any(f["level"] == "error" and "T must be 16, got 8" in f["text"] for f in found["findings"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model.args.dept", "3"],
            "--model.args.dept: expected --model.args.NAME VALUE with one of the names .*depth",
        ),
        (["--model.args", "3"], "--model.args: expected --model.args.NAME VALUE"),
        (["--model.arch", "nets:Tokens"], "model.arch 'nets:Tokens': there is no module 'nets'"),
    ],
)
def test_wrong_options_are_answered(folder, monkeypatch, capsys, words, message):
    monkeypatch.chdir(folder)
    assert main(["pretrain", "own.toml", "--run.out", "other", *words]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert not Path("other").exists()


NOTHING_TO_TRAIN = """
import torch
from torch import nn
from net import Tokens


class Without(nn.Module):
    def forward(self, clips):
        return clips.mean((3, 4)).flatten(1)


def fixed() -> nn.Module:
    return Tokens().requires_grad_(False)


class Apart(Tokens):
    @torch.no_grad()
    def forward(self, clips):
        return super().forward(clips)
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Without", "expected a network with parameters to train, got 0 parameters"),
        ("fixed", r"expected a network with parameters to train, got \d+ parameters, all with requires_grad = False"),
        ("Apart", "expected features with a gradient, .* got features without one"),
    ],
)
def test_a_network_that_cannot_be_trained_is_refused_and_leaves_no_folder(folder, monkeypatch, capsys, name, message):
    monkeypatch.chdir(folder)
    Path("untrained.py").write_text(NOTHING_TO_TRAIN)
    Path("untrained.toml").write_text(RECIPE.format(arch=f"untrained.py:{name}", args="{}", out="untrained"))
    assert main(["pretrain", "untrained.toml"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(f"model.arch '.*untrained.py:{name}': {message}", error), error
    assert not Path("untrained").exists()


@pytest.mark.parametrize("trained", ["own"], indirect=True)
def test_features_that_are_not_finite_are_not_ranked(trained, capsys, tmp_path):
    payload = load_checkpoint(trained[1])
    source = "from net import Tokens\n\n\nclass Nan(Tokens):\n    def forward(self, clips):\n"
    source += "        return super().forward(clips) * (float('nan') if clips.any() else 1)\n"
    Path("nan.py").write_text(source)
    payload["config"]["model"]["arch"] = "nan.py:Nan"
    torch.save(payload, tmp_path / "nan.pt")
    assert main(["retrieve", str(tmp_path / "nan.pt"), "--index", "data/index.csv", "--clips", "1"]) == 2
    assert "expected finite features, but those of" in " ".join(capsys.readouterr().err.split())


def test_layer_decay_and_fixed_parameters_in_finetuning(folder):
    model = ModelConfig(f"{folder}/net.py:Tokens", feature_dim=8)
    settings = ClassifierConfig(lr=1.0, backbone_lr=0.8, layer_decay=0.5)
    classifier = Classifier(build_encoder(model, DataConfig(frames=8, size=16)), 3, settings)
    backbone, groups = classifier.encoder.backbone, classifier.parameter_groups(settings)
    assert [group["lr"] for group in groups] == [1.0, 0.8, 0.4, 0.2, 0.1]
    assert any(p is backbone.token for p in groups[-1]["params"]) and backbone.token.requires_grad
    assert not backbone.fixed.requires_grad


def test_a_checkpoint_whose_network_is_gone_says_what_to_do(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    if not Path("own").exists():
        assert main(["pretrain", "own.toml"]) == 0
    payload = load_checkpoint("own/checkpoints/last.pt")
    payload["config"]["model"]["arch"] = "gone.networks:Tokens"
    torch.save(payload, tmp_path / "gone.pt")
    with pytest.raises(
        CheckpointError, match=r"gone.pt': model.arch 'gone.networks:Tokens': .* 'gone'; install it, run the"
    ):
        load_encoders(tmp_path / "gone.pt")
    payload["config"]["model"]["arch"] = "/gone/networks.py:Tokens"
    torch.save(payload, tmp_path / "gone.pt")
    with pytest.raises(
        CheckpointError, match=r"'/gone/networks.py', which does not exist; run the command in a folder"
    ):
        load_encoders(tmp_path / "gone.pt")
