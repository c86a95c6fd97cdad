"""Imports published checkpoints: CoCLR and CPR (InfoNCE, UberNCE, CoCLR), IIC, and the S3D of MIL-NCE.

Each source maps its tensor names to those of our `Encoder`. Tensors without a counterpart are reported, and a file
without any tensor of a backbone is refused. Letters: K memory slots, D feature width, V views.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cpr_fast.config import Config, DataConfig, ModelConfig
from cpr_fast.models import build_encoder
from cpr_fast.models.s3d import scaled
from cpr_fast.weights.checkpoint import save_checkpoint
from cpr_fast.weights.reading import CheckpointError, read_torch

Source = Literal["coclr", "iic", "milnce"]

# CoCLR's S3D registers every layer twice: by its name, and by its place in a block.
_BLOCKS = {
    "block1": ("Conv_1a",),
    "block2": ("MaxPool_2a", "Conv_2b", "Conv_2c"),
    "block3": ("MaxPool_3a", "Mixed_3b", "Mixed_3c"),
    "block4": ("MaxPool_4a", "Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f"),
    "block5": ("MaxPool_5a", "Mixed_5b", "Mixed_5c"),
}
COCLR_ALIASES = {f"{block}.{i}.": f"{name}." for block, names in _BLOCKS.items() for i, name in enumerate(names)}
COCLR_HEAD = {"2.": "head.0.", "4.": "head.2."}  # after the pool and the ReLU of their nn.Sequential
_EXPECTED = "expected a checkpoint of CoCLR or CPR (encoder_q.*), IIC (conv1.*, conv5*), or MIL-NCE's S3D (mixed_5c.*)"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Match:
    """One encoder of a file, converted to the names of `Encoder`.

    state: a complete state_dict.
    matched, missing: the names in `state` whose tensors came from the file, and the other names in `state`.
    used: the names in the file that were used.
    """

    state: dict[str, Tensor]
    matched: list[str]
    missing: list[str]
    used: set[str]


def import_checkpoint(path: str | Path, out: str | Path, *, view: str = "rgb") -> dict[str, Any]:
    """Converts a published checkpoint to ours, for `model.init`, retrieval, probe, finetune and export.

    Tensors that the file lacks (such as a head) are those of a new encoder initialised with seed 0.

    Args:
        view: "rgb" or "flow", the view of the file's (query) encoder. An encoder `sampler` in the file has the other
            view.
    Returns:
        `checkpoint`, `source`, `arch`; `encoders` {name in the file: its view, number of tensors matched, names
        missing}; `unused`, the names in the file that were not used.
    Raises:
        CheckpointError: the file is damaged or of an unknown source, a tensor has another shape, or none matched.
    """
    tensors, about = _read(Path(path))
    source = _source_of(tensors, path)
    model, roles = _SOURCES[source](tensors, path)
    matches = {role: _match(names, tensors, model, path) for role, names in roles.items()}
    memory, memory_names = _memory(tensors)
    used = memory_names.union(*(match.used for match in matches.values()))
    other = {"rgb": "flow", "flow": "rgb"}[view]
    views = {"encoder_q": view, "sampler": other}
    data = {"coclr": DataConfig(), "iic": DataConfig(frames=16, size=112), "milnce": DataConfig(size=224)}[source]
    payload: dict[str, Any] = {
        "config": Config(data=data, model=model).to_dict(),
        "view": view,
        "encoders": {views[role]: match.state for role, match in matches.items() if role in views},
        "cycle_state": {"memory": memory} if memory else {},
        "imported": {"source": source, "file": Path(path).name, **about},
    }
    if "encoder_k" in matches:
        payload["cycle_state"]["key"] = matches["encoder_k"].state
    save_checkpoint(out, payload)
    encoders = {
        role: {"view": views.get(role, view), "matched": len(match.matched), "missing": match.missing}
        for role, match in matches.items()
    }
    unused = sorted(tensors.keys() - used)
    return {"checkpoint": str(out), "source": source, "arch": model.arch, "encoders": encoders, "unused": unused}


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors of a file, without the prefix of DataParallel, and the plain values saved with them."""
    payload = read_torch(path, expected=_EXPECTED)
    if not isinstance(payload, Mapping):
        raise CheckpointError(f"checkpoint {str(path)!r} holds a {type(payload).__name__}; {_EXPECTED}")
    state = next((payload[key] for key in ("state_dict", "model") if isinstance(payload.get(key), Mapping)), payload)
    tensors = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    about = {key: payload[key] for key in ("epoch", "iteration", "best_acc") if key in payload and payload is not state}
    return tensors, {key: value.item() if hasattr(value, "item") else value for key, value in about.items()}


