"""The video networks of torchvision as backbones, with random weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cpr_fast.config import DataConfig, ModelConfig
from cpr_fast.errors import InputError
from cpr_fast.models import backbone_layers, build_encoder

video = pytest.importorskip("torchvision.models.video", reason="needs torchvision")
pytestmark = pytest.mark.usefixtures("one_thread")

# Name: attribute of the head, features, frames and size of a clip, layers.
NETWORKS = {
    "r3d_18": ("fc", 512, 8, 32, 5),
    "mc3_18": ("fc", 512, 8, 32, 5),
    "r2plus1d_18": ("fc", 512, 8, 32, 5),
    "s3d": ("classifier", 1024, 16, 224, 12),
    "swin3d_t": ("head", 768, 8, 64, None),
    "mvit_v2_s": ("head", 768, 16, 224, None),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if v[3] > 64 else n for n, v in NETWORKS.items()]
)
def test_the_head_is_removed_and_the_features_are_what_it_received(name):
    head, width, frames, size, layers = NETWORKS[name]
    torch.manual_seed(0)
    encoder = build_encoder(
        ModelConfig(f"torchvision.models.video:{name}"), DataConfig(frames=frames, size=size)
    ).eval()
    assert encoder.width == width and isinstance(getattr(encoder.backbone, head), nn.Identity)
    torch.manual_seed(0)
    whole = getattr(video, name)().eval()
    received = []
    getattr(whole, head).register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    clips = torch.randn(1, 3, frames, size, size)
    with torch.no_grad():
        whole(clips)
        features = encoder.features(clips)
    torch.testing.assert_close(features, received[0].flatten(2).mean(2) if name == "s3d" else received[0])
    found = backbone_layers(encoder.backbone)
    assert layers is None or len(found) == layers
    assert sum(map(len, found)) == len(list(encoder.backbone.parameters()))


def test_clips_that_a_network_refuses_are_named():
    with pytest.raises(
        InputError, match=r"model.arch '.*:mvit_v2_s': the network does not take clips \[1, 3, 8, 32, 32\]"
    ):
        build_encoder(ModelConfig("torchvision.models.video:mvit_v2_s"), DataConfig(frames=8, size=32))
