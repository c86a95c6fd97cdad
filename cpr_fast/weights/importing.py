"""Imports published checkpoints: CoCLR and CPR (InfoNCE, UberNCE, CoCLR), IIC, and the S3D of MIL-NCE.

The layouts are in `sources`. The result holds everything that the network needs: `retrieve`, `probe` and `finetune`
take the clips and the recipe from its config.

Letters: K memory slots, D feature width, V views.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpr_fast.config import Config, View
from cpr_fast.errors import InputError
from cpr_fast.models import build_encoder
from cpr_fast.weights.checkpoint import save_checkpoint
from cpr_fast.weights.reading import CheckpointError, read_torch
from cpr_fast.weights.sources import EXPECTED, Layout, Names, layout_of, some

_OTHER = {"rgb": "flow", "flow": "rgb"}  # the view of the frozen encoder
_COUNTER = "num_batches_tracked"  # files of torch before 0.4.1 lack these, and no result depends on them


@dataclass(frozen=True)
class Match:
    """One encoder of a file, converted to the names of `Encoder`.

    Attributes:
        state: A complete state_dict.
        matched, missing: The names in `state` whose tensors came from the file, and the other names in `state`.
        used: The names in the file that were used.
    """

    state: dict[str, Tensor]
    matched: list[str]
    missing: list[str]
    used: set[str]


def import_checkpoint(path: str | Path, out: str | Path, *, view: View | None = None) -> dict[str, Any]:
    """Converts a published checkpoint to ours, for `model.init`, retrieval, probe, finetune and export.

    A head that the file lacks is that of a new encoder initialised with seed 0.

    Args:
        view: the view of the file's (query) encoder; an encoder `sampler` in the file has the other of rgb and flow.
            None: rgb, and for IIC's network, which serves both, rgb and residual.
    Returns:
        `checkpoint`, `source`, `arch`; `encoders` {name in the file: its views, number of tensors matched, names
        missing}; `unused`, the names in the file that were not used.
    Raises:
        CheckpointError: the file is damaged or of an unknown source, or a tensor of a backbone is missing, has another
            shape, is not finite, or is one that the network lacks.
        InputError: `view` is residual, and the file has an encoder `sampler`.
    """
    tensors, about, modality = _read(Path(path))
    layout = layout_of(tensors, modality, path)
    views = _views(layout, view)
    matches = {role: _match(role, names, tensors, layout, path) for role, names in layout.encoders.items()}
    memory, memory_names = _memory(tensors, layout.model.feature_dim, path)
    used = memory_names.union(*(match.used for match in matches.values()))
    unused = sorted(tensors.keys() - used)
    if foreign := [name for name in unused if layout.is_backbone(name)]:
        raise CheckpointError(
            f"checkpoint {str(path)!r}: expected the tensors of {layout.model.arch!r} (model.arch), but the file also "
            f"holds {some(foreign)}: it is another network"
        )
    payload: dict[str, Any] = {
        "config": Config(
            data=layout.data, model=layout.model, memory=layout.memory, finetune=layout.finetune
        ).to_dict(),
        "view": views["encoder_q"][0],
        "encoders": {view: matches[role].state for role, own in views.items() if role != "encoder_k" for view in own},
        "cycle_state": {"memory": memory} if memory else {},
        "imported": {"source": layout.source, "file": Path(path).name, **about},
    }
    if "encoder_k" in matches:
        payload["cycle_state"]["key"] = matches["encoder_k"].state
    save_checkpoint(out, payload)
    encoders = {
        role: {"views": list(views[role]), "matched": len(match.matched), "missing": match.missing}
        for role, match in matches.items()
    }
    return {"checkpoint": str(out), "source": layout.source, "arch": layout.model.arch, "encoders": encoders,
            "unused": unused}  # fmt: skip


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], str | None]:
    """Reads the tensors of a file, without the prefix of DataParallel, the plain values saved with them, and the option
    --modality of IIC."""
    payload = read_torch(path, expected=EXPECTED)
    if not isinstance(payload, Mapping):
        raise CheckpointError(f"checkpoint {str(path)!r} holds a {type(payload).__name__}; {EXPECTED}")
    state = next((payload[key] for key in ("state_dict", "model") if isinstance(payload.get(key), Mapping)), payload)
    tensors = {str(key).removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    about = {key: payload[key] for key in ("epoch", "iteration", "best_acc") if key in payload and payload is not state}
    about = {
        key: value.item() if np.size(value) == 1 and hasattr(value, "item") else value for key, value in about.items()
    }
    about = {key: value for key, value in about.items() if isinstance(value, int | float)}
    return tensors, about, getattr(payload.get("opt"), "modality", None)


def _views(layout: Layout, view: View | None) -> dict[str, tuple[str, ...]]:
    """Returns the views of every encoder of a file."""
    own = layout.views if view is None else (view,)
    views = dict.fromkeys(layout.encoders, own)
    if "sampler" in views:
        if own[0] not in _OTHER:
            raise InputError(f"--view: expected rgb or flow for a file with two encoders, got {own[0]!r}")
        views["sampler"] = (_OTHER[own[0]],)
    return views


def _match(role: str, names: Names, tensors: Mapping[str, Tensor], layout: Layout, path: str | Path) -> Match:
    """Builds a new encoder and fills it with the tensors of the file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = build_encoder(layout.model, layout.data).state_dict()
    used, missing = set(), []
    for ours, own in state.items():
        theirs = [name for name in names(ours) if name in tensors]
        if not theirs:
            missing.append(ours)
            continue
        used.update(theirs)
        value = _checked(tensors[theirs[0]], own, theirs[0], layout, path)
        if any(not torch.equal(tensors[theirs[0]], tensors[alias]) for alias in theirs[1:]):
            raise CheckpointError(f"checkpoint {str(path)!r}: {theirs[1]} differs from {theirs[0]}, the same tensor")
        own.copy_(value)
    lost = [names(ours)[0] for ours in missing if ours.startswith("backbone.") and not ours.endswith(_COUNTER)]
    if lost:
        raise CheckpointError(
            f"checkpoint {str(path)!r}: expected all tensors of {layout.model.arch!r}, but {role} lacks {some(lost)}"
        )
    return Match(state, sorted(state.keys() - set(missing)), missing, used)


