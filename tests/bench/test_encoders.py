"""The page of all encoders: a difference is shown as one, and the recipes are those of `cpr-fast pretrain`."""

import dataclasses
import re

import pytest

pytest.importorskip("onnxruntime")

from cpr_fast.config import load
from cpr_fast.config.sections import CONVOLUTIONAL, FACTORIES

ROW = {"network": "r3d", "clip": "8x64x64", "parameters": 903_984, "features": 128, "first_loss": 1.0, "last_loss": 0.5,
       "resumed_equal": True, "retrieve": 0.25, "probe": 0.5, "finetune": 0.75, "search": 1.0, "safetensors": True,
       "hub": True, "modeling": True, "onnx_error": 3e-7, "cpu_s": 8.0, "commit": "abc",
       "device": "a processor", "torch": "2", "torchvision": "0", "transformers": "5"}  # fmt: skip


@pytest.fixture(scope="module")
def script(bench_script):
    return bench_script("encoders")


def cells(text: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith("| r3d"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("key", ["resumed_equal", "safetensors", "hub", "modeling"])
def test_a_difference_is_named(script, key):
    assert "DIFFERENT" not in script.page([ROW])
    assert len(re.findall("DIFFERENT", script.page([ROW | {key: False}]))) == 1
    assert cells(script.page([ROW]))[6:9] == ["25", "50", "75"]
    assert "Not measured yet: s3d, s3dg" in script.page([ROW])


def test_all_shipped_networks_have_a_recipe(script, tmp_path):
    assert {*CONVOLUTIONAL, *FACTORIES} <= {network.arch for network in script.NETWORKS}
    for network in script.NETWORKS:
        recipe = tmp_path / "net.toml"
        recipe.write_text(script.RECIPE.format(**dataclasses.asdict(network) | {"name": "net"}))
        config = load(recipe)
        assert config.model.arch == network.arch and config.data.frames == network.frames
        assert [cycle.mining for cycle in config.schedule.cycles] == ["none", "none", "cascade"]


def test_the_page_names_the_packages_that_the_rows_used(script):
    """A call that measures some networks records the versions of their packages only."""
    other = {key: value for key, value in ROW.items() if key not in ("torchvision", "transformers")}
    text = script.page([ROW | {"torchvision": "7.0"}, other])
    assert "torchvision 7.0, transformers 5" in text
