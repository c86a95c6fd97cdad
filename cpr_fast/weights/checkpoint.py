"""Checkpoints: one dict per file, written whole or not at all, read without executing anything.

Layout of the dict: `format` and `version` (written here), `config` (`Config.to_dict()`), `encoders`
{view: state_dict of the query encoder}, `step` (steps done) and `cycle` (state of the cycle under way; see
`cpr_fast.pretrain.run.loop`).
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cpr_fast.config import Config, ModelConfig
from cpr_fast.errors import InputError
from cpr_fast.models import Encoder, build_encoder

FORMAT = "cpr_fast checkpoint"
VERSION = 1
LAST = "last.pt"
BEST = "best.pt"  # by online retrieval, see `cpr_fast.pretrain.run.online`


class CheckpointError(InputError):
    """A checkpoint is missing, damaged, foreign, or could not be written; the message says which."""


def save_checkpoint(path: str | Path, payload: dict[str, Any]) -> Path:
    """Writes `payload` (tensors and plain Python values) to `path`, replacing it in one step; see `written_whole`."""
    path = Path(path)
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        torch.save({"format": FORMAT, "version": VERSION, **payload}, file)
    return path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, for the block to write; it replaces `path` when the block is done.

    The bytes reach the disk before the rename: a killed process or a full disk leaves the previous file as it was, and
    at worst a stray `*.tmp`, which the next save of that name overwrites.

    Raises:
        CheckpointError: the file could not be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        _replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns a failed write into RuntimeError
        temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        kept = "the previous file is untouched" if path.exists() else "nothing was left behind"
        raise CheckpointError(f"could not write {str(path)!r}: {reason}; {kept}") from error


def load_checkpoint(path: str | Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The dict of a checkpoint written by `save_checkpoint`.

    Raises:
        CheckpointError: no such file, truncated, written by another program, or of a newer version.
    """
    expected = (
        f"expected a file written by cpr_fast.weights.checkpoint.save_checkpoint, version {VERSION} "
        "(`cpr-fast import-checkpoint` reads those of other programs)"
    )
    payload = read_torch(path, device=device, expected=expected)
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        keys = sorted(map(str, payload))[:5] if isinstance(payload, dict) else type(payload).__name__
        raise CheckpointError(f"checkpoint {str(path)!r} comes from another program (holds {keys}); {expected}")
    if payload.get("version") != VERSION:
        raise CheckpointError(f"checkpoint {str(path)!r} has version {payload.get('version')!r}; {expected}")
    return payload


def read_torch(path: str | Path, *, device: torch.device | str = "cpu", expected: str) -> Any:
    """What `torch.save` wrote to `path`, read without executing anything.

    Raises:
        CheckpointError: no such file, damaged, or holding more than data; it ends with `expected`.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {str(path)!r} does not exist; {expected}")
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whatever the unpickler meets in a damaged or foreign file
        raise CheckpointError(f"checkpoint {str(path)!r} {_damage(path, error)}; {expected}") from error


def _damage(path: Path, error: Exception) -> str:
    """What is wrong with a file that `torch.load` refused: torch's own messages run over many lines."""
    if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"would run code to be read ({code[1]})"
    with open(path, "rb") as file:
        start = file.read(2)
    if not start:
        return "is empty"
    return "is truncated or damaged" if start in (b"PK", b"\x80\x02") else "is not a checkpoint"


def save_step(folder: str | Path, step: int, payload: dict[str, Any], *, keep: int, best: bool = False) -> Path:
    """Writes `folder/step-XXXXXXXX.pt`, points `last.pt` (and before it `best.pt`, if it is the best so far) at it, and
    removes all but the newest `keep` steps and what killed processes left half written."""
    folder = Path(folder)
    for stray in folder.glob("*.tmp"):
        stray.unlink()
    path = save_checkpoint(folder / f"step-{step:08d}.pt", payload)
    for name in (BEST, LAST) if best else (LAST,):
        temporary = folder / (name + ".tmp")
        try:
            os.link(path, temporary)  # the same bytes under a second name: no second write
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
        _replace(temporary, folder / name)
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


def load_initial(model: ModelConfig) -> dict[str, dict[str, torch.Tensor]]:
    """{view: state_dict} of the encoders that `model.init` names. Raises CheckpointError if one is of another model."""
    weights = {}
    for view, path in dataclasses.asdict(model.init).items():
        if not path:
            continue
        payload = load_checkpoint(path)
        if view not in payload["encoders"]:
            raise CheckpointError(f"model.init.{view}: {path!r} holds the views {', '.join(payload['encoders'])}")
        was = Config.from_dict(payload["config"]).model
        for key in ("arch", "width", "head", "feature_dim"):
            if getattr(was, key) != getattr(model, key):
                raise CheckpointError(
                    f"model.init.{view}: {path!r} has model.{key} {getattr(was, key)!r}, got {getattr(model, key)!r}"
                )
        weights[view] = payload["encoders"][view]
    return weights


def _replace(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself is durable only once the folder is synced
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