def _checked(value: Tensor, own: Tensor, name: str, layout: Layout, path: str | Path) -> Tensor:
    """Returns a tensor of the file in the shape of ours."""
    where, model, shape = f"checkpoint {str(path)!r}: {name}", layout.model, list(value.shape)
    if value.dim() == 5 and own.dim() == 2 and value.shape[2:].numel() == 1:  # their head is 1x1x1 convolutions
        value = value.flatten(1)
    if value.shape != own.shape:
        raise CheckpointError(
            f"{where}: expected shape {list(own.shape)} ({model.arch} of width {model.width:g}), got {shape}"
        )
    if value.is_floating_point() != own.is_floating_point():
        raise CheckpointError(f"{where}: expected {own.dtype}, got {value.dtype}")
    if value.is_floating_point() and (bad := int((~torch.isfinite(value)).sum())):
        raise CheckpointError(f"{where}: expected finite numbers, but {bad} of {value.numel()} are NaN or infinite")
    return value


def _memory(tensors: Mapping[str, Tensor], dim: int, path: str | Path) -> tuple[dict[str, Any], set[str]]:
    """Converts CoCLR's queues [D, K] to the columns of our memory; also returns the names that were used."""
    queues = [name for name in ("queue", "queue_second") if name in tensors]
    if not queues:
        return {}, set()
    columns = {"queue_vname": "source", "queue_label": "label"}
    rows = {theirs for theirs in (*columns, "memory_index_record") if theirs in tensors}
    slots = tensors[queues[0]].shape[-1] if tensors[queues[0]].dim() else 0
    pointers = {"queue_ptr"} & tensors.keys()
    for name in (*queues, *sorted(rows | pointers)):
        wanted = [dim, slots] if name in queues else [1] if name in pointers else [slots]
        if list(tensors[name].shape) != wanted:
            raise CheckpointError(
                f"checkpoint {str(path)!r}: {name}: expected shape {wanted}, got {list(tensors[name].shape)}"
            )
    memory: dict[str, Any] = {ours: tensors[theirs] for theirs, ours in columns.items() if theirs in rows}
    memory["features"] = torch.stack([tensors[name].T for name in queues])  # [V, K, D]
    # Their queue starts with random entries: the labels tell which slots were written.
    written = memory.get("label", torch.zeros(1)) >= 0
    pointer = int(tensors["queue_ptr"]) if pointers else 0
    memory["count"] = pointer + bool(written.all()) * slots
    # `memory_index_record` of CPR numbers the slots, 0..K-1, and never changes.
    return memory, {*queues, *rows, *pointers}
