"""Checkpoints: one dict per file, written whole or not at all, read without executing anything.

Layout of the dict: `format` and `version` (written here), `config` (`Config.to_dict()`), `encoders`
{view: state_dict of the query encoder}, `step` (steps done) and `cycle` (state of the cycle under way; see
`cpr_fast.pretrain.loop`).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from .config import Config
from .errors import InputError
from .models import Encoder, build_encoder

FORMAT = "cpr_fast checkpoint"
VERSION = 1
LAST = "last.pt"


class CheckpointError(InputError):
    """A checkpoint is missing, damaged, foreign, or could not be written; the message says which."""


def save_checkpoint(path: str | Path, payload: dict[str, Any]) -> Path:
    """Writes `payload` (tensors and plain Python values) to `path`, replacing it in one step.

    The bytes go to a temporary name beside it and reach the disk before the rename: a killed process or a full disk
    leaves the previous file as it was, and at worst a stray `*.tmp`, which the next save of that name overwrites.

    Raises:
        CheckpointError: the file could not be written.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **payload}, file)
            file.flush()
            os.fsync(file.fileno())
        _replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into RuntimeError
        temporary.unlink(missing_ok=True)
        kept = "the previous file is untouched" if path.exists() else "nothing was left behind"
        raise CheckpointError(f"could not write checkpoint {str(path)!r}: {error}; {kept}") from error
    return path


def load_checkpoint(path: str | Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The dict of a checkpoint written by `save_checkpoint`.

    Raises:
        CheckpointError: no such file, truncated, written by another program, or of a newer version.
    """
    path = Path(path)
    expected = f"expected a file written by cpr_fast.checkpoint.save_checkpoint, version {VERSION}"
    if not path.is_file():
        raise CheckpointError(f"checkpoint {str(path)!r} does not exist; {expected}")
    try:
        payload = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whatever the unpickler meets in a damaged or foreign file
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(
            f"checkpoint {str(path)!r} is truncated or not a checkpoint ({reason}); {expected}"
        ) from error
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        keys = sorted(map(str, payload))[:5] if isinstance(payload, dict) else type(payload).__name__
        raise CheckpointError(f"checkpoint {str(path)!r} comes from another program (holds {keys}); {expected}")
    if payload.get("version") != VERSION:
        raise CheckpointError(f"checkpoint {str(path)!r} has version {payload.get('version')!r}; {expected}")
    return payload


def save_step(folder: str | Path, step: int, payload: dict[str, Any], *, keep: int) -> Path:
    """Writes `folder/step-XXXXXXXX.pt`, points `last.pt` at it, and removes all but the newest `keep` steps."""
    folder = Path(folder)
    path = save_checkpoint(folder / f"step-{step:08d}.pt", payload)
    temporary = folder / (LAST + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)  # the same bytes under a second name: no second write
    except OSError:  # a file system without hard links
        shutil.copyfile(path, temporary)
    _replace(temporary, folder / LAST)
    for old in sorted(folder.glob("step-*.pt"))[:-keep]:
        old.unlink()
    return path


def load_encoders(path: str | Path, *, device: torch.device | str = "cpu") -> tuple[Config, dict[str, Encoder]]:
    """The config of a checkpoint and its trained encoder of each view, in eval mode on `device`."""
    payload = load_checkpoint(path)
    config = Config.from_dict(payload["config"])
    encoders = {}
    for view, state in payload["encoders"].items():
        encoder = build_encoder(config.model)
        encoder.load_state_dict(state)
        encoders[view] = encoder.to(device).eval()
    return config, encoders


def _replace(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself is durable only once the folder is synced
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
