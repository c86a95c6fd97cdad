"""The video transformer: compared with torch's own layers, its positions, and its arguments."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cpr_fast.config import DataConfig, ModelConfig
from cpr_fast.errors import InputError
from cpr_fast.models import build_encoder
from cpr_fast.models.vit import Block, VideoTransformer, sincos

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"depth": 2, "width": 24, "heads": 3, "tubelet": [2, 8, 8]}
DATA = DataConfig(frames=4, size=16)


def small(**args) -> VideoTransformer:
    torch.manual_seed(0)
    return VideoTransformer(**{"clip_frames": 4, "clip_size": 16} | SMALL | args)


def test_a_block_is_that_of_torch():
    torch.manual_seed(0)
    block = Block(24, 3, 4.0, 0.0).eval()
    theirs = nn.TransformerEncoderLayer(24, 3, 96, 0.0, "gelu", batch_first=True, norm_first=True).eval()
    names = {
        "self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj.": "attention.out.", "linear1.": "mlp.0.",
        "linear2.": "mlp.2.", "norm1.": "norm1.", "norm2.": "norm2.",
    }  # fmt: skip
    ours = block.state_dict()
    theirs.load_state_dict({t + kind: ours[o + kind] for t, o in names.items() for kind in ("weight", "bias")})
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(block(x), theirs(x))


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_the_network_is_its_parts_in_order(class_token, positions):
    network, clips = small(class_token=class_token, positions=positions).eval(), torch.randn(2, 3, 4, 16, 16)
    cuboids = clips.unfold(2, 2, 2).unfold(3, 8, 8).unfold(4, 8, 8).permute(0, 2, 3, 4, 1, 5, 6, 7).reshape(2, 8, -1)
    x = cuboids @ network.embed.weight.flatten(1).T + network.embed.bias + network.positions
    if class_token:
        x = torch.cat([network.class_token.expand(2, 1, 24), x], 1)
    for block in network.blocks:
        x = block(x)
    x = network.norm(x)
    torch.testing.assert_close(network(clips), x[:, 0] if class_token else x.mean(1))
    trained = {name for name, _ in network.named_parameters()}
    assert ("positions" in trained, "class_token" in trained) == (positions == "learned", class_token)


def test_positions_are_sines_and_cosines_of_time_height_and_width():
    table = sincos([2, 3, 4], 26)
    assert table.shape == (24, 26) and (table[:, 24:] == 0).all()
    t, h, w = 1, 2, 3
    row = table[(t * 3 + h) * 4 + w]
    angles = [place * 10_000 ** (-i / 4) for place in (t, h, w) for i in range(4)]
    expected = [*map(math.sin, angles), *map(math.cos, angles), 0, 0]
    torch.testing.assert_close(row, torch.tensor(expected))
    assert len(torch.unique(table, dim=0)) == 24


def test_drop_path_skips_layers_in_training_only():
    network = small(depth=3, drop_path=0.5)
    assert [block.drop_path for block in network.blocks] == [0, 0.25, 0.5]
    clips = torch.randn(2, 3, 4, 16, 16)
    assert not torch.equal(network(clips), network(clips))
    assert torch.equal(network.eval()(clips), network(clips))
    block = Block(24, 3, 4.0, 0.5).train()
    x = torch.ones(4000, 1, 1)
    kept = block._dropped(x)
    assert set(kept.unique().tolist()) == {0.0, 2.0} and abs(kept.mean() - 1) < 0.1


def test_it_is_an_encoder_whose_clips_are_those_of_the_config():
    encoder = build_encoder(ModelConfig("vit", args=SMALL, head="unit", feature_dim=24), DATA)
    assert encoder.width == 24 and encoder.backbone.clip_frames == 4
    features = encoder(torch.randn(2, 3, 4, 16, 16))
    features.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters()) and features.shape == (2, 24)
    with pytest.raises(InputError, match=r"data.frames: expected 8, which model.arch 'vit' declares .*, got 4"):
        build_encoder(ModelConfig("vit", args=SMALL | {"clip_frames": 8}), DATA)
    with pytest.raises(InputError, match=r"model.feature_dim: expected 24, the width .* of 'vit', because .* got 128"):
        build_encoder(ModelConfig("vit", args=SMALL, head="unit"), DATA)
    with pytest.raises(ValueError, match=r"clips: expected \[N, 3, 4, 16, 16\], got \[2, 3, 6, 16, 16\]"):
        encoder(torch.randn(2, 3, 6, 16, 16))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"tubelet": [3, 8, 8]}, r"model.args.tubelet: expected three numbers that divide the 4 frames, .*\[3, 8, 8\]"),
        ({"tubelet": [2, 8]}, r"model.args.tubelet: .*got \[2, 8\]"),
        ({"heads": 5}, "model.args: .* got depth 2, width 24 and heads 5"),
        ({"depth": 0}, "model.args: .* got depth 0"),
        ({"positions": "x"}, "model.args.positions: expected 'sincos' or 'learned', got 'x'"),
        ({"drop_path": 1}, r"model.args.drop_path: expected a probability in \[0, 1\), got 1"),
        ({"deep": 1}, "model.args.deep: no argument of model.arch 'vit'; did you mean 'depth'"),
    ],
)
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(InputError, match=message):
        build_encoder(ModelConfig("vit", args=SMALL | args), DATA)


def test_the_default_is_vit_s():
    with torch.device("meta"):
        network = VideoTransformer(16, 112)
    assert sum(p.numel() for p in network.parameters()) == 12 * 1_774_464 + 768 + 3 * 2 * 16 * 16 * 384 + 384
