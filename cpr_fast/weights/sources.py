"""The layouts of published checkpoints: CoCLR and CPR, IIC, and the S3D of MIL-NCE.

A layout gives the name in the file of every tensor of our `Encoder`, and everything that the network needs besides its
weights: the architecture and the clips it was trained on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from cpr_fast.config import ClassifierConfig, DataConfig, MemoryConfig, ModelConfig, load
from cpr_fast.config.recipes import find_config
from cpr_fast.models.s3d import scaled
from cpr_fast.weights.reading import CheckpointError

Source = Literal["coclr", "iic", "milnce"]
Names = Callable[[str], tuple[str, ...]]  # name of a tensor of `Encoder` -> its names in the file; () if it has none

EXPECTED = "expected a checkpoint of CoCLR or CPR (encoder_q.*), IIC (conv1.*, conv5*), or MIL-NCE's S3D (mixed_5c.*)"


@dataclass(frozen=True)
class Layout:
    """What a published file holds.

    Attributes:
        encoders: The encoders of the file: "encoder_q", and for CoCLR and CPR also "encoder_k" and "sampler".
        is_backbone: Whether a name in the file belongs to a backbone, of which no tensor may be left out.
        views: The views that the network serves, if the user names none.
        memory: The kind of memory it was trained with.
        finetune: How it was finetuned.
    """

    source: Source
    model: ModelConfig
    data: DataConfig
    encoders: dict[str, Names]
    is_backbone: Callable[[str], bool]
    views: tuple[str, ...] = ("rgb",)
    memory: MemoryConfig = MemoryConfig()
    finetune: ClassifierConfig = ClassifierConfig()


def layout_of(tensors: Mapping[str, Tensor], modality: str | None, path: str | Path) -> Layout:
    """Returns the layout of a file with these tensors.

    Args:
        modality: The second input beside RGB of IIC's training ("res", "u", "v", "rgb"), if the file says it.
    Raises:
        CheckpointError: No layout has such names, or the first convolution is missing or has another shape.
    """
    marks = {"coclr": ("encoder_q.", "backbone."), "milnce": ("mixed_5c.",), "iic": ("conv5.block1.", "conv5b.")}
    for source, prefixes in marks.items():
        if any(key.startswith(prefixes) for key in tensors):
            if source == "iic":
                return _iic(tensors, modality, path)
            return _coclr(tensors, path) if source == "coclr" else _milnce(tensors, path)
    raise CheckpointError(f"checkpoint {str(path)!r} holds {some(tensors)}; {EXPECTED}")


def some(names: Mapping[str, Tensor] | list[str]) -> str:
    """Returns the first names, and how many there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f", … ({len(names)} tensors)" if len(names) > 3 else "") if names else "no tensor"


def _stem(
    tensors: Mapping[str, Tensor], names: tuple[str, ...], rest: tuple[int | None, ...], path: str | Path
) -> Tensor:
    """Returns the weight [C, *rest] of the first convolution, whose number of channels C is the network's width. None
    in `rest` stands for any number."""
    weight = next((tensors[name] for name in names if name in tensors), None)
    where = f"checkpoint {str(path)!r}"
    if weight is None:
        raise CheckpointError(f"{where}: expected the tensor {names[0]}, but the file holds {some(tensors)}")
    fits = weight.dim() == 5 and all(want in (None, got) for want, got in zip(rest, weight.shape[1:], strict=True))
    if not fits or not len(weight):
        wanted = ", ".join("any" if number is None else str(number) for number in rest)
        raise CheckpointError(f"{where}: {names[0]}: expected shape [64 x width, {wanted}], got {list(weight.shape)}")
    return weight


# CoCLR's S3D registers every layer twice: by its name, and by its place in a block.
_BLOCKS = {
    "block1": ("Conv_1a",),
    "block2": ("MaxPool_2a", "Conv_2b", "Conv_2c"),
    "block3": ("MaxPool_3a", "Mixed_3b", "Mixed_3c"),
    "block4": ("MaxPool_4a", "Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f"),
    "block5": ("MaxPool_5a", "Mixed_5b", "Mixed_5c"),
}
_PLACES = {name: f"{block}.{i}" for block, names in _BLOCKS.items() for i, name in enumerate(names)}
# Positions in the published nn.Sequential, which also counts the pool and the ReLU.
_HEAD = {"head.0.": "2.", "head.2.": "4."}


def coclr_names(ours: str, role: str, backbone: str | None = None) -> tuple[str, ...]:
    """Returns the names that CoCLR and CPR give a tensor of `Encoder`: two for the backbone, one for the head.

    Args:
        role: "encoder_q", "encoder_k" or "sampler", each nn.Sequential(S3D, pool, conv, ReLU, conv).
        backbone: The prefix of the backbone; None means that of `role`.
    """
    for prefix, place in _HEAD.items():
        if ours.startswith(prefix):
            return (f"{role}.{place}{ours.removeprefix(prefix)}",)
    layer, rest = ours.removeprefix("backbone.").split(".", 1)
    prefix = f"{role}.0." if backbone is None else backbone
    return tuple(f"{prefix}{place}.{rest}" for place in (layer, _PLACES[layer]))