def _source_of(tensors: Mapping[str, Tensor], path: str | Path) -> Source:
    marks = {"coclr": ("encoder_q.", "backbone."), "milnce": ("mixed_5c.",), "iic": ("conv5.block1.", "conv5b.")}
    for source, prefixes in marks.items():
        if any(key.startswith(prefixes) for key in tensors):
            return source
    raise CheckpointError(f"checkpoint {str(path)!r} holds {_some(tensors)}; {_EXPECTED}")


Roles = dict[str, dict[str, str]]  # encoder of a file -> {its tensor name: ours}


def _coclr(tensors: Mapping[str, Tensor], path: str | Path) -> tuple[ModelConfig, Roles]:
    """Maps CoCLR and CPR: encoders `encoder_q`, `encoder_k` and `sampler`, each nn.Sequential(S3D, pool, conv, ReLU,
    conv); or the `backbone` of a classifier."""
    roles: Roles = {}
    for key in tensors:
        role, _, rest = key.partition(".")
        if role == "backbone":
            role, rest = "encoder_q", f"0.{rest}"
        if role in ("encoder_q", "encoder_k", "sampler") and (name := _coclr_name(rest)):
            roles.setdefault(role, {})[key] = name
    ours = {name: key for key, name in roles.get("encoder_q", {}).items()}
    stem, last = ours.get("backbone.Conv_1a.conv1.weight"), ours.get("head.2.weight")
    if stem is None:
        raise CheckpointError(
            f"checkpoint {str(path)!r}: no tensor of an S3D's Conv_1a; the file holds {_some(tensors)}"
        )
    gating = any(".gating_b0." in name for name in ours)
    width = len(tensors[stem]) / 64
    feature_dim = ModelConfig().feature_dim if last is None else len(tensors[last])
    return ModelConfig("s3dg" if gating else "s3d", width, feature_dim=feature_dim), roles


def _coclr_name(rest: str) -> str | None:
    for theirs, ours in COCLR_HEAD.items():
        if rest.startswith(theirs):
            return ours + rest.removeprefix(theirs)
    if not rest.startswith("0."):
        return None
    rest = rest.removeprefix("0.")
    for alias, name in COCLR_ALIASES.items():
        if rest.startswith(alias):
            return f"backbone.{name}{rest.removeprefix(alias)}"
    return f"backbone.{rest}"


def _iic(tensors: Mapping[str, Tensor], path: str | Path) -> tuple[ModelConfig, Roles]:
    """Maps IIC's R3D, R(2+1)D or C3D, whose names are ours; one network is trained on RGB and on frame residuals."""
    stems = {"r3d": "conv1.temporal_spatial_conv", "r21d": "conv1.temporal_conv", "c3d": "conv1"}
    found = [(arch, tensors[f"{name}.weight"]) for arch, name in stems.items() if f"{name}.weight" in tensors]
    if not found:
        raise CheckpointError(
            f"checkpoint {str(path)!r}: no tensor of the first convolution; it holds {_some(tensors)}"
        )
    arch, stem = found[0]
    width = len(stem) / 64
    model = ModelConfig(arch, width, head="pooled", feature_dim=scaled(512, width))
    return model, {"encoder_q": {key: f"backbone.{key}" for key in tensors if not key.startswith("linear.")}}


_MILNCE_BRANCHES = {
    "conv_b0": "branch0.0",
    "conv_b1_a": "branch1.0",
    "conv_b1_b": "branch1.1",
    "conv_b2_a": "branch2.0",
    "conv_b2_b": "branch2.1",
    "conv_b3_b": "branch3.1",
}
_MILNCE_PLAIN = ("Conv_1a", "Conv_2b", *(f"branch{i}.0" for i in range(3)), "branch3.1")  # one convolution, no split


