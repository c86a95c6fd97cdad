"""Exports trained encoders to the formats of other programs: safetensors, ONNX, and checkpoints of CoCLR and CPR.

Letters: N clips, T frames, H x W pixels, D feature width, C backbone width, K memory slots.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cpr_fast.config import Config
from cpr_fast.errors import InputError
from cpr_fast.models import Encoder
from cpr_fast.weights.checkpoint import load_checkpoint, load_encoders, written_whole
from cpr_fast.weights.importing import COCLR_ALIASES, COCLR_HEAD

Form = Literal["safetensors", "onnx", "coclr"]


def export(checkpoint: str | Path, out: str | Path, *, to: Form, view: str | None = None) -> dict[str, Any]:
    """Writes the encoders of a checkpoint to `out`.

    Args:
        to: "safetensors": the encoders of all views; tensors are named "<view>.backbone.…" and "<view>.head.…", and the
            metadata hold the config as JSON. "onnx": the encoder of one view, from clips [N, 3, T, H, W] float32,
            ImageNet-normalised, to features [N, C] and embedding [N, D], for any N. "coclr": a checkpoint for the
            options `--pretrain`, `--test` and `--resume` of CoCLR's code (without the state of the optimiser).
        view: the view whose encoder is exported; by default the one that was trained last. For "coclr" it becomes the
            query encoder.
    Returns:
        `file`, `form`, `view` if there is one, and further values that depend on the form, such as the number of
        `tensors`.
    Raises:
        InputError: the checkpoint lacks the view, or a package that the form needs is not installed.
    """
    payload, out = load_checkpoint(checkpoint), Path(out)
    trained = payload.get("view") or payload["config"]["schedule"]["cycles"][payload["cycle"]]["view"]
    view = trained if view is None else view
    if view not in payload["encoders"]:
        held = ", ".join(payload["encoders"])
        raise InputError(f"--view: expected one of the views of the checkpoint ({held}), got {view!r}")
    if to == "safetensors":
        written = _safetensors(payload, out)
    elif to == "onnx":
        config, encoders = load_encoders(checkpoint)
        written = _onnx(config, encoders[view], out)
    else:
        written = _coclr(payload, view, view == trained, out)
    return {"file": str(out), "form": to, **({} if to == "safetensors" else {"view": view}), **written}


def _safetensors(payload: Mapping[str, Any], out: Path) -> dict[str, Any]:
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise InputError("--to safetensors needs the package safetensors: pip install cpr-fast[onnx]") from None
    tensors = {
        f"{view}.{name}": tensor.contiguous()
        for view, state in payload["encoders"].items()
        for name, tensor in state.items()
    }
    metadata = {"format": "pt", "cpr_fast_config": json.dumps(payload["config"])}
    with written_whole(out) as temporary:
        save_file(tensors, temporary, metadata)
    return {"views": list(payload["encoders"]), "tensors": len(tensors)}


class _Both(nn.Module):
    """Maps clips [N, 3, T, H, W] to features for retrieval [N, C] and to the embedding of the loss [N, D]."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, clips: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder.features(clips)
        return features, self.encoder.head(features)


def _onnx(config: Config, encoder: Encoder, out: Path) -> dict[str, Any]:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise InputError("--to onnx needs the packages onnx and onnxscript: pip install cpr-fast[onnx]") from None
    data = config.data
    clips = torch.zeros(2, 3, data.frames, data.size, data.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation warnings inside the exporter
        program = torch.onnx.export(
            _Both(encoder).eval(), (clips,), dynamo=True, dynamic_shapes={"clips": {0: torch.export.Dim("batch")}},
            input_names=["clips"], output_names=["features", "embedding"], verbose=False,
        )  # fmt: skip
    with written_whole(out) as temporary:
        program.save(str(temporary), external_data=False)
    return {"clips": ["batch", *clips.shape[1:]]}


def _coclr(payload: Mapping[str, Any], view: str, is_query: bool, out: Path) -> dict[str, Any]:
    """Writes the dict of CoCLR's `main_nce.py` (one view) or `main_coclr.py` (two views).

    Every layer is written under both of its names (see `COCLR_ALIASES` in `importing`).
    """
    arch = payload["config"]["model"]["arch"]
    if arch not in ("s3d", "s3dg"):
        raise InputError(f"--to coclr expects an S3D (model.arch 's3d' or 's3dg'), got {arch!r}")
    encoders, saved = payload["encoders"], payload["cycle_state"] if is_query else {}
    state = _coclr_encoder("encoder_q", encoders[view])
    state |= _coclr_encoder("encoder_k", saved.get("key", encoders[view]))
    two_views = "memory" in saved and len(saved["memory"]["features"]) == 2
    if two_views:
        (other,) = (name for name in encoders if name != view)
        state |= _coclr_encoder("sampler", encoders[other])
    if "memory" in saved:
        state |= _coclr_queues(saved["memory"], labelled=_mining(payload) != "none")
    about = {"epoch": payload.get("epoch", 0), "iteration": payload.get("step", 0), "best_acc": 0.0}
    about |= {key: value for key, value in payload.get("imported", {}).items() if key in about}
    with written_whole(out) as temporary:
        torch.save({**about, "state_dict": state}, temporary)
    return {"tensors": len(state), "model": "CoCLR" if two_views else "InfoNCE"}


def _coclr_encoder(role: str, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    head = {our: their for their, our in COCLR_HEAD.items()}
    aliases = {name: alias for alias, name in COCLR_ALIASES.items()}
    state = {}
    for name, tensor in ours.items():
        part, rest = name.split(".", 1)
        if part == "head":
            their = head[name[: len("head.0.")]]
            value = tensor[:, :, None, None, None] if tensor.dim() == 2 else tensor
            state[f"{role}.{their}{name[len('head.0.') :]}"] = value.contiguous()
            continue
        layer, rest = rest.split(".", 1)
        for prefix in (f"{layer}.", aliases[f"{layer}."]):
            state[f"{role}.0.{prefix}{rest}"] = tensor.contiguous()
    return state


def _coclr_queues(memory: Mapping[str, Any], labelled: bool) -> dict[str, Tensor]:
    """Returns the queues [D, K] and their labels and pointers under CoCLR's names.

    Args:
        labelled: whether to write labels; the InfoNCE model of CoCLR has none.
    """
    features = memory["features"]  # [V, K, D]
    state = {name: rows.T.contiguous() for name, rows in zip(("queue", "queue_second"), features, strict=False)}
    state["queue_ptr"] = torch.tensor([memory["count"] % features.shape[1]])
    if labelled and "label" in memory:
        state["queue_label"] = memory["label"]
    if len(features) == 2:
        source, label = memory["source"], memory["label"]
        state["queue_vname"] = source
        state["queue_label"] = torch.where((source >= 0) & (label < 0), 1, label)  # -1: an empty slot
    return state


def _mining(payload: Mapping[str, Any]) -> str:
    """Returns the kind of mining of the checkpoint's cycle, or "any" for an imported checkpoint, which does not store
    it."""
    return "any" if "imported" in payload else payload["config"]["schedule"]["cycles"][payload["cycle"]]["mining"]
