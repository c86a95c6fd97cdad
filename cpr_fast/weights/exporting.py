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

from cpr_fast.config import Config, Cycle
from cpr_fast.errors import InputError, is_installed
from cpr_fast.models import Encoder
from cpr_fast.runtime.files import replacing
from cpr_fast.weights.checkpoint import load_encoders, load_trained, torch_save
from cpr_fast.weights.sources import coclr_names
from cpr_fast.weights.tensors import save_tensors

Form = Literal["safetensors", "onnx", "coclr", "cpr"]
_QUEUE_SEED = 0  # seed of the random queue that is written if the checkpoint has no queue


def export(checkpoint: str | Path, out: str | Path, *, to: Form, view: str | None = None) -> dict[str, Any]:
    """Writes the encoders of a checkpoint to `out`.

    Args:
        to: "safetensors": the encoders of all views; tensors are named "<view>.backbone.…" and "<view>.head.…", and the
            metadata hold the config as JSON. "onnx": the encoder of one view, from clips [N, 3, T, H, W] float32,
            normalised as in training, to features [N, C] and embedding [N, D], for any N. "coclr", "cpr": a checkpoint
            for the options `--pretrain`, `--test` and `--resume` of CoCLR's or CPR's code (without the state of the
            optimiser); `model.width` must be 1 there. CPR's model of two views has one buffer more, so that each file
            loads strictly in one of the two; the models of one view are equal.
        view: the view whose encoder is exported; by default the one that was trained last. For "coclr" and "cpr" it
            becomes the query encoder.
    Returns:
        `file`, `form`, `view` if there is one, and further values that depend on the form, such as the number of
        `tensors` and, for "coclr" and "cpr", the `model` of their code that the file is for: InfoNCE, UberNCE, CoCLR.
    Raises:
        CheckpointError: see `load_trained`.
        InputError: the checkpoint lacks the view, or a package that the form needs is not installed.
    """
    (config, payload), out = load_trained(checkpoint), Path(out)
    if config.data.features and to != "safetensors":
        raise InputError(f"--to: expected safetensors for heads that were trained on stored features, got {to!r}")
    trained, view = chosen_view(payload), chosen_view(payload, view)
    if to == "safetensors":
        written = write_safetensors(payload["encoders"], out, {"cpr_fast_config": json.dumps(payload["config"])})
    elif to == "onnx":
        config, encoders = load_encoders(checkpoint)
        written = _onnx(config, encoders[view], out)
    else:
        written = _coclr(payload, view, view == trained, out, to)
    return {"file": str(out), "form": to, **({} if to == "safetensors" else {"view": view}), **written}


def chosen_view(payload: Mapping[str, Any], view: str | None = None) -> str:
    """Returns the view to export; None: the one that was trained last. Raises InputError if the checkpoint lacks it."""
    view = payload.get("view") or _last_view(payload) if view is None else view
    if view not in payload["encoders"]:
        held = ", ".join(payload["encoders"])
        raise InputError(f"--view: expected one of the views of the checkpoint ({held}), got {view!r}")
    return view