def _milnce(tensors: Mapping[str, Tensor], path: str | Path) -> tuple[ModelConfig, Roles]:
    """Maps the video network of S3D_HowTo100M; its text module and the projection to text are not used."""
    names = {key: name for key in tensors if (name := _milnce_name(key))}
    stem = tensors.get("conv1.conv1.weight")
    if stem is None or stem.shape[1] != 24:
        shape = None if stem is None else list(stem.shape)
        raise CheckpointError(
            f"checkpoint {str(path)!r}: conv1.conv1.weight: expected [64, 24, 2, 4, 4] (space to depth), got {shape}"
        )
    return ModelConfig("s3d_milnce", len(stem) / 64), {"encoder_q": names}


def _milnce_name(key: str) -> str | None:
    module, _, rest = key.partition(".")
    if module.startswith("mixed_"):
        branch, _, rest = rest.partition(".")
        place = f"{module.capitalize()}.{_MILNCE_BRANCHES.get(branch, branch)}"
    else:
        place = {"conv1": "Conv_1a", "conv_2b": "Conv_2b", "conv_2c": "Conv_2c.0", "gating": "Conv_2c.1"}.get(module)
        if place is None:
            return None
    if place.endswith(_MILNCE_PLAIN):
        rest = re.sub(r"^(conv|bn)1\b", r"\1", rest)
    return f"backbone.{place}.{rest}"


_SOURCES: dict[Source, Callable[[Mapping[str, Tensor], str | Path], tuple[ModelConfig, Roles]]] = {
    "coclr": _coclr,
    "iic": _iic,
    "milnce": _milnce,
}


def _match(names: Mapping[str, str], tensors: Mapping[str, Tensor], model: ModelConfig, path: str | Path) -> Match:
    """Builds a new encoder and fills it with the tensors of the file. `names` maps their names to ours."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = build_encoder(model).state_dict()
    found: dict[str, Tensor] = {}
    used = set()
    for theirs, ours in names.items():
        if ours not in state:
            continue
        value = tensors[theirs]
        if value.dim() == 5 and state[ours].dim() == 2:  # their head is 1x1x1 convolutions
            value = value.flatten(1)
        if value.shape != state[ours].shape:
            raise CheckpointError(
                f"checkpoint {str(path)!r}: {theirs}: expected shape {list(state[ours].shape)} ({model.arch} of "
                f"width {model.width:g}), got {list(value.shape)}"
            )
        if ours in found and not torch.equal(found[ours], value):
            raise CheckpointError(f"checkpoint {str(path)!r}: {theirs} differs from its alias of the same layer")
        found[ours] = value
        used.add(theirs)
    if not any(name.startswith("backbone.") for name in found):
        raise CheckpointError(f"checkpoint {str(path)!r}: no tensor matched {model.arch}; it holds {_some(tensors)}")
    missing = [name for name in state if name not in found]
    if any(name.startswith("backbone.") and not name.endswith("num_batches_tracked") for name in missing):
        log.warning("%s: %d tensors of the network are not in the file and stay random", path, len(missing))
    for name, value in found.items():
        state[name].copy_(value)
    return Match(state, sorted(found), missing, used)


def _memory(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], set[str]]:
    """Converts CoCLR's queues [D, K] to the columns of our memory; also returns the names that were used."""
    queues = [name for name in ("queue", "queue_second") if name in tensors]
    if not queues:
        return {}, set()
    columns = {"queue_vname": "source", "queue_label": "label"}
    memory: dict[str, Any] = {ours: tensors[theirs] for theirs, ours in columns.items() if theirs in tensors}
    memory["features"] = torch.stack([tensors[name].T for name in queues])  # [V, K, D]
    written = (
        memory.get("label", torch.zeros(1)) >= 0
    )  # their queue starts with random entries: the labels tell which slots were written
    pointer = int(tensors["queue_ptr"]) if "queue_ptr" in tensors else 0
    memory["count"] = pointer + bool(written.all()) * memory["features"].shape[1]
    return memory, {*queues, *(columns.keys() & tensors.keys()), *({"queue_ptr"} & tensors.keys())}


def _some(tensors: Mapping[str, Tensor]) -> str:
    names = list(tensors)
    return ", ".join(names[:3]) + (f", … ({len(names)} tensors)" if len(names) > 3 else "") if names else "no tensor"
