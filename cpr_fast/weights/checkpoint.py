"""Checkpoints: one dict per file, written completely or not at all, and read without executing code.

The dict holds `format` and `version` (added here), `config` (`Config.to_dict()`), `encoders` {view: state_dict of the
query encoder}, `step`, `epoch` (steps and epochs done), `cycle` (number of the current cycle, from 0), `cycle_state`
(see `cpr_fast.pretrain.state.cycle`) and `videos` (digest of the training videos).
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import typing
from pathlib import Path
from typing import IO, Any

import torch

from cpr_fast.config import Config, ConfigError, ModelConfig, View
from cpr_fast.errors import InputError
from cpr_fast.models import Encoder, build_encoder
from cpr_fast.runtime.files import CHECKPOINTS, replacing
from cpr_fast.weights.reading import CheckpointError, DamagedCheckpointError, is_zip, read_torch, zip_intact
from cpr_fast.wording import counted

FORMAT = "cpr_fast checkpoint"
VERSION = 1
LAST, BEST = CHECKPOINTS  # the best one by what is measured between epochs, see `cpr_fast.pretrain.run.online`


def save_checkpoint(path: str | Path, payload: dict[str, Any]) -> Path:
    """Writes `payload` (tensors and plain Python values) to `path`, which is replaced in one step: if the process is
    killed or the disk is full, the previous file is unchanged.

    Returns:
        `path`.
    Raises:
        CheckpointError: the file could not be written.
    """
    path = Path(path)
    try:
        with replacing(path, durable=True) as temporary:
            torch_save({"format": FORMAT, "version": VERSION, **payload}, temporary)
    except InputError as error:
        raise CheckpointError(str(error)) from error
    return path


def torch_save(payload: dict[str, Any], path: Path) -> None:
    """Writes a file with `torch.save`.

    Raises OSError with the reason if it cannot be written; torch itself reports an unexpected position in the file.
    """
    with open(path, "wb") as file:
        output = _Output(file)
        try:
            torch.save(payload, output)
        except RuntimeError as error:
            raise output.error or error from None


class _Output:
    """A file that remembers why a write failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.error = file, None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def load_checkpoint(path: str | Path, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Loads the dict of a checkpoint that `save_checkpoint` wrote, with its tensors on `device`.

    Raises:
        CheckpointError: the file does not exist, was written by another program, or has another version.
        DamagedCheckpointError: the file is empty, truncated or otherwise damaged.
    """
    expected = (
        f"expected a file written by `cpr-fast pretrain`, `finetune` or `import-checkpoint`, version {VERSION} "
        "(`cpr-fast import-checkpoint` converts those of other programs)"
    )
    payload = read_torch(path, device=device, expected=expected)
    if not isinstance(payload, dict) or payload.get("format") != FORMAT:
        keys = sorted(map(str, payload))[:5] if isinstance(payload, dict) else type(payload).__name__
        raise CheckpointError(f"checkpoint {str(path)!r} comes from another program (it holds {keys}); {expected}")
    if payload.get("version") != VERSION:
        raise CheckpointError(f"checkpoint {str(path)!r} has version {payload.get('version')!r}; {expected}")
    if is_zip(path) and not zip_intact(path):  # torch does not compare the checksums that it writes
        damage = "is damaged: its bytes are not those written"
        raise DamagedCheckpointError(f"checkpoint {str(path)!r} {damage}; {expected}", damage)
    return payload


def save_step(folder: str | Path, step: int, payload: dict[str, Any], *, keep: int, best: bool = False) -> Path:
    """Writes `folder/step-XXXXXXXX.pt` and makes `last.pt` a hard link to it.

    Removes all but the newest `keep` step files.

    Args:
        best: make `best.pt` a hard link to it as well.
    Returns:
        The path of the step file.
    """
    folder = Path(folder)
    path = save_checkpoint(folder / f"step-{step:08d}.pt", payload)
    for name in (BEST, LAST) if best else (LAST,):
        point_to(path, folder / name)
    for old in sorted(folder.glob("step-*.pt"))[:-keep]:
        if old != path:  # files of later steps may exist, from before the run was resumed at an earlier step
            old.unlink()
    return path


def point_to(path: Path, name: Path) -> None:
    """Makes `name` a hard link to the file `path`, replacing an existing file `name`. Copies the file where hard links
    are not supported.

    Raises:
        CheckpointError: the file could not be written.
    """
    temporary = name.with_name(name.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)  # does not write the data a second time
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
        _replace(temporary, name)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {str(name)!r}: {error.strerror or error}") from error


def load_trained(path: str | Path) -> tuple[Config, dict[str, Any]]:
    """Loads the config and the dict of a checkpoint whose encoders are to be used.

    Raises:
        CheckpointError: see `load_checkpoint`; or an entry is missing, the tensors of an encoder are not those of its
            config, or their values are not finite, as after a training that diverged.
    """
    payload = load_checkpoint(path)
    for entry in ("config", "encoders"):
        if not isinstance(payload.get(entry), dict) or not payload[entry]:
            raise CheckpointError(
                f"checkpoint {str(path)!r} has no {entry}: expected a dict {entry!r} that is not empty, got "
                f"{type(payload.get(entry)).__name__} with {', '.join(sorted(map(str, payload)))}"
            )
    try:
        config = Config.from_dict(payload["config"])
    except ConfigError as error:
        raise CheckpointError(f"checkpoint {str(path)!r}: its config is not valid: {error}") from None
    with torch.random.fork_rng([]):  # torch's meta device would draw nothing, but takes 2.5 s to import
        try:
            expected = build_encoder(config.model, config.data).state_dict()
        except InputError as error:
            raise CheckpointError(f"checkpoint {str(path)!r}: {error}") from error
    for view, state in payload["encoders"].items():
        if view not in typing.get_args(View):
            raise CheckpointError(
                f"checkpoint {str(path)!r}: expected encoders of {', '.join(typing.get_args(View))}, got {view!r}"
            )
        if fault := _fault(state, expected):
            raise CheckpointError(f"checkpoint {str(path)!r}: the encoder of view {view!r} {fault}")
    return config, payload


def _fault(state: Any, expected: dict[str, torch.Tensor]) -> str | None:
    """Returns what is wrong with the tensors of an encoder, of which `expected` has the names and shapes."""
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        return f"is not a dict of tensors, got {type(state).__name__}"
    for names, what in (
        ([name for name in expected if name not in state], "lacks"),
        ([name for name in state if name not in expected], "does not fit its config, which has no"),
    ):
        if names:
            return (
                f"{what} {counted(len(names), 'tensor')}: {', '.join(map(str, names[:3]))}{', ...' * (len(names) > 3)}"
            )
    for name, tensor in state.items():
        if tensor.shape != expected[name].shape:
            return f"does not fit its config: {name} has shape {list(tensor.shape)}, not {list(expected[name].shape)}"
        if not torch.isfinite(tensor).all():
            return f"holds NaN or infinite values in {name}: its training diverged, or the file is damaged"
    return None


def load_encoders(path: str | Path, *, device: torch.device | str = "cpu") -> tuple[Config, dict[str, Encoder]]:
    """Loads the config of a checkpoint and its trained encoder of each view, in eval mode on `device`.

    Raises CheckpointError; see `load_trained`.
    """
    config, payload = load_trained(path)
    encoders = {}
    for view, state in payload["encoders"].items():
        encoder = build_encoder(config.model, config.data)
        encoder.load_state_dict(state)
        encoders[view] = encoder.to(device).eval()
    return config, encoders


def load_initial(model: ModelConfig) -> dict[str, dict[str, torch.Tensor]]:
    """Loads {view: state_dict} of the checkpoints that `model.init` names.

    Raises:
        CheckpointError: a checkpoint cannot be read, lacks the view, or has another architecture.
    """
    weights = {}
    for view, path in dataclasses.asdict(model.init).items():
        if not path:
            continue
        try:
            config, payload = load_trained(path)
        except CheckpointError as error:
            raise CheckpointError(f"model.init.{view}: {error}") from None
        if view not in payload["encoders"]:
            held = ", ".join(payload["encoders"])
            raise CheckpointError(
                f"model.init.{view}: expected a checkpoint with the view {view!r}, but {path!r} holds the views {held}"
            )
        was = config.model.identity
        for key, wanted in model.identity.items():
            if was[key] != wanted:
                raise CheckpointError(f"model.init.{view}: {path!r} has model.{key} {was[key]!r}, got {wanted!r}")
        weights[view] = payload["encoders"][view]
    return weights


def _replace(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename is durable only after the folder is synced
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