def _coclr(tensors: Mapping[str, Tensor], path: str | Path) -> Layout:
    """Returns the layout of the models of `main_nce.py` and `main_coclr.py`, or the `backbone` of a classifier."""
    classifier = not any(key.startswith("encoder_q.") for key in tensors)
    backbones = (
        {"encoder_q": "backbone."} if classifier else {r: f"{r}.0." for r in ("encoder_q", "encoder_k", "sampler")}
    )
    held = {role: prefix for role, prefix in backbones.items() if any(key.startswith(prefix) for key in tensors)}
    names: dict[str, Names] = {
        role: lambda ours, role=role, prefix=prefix: coclr_names(ours, role, prefix) for role, prefix in held.items()
    }
    query = names.get("encoder_q") or (lambda ours: coclr_names(ours, "encoder_q"))
    stem = _stem(tensors, query("backbone.Conv_1a.conv1.weight"), (3, 1, 7, 7), path)
    gating = any(".gating_b0." in key for key in tensors)
    last = tensors.get("encoder_q.4.weight")
    dim = ModelConfig().feature_dim if last is None or not last.dim() else len(last)
    model = ModelConfig("s3dg" if gating else "s3d", len(stem) / 64, feature_dim=dim)
    return Layout("coclr", model, DataConfig(), names, lambda key: key.startswith(tuple(backbones.values())))


def _iic(tensors: Mapping[str, Tensor], modality: str | None, path: str | Path) -> Layout:
    """IIC's R3D, R(2+1)D or C3D, whose names are ours. One network serves RGB and, unless it was trained with flow,
    frame residuals."""
    split = any(".spatial_conv." in key for key in tensors)
    arch = "c3d" if any(key.startswith("conv5b.") for key in tensors) else "r21d" if split else "r3d"
    name, rest = {
        "r3d": ("conv1.temporal_spatial_conv.weight", (3, 3, 7, 7)),
        "r21d": ("conv1.temporal_conv.weight", (None, 3, 1, 1)),
        "c3d": ("conv1.weight", (3, 3, 3, 3)),
    }[arch]
    width = len(_stem(tensors, (name,), rest, path)) / 64
    model = ModelConfig(arch, width, head="pooled", feature_dim=scaled(512, width), shared=True)
    return Layout(
        "iic",
        model,
        DataConfig(frames=16, size=112, augment="iic"),
        {"encoder_q": lambda ours: (ours.removeprefix("backbone."),)},
        lambda key: not key.startswith("linear."),
        ("rgb",) if modality in ("rgb", "u", "v") else ("rgb", "residual"),
        MemoryConfig(kind="bank"),
        load(find_config("table5_iic")).finetune,
    )


_MILNCE_PLACES = {"Conv_1a.": "conv1.", "Conv_2b.": "conv_2b.", "Conv_2c.0.": "conv_2c.", "Conv_2c.1.": "gating."}
_MILNCE_BRANCHES = {
    "branch0.0.": "conv_b0.",
    "branch1.0.": "conv_b1_a.",
    "branch1.1.": "conv_b1_b.",
    "branch2.0.": "conv_b2_a.",
    "branch2.1.": "conv_b2_b.",
    "branch3.1.": "conv_b3_b.",
}


def _milnce(tensors: Mapping[str, Tensor], path: str | Path) -> Layout:
    """Returns the layout of the video network of S3D_HowTo100M; its text module and the projection to text are not
    used.

    Its pixels are 0..1 without normalisation. Our network gets ImageNet's normalisation, which its stem undoes.
    """
    stem = _stem(tensors, ("conv1.conv1.weight",), (24, 2, 4, 4), path)
    model = ModelConfig("s3d_milnce", len(stem) / 64)
    unused = ("fc.", "text_module.")
    return Layout(
        "milnce", model, DataConfig(size=224), {"encoder_q": _milnce_names}, lambda key: not key.startswith(unused)
    )


def _milnce_names(ours: str) -> tuple[str, ...]:
    if ours.startswith("head."):
        return ()
    name = ours.removeprefix("backbone.")
    if name.startswith("Mixed_"):
        block, rest = name.split(".", 1)
        for branch, theirs in _MILNCE_BRANCHES.items():
            if rest.startswith(branch):
                rest = theirs + rest.removeprefix(branch)
        name = f"{block.lower()}.{rest}"
    for place, theirs in _MILNCE_PLACES.items():
        if name.startswith(place):
            name = theirs + name.removeprefix(place)
    return (re.sub(r"\.(conv|bn)\.", r".\g<1>1.", name),)  # a convolution that is not split has the number 1 there