def write_safetensors(
    encoders: Mapping[str, Mapping[str, Tensor]], out: Path, metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Writes the encoders of all views, with tensors "<view>.<name>". Returns `views` and the number of `tensors`."""
    if not is_installed("safetensors"):
        raise InputError("--to: the package safetensors is needed: pip install safetensors")
    tensors: dict[str, Tensor] = {}
    places: set[int] = set()
    for view, state in encoders.items():
        for name, tensor in state.items():
            copied = tensor.contiguous()
            if copied.untyped_storage().data_ptr() in places:  # shared weights, which the format does not have
                copied = copied.clone()
            places.add(copied.untyped_storage().data_ptr())
            tensors[f"{view}.{name}"] = copied
    with replacing(out, durable=True) as temporary:
        save_tensors(tensors, temporary, {"format": "pt", **metadata})
    return {"views": list(encoders), "tensors": len(tensors)}


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
        raise InputError("--to onnx needs the packages onnx and onnxscript: pip install onnx onnxscript") from None
    data = config.data
    clips = torch.zeros(2, 3, data.frames, data.size, data.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecation warnings inside the exporter
        try:
            program = torch.onnx.export(
                _Both(encoder).eval(), (clips,), dynamo=True, dynamic_shapes={"clips": {0: torch.export.Dim("batch")}},
                input_names=["clips"], output_names=["features", "embedding"], verbose=False,
            )  # fmt: skip
        except Exception as error:
            if config.model.factory is None:
                raise
            raise InputError(
                f"--to onnx: torch cannot export model.arch {config.model.arch!r}: {type(error).__name__}: "
                f"{' '.join(str(error).split())[:300]}; --to safetensors writes its weights"
            ) from error
    if isinstance(program.model.graph.inputs[0].shape[0], int) and config.model.factory:
        raise InputError(
            f"--to onnx: model.arch {config.model.arch!r} fixes the number of clips when it is exported; its code "
            "should use x.shape[0] in the place of len(x)"
        )
    with replacing(out, durable=True) as temporary:
        program.save(str(temporary), external_data=False)
    return {"clips": ["batch", *clips.shape[1:]]}


def _coclr(payload: Mapping[str, Any], view: str, is_query: bool, out: Path, to: Form) -> dict[str, Any]:
    """Writes the dict of CoCLR's `main_nce.py` (one view) or `main_coclr.py` (two views)."""
    model, cycle = payload["config"]["model"], _cycle(payload)
    if model["arch"] not in ("s3d", "s3dg") or model["head"] != "mlp":
        raise InputError(
            f"--to {to} expects an S3D (model.arch 's3d' or 's3dg') with model.head 'mlp', got {model['arch']!r} with "
            f"{model['head']!r}"
        )
    encoders, saved = payload["encoders"], payload.get("cycle_state", {}) if is_query else {}
    state = _coclr_encoder("encoder_q", encoders[view])
    state |= _coclr_encoder("encoder_k", saved.get("key", encoders[view]))
    config = payload["config"]["memory"]
    memory = saved.get("memory") if config["kind"] == "queue" else None
    if memory is None:
        memory = {"features": _random_queue(config["size"], model["feature_dim"]), "count": 0}
    other = next(
        (name for name in encoders if name != view and (cycle is None or name in cycle.views(shared=False))), None
    )
    two_views = (
        len(memory["features"]) == 2 and other is not None
    )  # a frozen encoder that was never trained is not saved
    state |= _coclr_queues(memory, two_views, labelled=cycle is None or cycle.mining == "label")
    if two_views:
        state |= _coclr_encoder("sampler", encoders[other])
        if to == "cpr":
            state["memory_index_record"] = torch.arange(len(state["queue_vname"]))
    about = {"epoch": payload.get("epoch", 0) - 1, "iteration": payload.get("step", 0) + 1, "best_acc": 0.0}
    about |= {key: value for key, value in payload.get("imported", {}).items() if key in about}
    with replacing(out, durable=True) as temporary:
        torch_save({**about, "state_dict": state}, temporary)
    kind = "CoCLR" if two_views else "UberNCE" if "queue_label" in state else "InfoNCE"
    return {"tensors": len(state), "model": kind}


def _cycle(payload: Mapping[str, Any]) -> Cycle | None:
    """Returns the cycle of the checkpoint, or None for one that is not of pretraining: an imported or finetuned one."""
    return Config.from_dict(payload["config"]).schedule.cycles[payload["cycle"]] if "cycle" in payload else None


def _last_view(payload: Mapping[str, Any]) -> str:
    """Returns the view of the checkpoint's cycle; of a finetuned one, the only encoder's."""
    cycle = _cycle(payload)
    return next(iter(payload["encoders"])) if cycle is None else cycle.view


def _random_queue(slots: int, dim: int) -> Tensor:
    """Returns random unit vectors [1, K, D], as a new model of CoCLR has."""
    drawn = torch.randn(1, slots, dim, generator=torch.Generator().manual_seed(_QUEUE_SEED))
    return nn.functional.normalize(drawn, dim=2)


def _coclr_encoder(role: str, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns an encoder under the names of CoCLR, which has every layer of the backbone twice."""
    state = {}
    for name, tensor in ours.items():
        value = tensor[:, :, None, None, None] if name.startswith("head.") and tensor.dim() == 2 else tensor
        state |= dict.fromkeys(coclr_names(name, role), value.contiguous())
    return state


def _coclr_queues(memory: Mapping[str, Any], two_views: bool, labelled: bool) -> dict[str, Tensor]:
    """Returns the queues [D, K] and their labels and pointers under CoCLR's names.

    Args:
        labelled: whether to write labels of one view's queue; the InfoNCE model of CoCLR has none, UberNCE has.
    """
    features = memory["features"]  # [V, K, D]
    slots = features.shape[1]
    state = {"queue": features[0].T.contiguous(), "queue_ptr": torch.tensor([memory["count"] % slots])}
    if labelled and "label" in memory:
        state["queue_label"] = memory["label"]
    if two_views:
        state["queue_second"] = features[1].T.contiguous()
        source = memory.get("source", torch.full((slots,), -1))
        label = memory.get("label", source)
        state["queue_vname"] = source
        state["queue_label"] = torch.where((source >= 0) & (label < 0), 1, label)  # -1: an empty slot
    return state
