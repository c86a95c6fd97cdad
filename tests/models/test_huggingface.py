"""Video models of Hugging Face transformers as backbones, with random weights and from a local folder."""

from __future__ import annotations

import json

import pytest
import torch

from cpr_fast.config import DataConfig, ModelConfig
from cpr_fast.errors import InputError
from cpr_fast.models import backbone_layers, build_encoder, huggingface

pytestmark = pytest.mark.usefixtures("one_thread")

ARCH = "cpr_fast.models.huggingface:encoder"
DATA = DataConfig(frames=4, size=32)
SIZES = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "tubelet_size": 2}
VIDEOMAE = {
    "model_type": "videomae",
    "image_size": 32,
    "patch_size": 16,
    "num_frames": 4,
    "intermediate_size": 48,
} | SIZES
VJEPA2 = {"model_type": "vjepa2", "crop_size": 32, "patch_size": 16, "frames_per_clip": 4, "pred_hidden_size": 24,
          "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1} | SIZES  # fmt: skip


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="needs transformers")


def build(data=DATA, **args):
    return build_encoder(ModelConfig(ARCH, args=args), data)


@pytest.mark.parametrize("settings", [VIDEOMAE, VJEPA2], ids=["videomae", "vjepa2"])
def test_a_model_with_random_weights_is_trained(transformers, settings):
    encoder = build(config=settings)
    assert encoder.width == 24
    features = encoder(torch.randn(2, 3, 4, 32, 32))
    features.square().sum().backward()
    layers = backbone_layers(encoder.backbone)
    assert len(layers) >= 3 and sum(map(len, layers)) == sum(p.requires_grad for p in encoder.backbone.parameters())
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


def test_a_folder_gives_the_tokens_and_the_normalisation_of_its_model(transformers, tmp_path):
    model = transformers.VideoMAEModel(
        transformers.VideoMAEConfig(**{k: v for k, v in VIDEOMAE.items() if k != "model_type"})
    )
    model.eval().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    encoder = build(path=str(tmp_path)).eval()
    pixels = torch.rand(2, 3, 4, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        tokens = model((pixels.transpose(1, 2) - 0.5) / 0.25).last_hidden_state
        torch.testing.assert_close(encoder.features((pixels - mean) / std), tokens.mean(1))
    with pytest.raises(
        InputError, match=r"data.frames: expected 4, which model.arch .* declares \(clip_frames\), got 8"
    ):
        build(DataConfig(frames=8, size=32), path=str(tmp_path))


def test_a_folder_that_lacks_weights_is_refused(transformers, tmp_path):
    from safetensors.torch import load_file, save_file

    encoder = build(config=VIDEOMAE)
    encoder.backbone.model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in tensors if "layer.1." in name)
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=rf"model.args.path: expected all weights of VideoMAEModel .* missing: {lost}"):
        build(path=str(tmp_path))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "model.args: expected either path or config, got neither"),
        ({"path": "x", "config": VIDEOMAE}, "model.args: expected either path or config, got both"),
        (
            {"path": "no_folder"},
            "model.args.path: expected a folder with the config.json .* 'no_folder' does not exist",
        ),
        ({"config": {"hidden_size": 24}}, "model.args.config: expected model_type, such as 'videomae'"),
        ({"config": {"model_type": "videomea"}}, "model.args.config: .*videomea"),
    ],
)
def test_wrong_arguments_are_named(transformers, args, message):
    with pytest.raises(InputError, match=message):
        build(**args)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(huggingface, "is_installed", lambda name: False)
    with pytest.raises(
        InputError, match=f"model.arch '{ARCH}': the package transformers is not installed: pip install"
    ):
        build(config=VIDEOMAE)
