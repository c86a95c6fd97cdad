"""The blocks and layers of a backbone: learning rates by layer, activation checkpointing, running statistics."""

from __future__ import annotations

import re

import pytest
from support import own_networks
from torch import nn

from cpr_fast.config import DataConfig, ModelConfig
from cpr_fast.config.sections import CONVOLUTIONAL
from cpr_fast.models import backbone_layers, build_encoder, named_blocks, running_statistics

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = DataConfig(frames=8, size=32)


@pytest.mark.parametrize("arch", CONVOLUTIONAL)
def test_the_layers_of_the_convolutional_networks_are_their_numbered_children(arch):
    backbone = build_encoder(ModelConfig(arch, 0.125)).backbone
    assert [name for name, _ in named_blocks(backbone)] == [name for name, _ in backbone.named_children()]
    layers: dict[str, list[nn.Parameter]] = {}
    for name, child in backbone.named_children():
        number = re.search(r"\d\w*$", name)
        layers.setdefault(number[0] if number else name, []).extend(child.parameters())
    expected = [parameters for parameters in layers.values() if parameters]
    found = backbone_layers(backbone)
    assert [[id(p) for p in layer] for layer in found] == [[id(p) for p in layer] for layer in expected]


def test_every_trained_parameter_of_a_network_is_in_one_layer(tmp_path):
    file = own_networks.write(tmp_path)
    backbone = build_encoder(ModelConfig(f"{file}:Tokens"), DATA).backbone
    layers = backbone_layers(backbone)
    assert [len(layer) for layer in layers] == [3, 4, 4, 1]  # token and stem; two blocks; the bias of the tied layer
    assert layers[0][0] is backbone.token and layers[1][2] is backbone.tied.weight
    found = [id(p) for layer in layers for p in layer]
    assert sorted(found) == sorted(id(p) for p in backbone.parameters() if p is not backbone.fixed)


def test_lists_and_frames_are_divided_into_their_blocks():
    inner = nn.Module()
    inner.layer = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
    network = nn.Module()
    network.model = nn.Module()
    network.model.embeddings, network.model.encoder, network.model.norm = nn.Linear(2, 2), inner, nn.LayerNorm(2)
    names = [name for name, _ in named_blocks(network)]
    layer = [f"model.encoder.layer.{i}" for i in range(3)]
    assert names == ["model.embeddings", *layer, "model.norm"]
    assert len(backbone_layers(network)) == 5
    assert backbone_layers(nn.ReLU()) == []


def test_only_batch_norm_has_running_statistics(tmp_path):
    """Other buffers are constants: the mean of three equal numbers would not always be that number."""
    file = own_networks.write(tmp_path)
    assert running_statistics(build_encoder(ModelConfig(f"{file}:Tokens"), DATA)) == []
    normed = running_statistics(build_encoder(ModelConfig(f"{file}:Normed"), DATA))
    assert [tuple(tensor.shape) for tensor in normed] == [(8,)] * 4
    milnce = build_encoder(ModelConfig("s3d_milnce", 0.125))
    names = {name for name, _ in milnce.named_buffers() if name.rpartition(".")[2] in ("running_mean", "running_var")}
    assert len(running_statistics(milnce)) == len(names)
