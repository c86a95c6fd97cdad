"""Folders of weights that are ready for a hub: model.safetensors, config.json, modeling.py and a model card.

Letters in shapes: N clips, T frames, H x W pixels, C pooled features, D feature width.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cpr_fast.config import Config, ConfigError
from cpr_fast.config.pixels import normalisation
from cpr_fast.errors import InputError
from cpr_fast.models import Encoder, FactoryEncoder, build_encoder
from cpr_fast.runtime.files import created, replacing
from cpr_fast.weights.checkpoint import load_trained
from cpr_fast.weights.exporting import chosen_view, write_safetensors
from cpr_fast.weights.modeling import standalone_source
from cpr_fast.weights.standalone import read_view
from cpr_fast.wording import expected

WEIGHTS, CONFIG, MODELING, CARD = "model.safetensors", "config.json", "modeling.py", "README.md"
# Our networks: the module and the class that define them.
OWN = {"s3d": ("models.s3d", "S3D"), "s3dg": ("models.s3d", "S3D"), "s3d_milnce": ("models.s3d_milnce", "S3DMilNce"),
       "r3d": ("models.r3d", "R3D"), "r21d": ("models.r3d", "R2Plus1D"), "c3d": ("models.r3d", "C3D"),
       "vit": ("models.vit", "VideoTransformer")}  # fmt: skip


def export_folder(
    checkpoint: str | Path, out: str | Path, *, view: str | None, card: Callable[[dict[str, Any], dict[str, Any]], str]
) -> dict[str, Any]:
    """Writes a folder for a hub with the encoders of all views of a checkpoint.

    Args:
        out: a folder that does not exist or is empty, because a card that was completed would be lost.
        view: that `from_pretrained` loads by default; None: the one that was trained last.
        card: returns the text of README.md from the content of config.json and the dict of the checkpoint.
    Returns:
        `file`, the folder, `form`, `views`, `view`, `tensors`, and whether it is `standalone`: loads with torch alone.
    Raises:
        CheckpointError: see `load_trained`.
        InputError: the checkpoint lacks the view, or holds heads that were trained on stored features or a network
            that is built from another folder; or `out` is a file or holds files.
    """
    (config, payload), out = load_trained(checkpoint), Path(out)
    if config.data.features:
        raise InputError("--to: expected safetensors for heads that were trained on stored features, got 'hub'")
    if "path" in config.model.args:
        raise InputError(
            f"--to hub: the network is built from model.args.path {config.model.args['path']!r}, which the written "
            "folder would need; expected a network without it (for transformers model.args.config), or --to safetensors"
        )
    _require_new_folder(out)
    about = _about(config, list(payload["encoders"]), chosen_view(payload, view))
    text = card(about, payload)
    with created(out):
        written = write_safetensors(payload["encoders"], out / WEIGHTS, {})
        files = {CONFIG: json.dumps(about, indent=2) + "\n", CARD: text}
        if about["network"] is not None:
            files[MODELING] = standalone_source(*OWN[config.model.arch])
        for name, content in files.items():
            with replacing(out / name) as temporary:
                temporary.write_text(content, encoding="utf-8")
    return {"file": str(out), "form": "hub", "view": about["view"], **written, "standalone": MODELING in files}


def from_pretrained(folder: str | Path, view: str | None = None) -> Encoder:
    """Loads an encoder of a folder that `cpr-fast export --to hub` has written, in eval mode on the CPU.

    Its method `features` maps clips [N, 3, T, H, W] float32, normalised with `clip` of config.json, to the features
    [N, C] that retrieval compares; a call returns the embedding [N, D] of the loss. A network of the user's own is
    imported as `model.arch` names it, see `cpr_fast.models.factory`; no other code of the folder is run.

    Args:
        view: one of the views of the folder; by default the one that config.json names.
    Raises:
        InputError: the folder was not written by the export, lacks the view, or its tensors are not those of the
            network.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise InputError(f"folder: {expected('a folder that `cpr-fast export --to hub` has written', folder)}")
    try:
        about = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        views, view = about["views"], about["view"] if view is None else view
        config = Config.from_dict(about["training"])
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise InputError(f"{str(folder / CONFIG)!r} is not one of `cpr-fast export --to hub`: {error}") from None
    if view not in views:
        raise InputError(f"view: expected one of {', '.join(views)}, got {view!r}")
    with torch.random.fork_rng([]):
        encoder = build_encoder(config.model, config.data)
    try:
        encoder.load_state_dict(read_view(folder / WEIGHTS, view))
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{str(folder / WEIGHTS)!r}: {error}") from None
    return encoder.eval()


def _about(config: Config, views: list[str], view: str) -> dict[str, Any]:
    """Returns the content of config.json. `network` is None for a network that is not of the package; `training` holds
    all settings, without the names of folders of the machine that trained."""
    with torch.random.fork_rng([]):
        encoder = build_encoder(config.model, config.data)
    model, data = config.model, config.data
    given = normalisation(data.augment)
    network = None
    if model.arch in OWN and not (isinstance(encoder, FactoryEncoder) and encoder.normalises):
        network = {"class": OWN[model.arch][1], "arguments": _arguments(config), "maps": model.arch != "vit"}
    training = config.to_dict()
    training["model"] |= {"arch": model.arch.rpartition("/")[2]}
    training["model"]["init"] = {v: Path(file).name for v, file in training["model"]["init"].items() if file}
    training["data"]["index"] = Path(data.index).name
    training["run"]["out"] = Path(config.run.out).name
    return {
        "library_name": "cpr_fast",
        "views": views,
        "view": view,
        "network": network,
        "head": {"kind": model.head, "width": encoder.width, "feature_dim": model.feature_dim},
        "clip": {"frames": data.frames, "stride": data.stride, "size": data.size, "mean": given[0], "std": given[1]}
        | ({"fps": data.fps} if data.fps else {}),
        "training": training,
    }


def _arguments(config: Config) -> dict[str, Any]:
    """Returns the arguments of the class of one of our networks."""
    model = config.model
    if model.arch == "vit":
        return {"clip_frames": config.data.frames, "clip_size": config.data.size} | model.args
    return {"width": model.width} | ({"gating": True} if model.arch == "s3dg" else {})


def _require_new_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"--out: {expected('a folder to write', out, 'is a file')}")
    if names := sorted(path.name for path in out.iterdir()) if out.exists() else []:
        raise InputError(f"--out: expected a new or an empty folder, got {str(out)!r}, which holds {names[0]!r}")
