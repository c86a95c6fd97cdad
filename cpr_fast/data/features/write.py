"""Writes a store of features, shard by shard. A shard that is there and whose header is whole is never computed again,
so a run that was stopped continues, and `store.json` says when the store is complete.

Letters: C clips of a shard, M samples, D width.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpr_fast.data.features.clips import COLUMNS, Clip
from cpr_fast.data.features.names import FILE, TABLE, is_store, shard_name
from cpr_fast.data.features.store import Description, check_shard, header
from cpr_fast.data.index.tables import table_text
from cpr_fast.data.storage.media import state_of
from cpr_fast.errors import InputError
from cpr_fast.runtime.files import one_writer, replacing
from cpr_fast.runtime.progress import track
from cpr_fast.wording import counted

LOCK = ".store"  # begins the names of the files that processes lock

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Computed:
    """The features of some clips.

    Attributes:
        kept: int64 [C], positions of the clips among those of the store; those that could not be read are missing.
        samples: [C, M, D] floating point of every view.
        evaluation: [C, D] of every view; empty if the store has none.
    """

    kept: np.ndarray
    samples: dict[str, np.ndarray]
    evaluation: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def planned_shards(clips: int, shard_clips: int) -> list[int]:
    """Returns how many clips each shard is to hold."""
    return [min(shard_clips, clips - begin) for begin in range(0, clips, shard_clips)]


def file_states(files: Iterable[Path], named: Callable[[Path], str]) -> list[tuple[str, int, int]]:
    """Returns the name that `named` gives and the `state_of` every file, once each: by these, the source of a store
    tells that an input was changed. Raises OSError."""
    return [(named(file), *state_of(file)) for file in dict.fromkeys(files)]


def write_store(
    folder: Path,
    clips: Sequence[Clip],
    about: Description,
    compute: Callable[[range], Computed],
    *,
    share: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> dict[str, Any]:
    """Writes the store `folder` of `clips`, or the rest of it.

    Args:
        about: What the store is to hold, not complete.
        compute: Called with the positions of the clips of a shard.
        share: (i, n) computes the shards i, i + n, ... of the store. Processes of different shares may write at the
            same time; the last one finishes the store, whose bytes are those of a single process.
    Returns:
        `clips`, the number of clips of the shards that are there, which are those of the store if it is finished;
        `left_out`, that of their clips that could not be read; `shards`; `computed`, how many of them this call
        computed; `waiting`, how many other processes have yet to compute; `bytes` of all that are there.
    Raises:
        InputError: the folder holds something else, another process writes there (the same share), the disk is full, no
            clip could be read, or a feature is not finite or too large for the dtype.
    """
    number, count = share
    own, busy = ("", "") if count == 1 else (f".{number}-of-{count}", f" (share {number}/{count})")
    lock, changing = folder / f"{LOCK}{own}.lock", folder / f"{LOCK}.description.lock"
    with one_writer(lock, f"--out: another process is writing the store {str(folder)!r}{busy}"):
        with one_writer(changing, None):
            about = _begun(folder, about)
        ends = np.cumsum(about.planned).tolist()
        shards = [range(end - planned, end) for end, planned in zip(ends, about.planned, strict=True)]
        left = [shard for shard in range(number, len(shards), count) if not _is_there(folder, about, shard)]
        for shard in track(left, "features", total=len(left), unit="shards", progress=progress):
            found = compute(shards[shard])
            for path, view in zip(_paths(folder, about, shard), about.views, strict=True):
                _write_shard(path, view, found, about, clips)
        with one_writer(changing, None):
            there = [shard for shard in range(len(shards)) if count == 1 or _is_there(folder, about, shard)]
            rows = _rows(folder, about, there)
            if len(there) == len(shards):
                _finish(folder, about, clips, rows)
    kept, planned = sum(map(len, rows)), sum(about.planned[shard] for shard in there)
    size = sum(path.stat().st_size for shard in there for path in _paths(folder, about, shard))
    return {"clips": kept, "left_out": planned - kept, "shards": len(shards), "computed": len(left),
            "waiting": len(shards) - len(there), "bytes": size}  # fmt: skip


def _begun(folder: Path, about: Description) -> Description:
    """Returns the description of the store that this call continues or begins."""
    if is_store(folder):
        there = Description.load(folder)
        if there.source != about.source:
            raise InputError(
                f"--out: {str(folder)!r} holds a store of other features (another encoder, other clips, other "
                "settings, or inputs that were changed since); choose another folder"
            )
        return dataclasses.replace(there, shards=None, digest="")
    if any(not (entry.name.startswith(LOCK) and entry.suffix == ".lock") for entry in folder.iterdir()):
        raise InputError(f"--out: expected a new folder or a store of features, got {str(folder)!r}, which holds "
                         "other files")  # fmt: skip
    with replacing(folder / FILE, durable=True) as temporary:
        temporary.write_text(about.to_json(), encoding="utf-8")
    return about


def _paths(folder: Path, about: Description, number: int) -> list[Path]:
    return [folder / shard_name(view, number) for view in about.views]


def _is_there(folder: Path, about: Description, number: int) -> bool:
    """Returns whether the files of a shard hold what the description states, equally many clips of every view; logs
    what is wrong with a file that does not."""
    paths = _paths(folder, about, number)
    if not all(path.exists() for path in paths):
        return False
    try:
        dtype, shape = header(paths[0]).get("positions", ("none", ()))
        if dtype != "I64" or len(shape) != 1 or shape[0] > about.planned[number]:
            raise InputError(f"{paths[0]}: expected positions int64 of "
                             f"{counted(about.planned[number], 'clip')} or fewer, got "
                             f"{dtype} {list(shape)}")  # fmt: skip
        for path, view in zip(paths, about.views, strict=True):
            check_shard(path, view, shape[0], about)
    except InputError as error:
        log.warning("embed: %s; the shard is computed again", error)
        return False
    return True


def _write_shard(path: Path, view: str, found: Computed, about: Description, clips: Sequence[Clip]) -> None:
    from safetensors.numpy import save

    shape = (len(found.kept), about.samples, about.views[view])
    if found.samples[view].shape != shape:
        raise InputError(f"{view}: expected features {list(shape)}, got {list(found.samples[view].shape)}")
    names = [clips[position].path for position in found.kept.tolist()]
    tensors = {"positions": found.kept, "samples": as_stored(view, found.samples[view], about.dtype, names)}
    if about.evaluation:
        tensors["evaluation"] = as_stored(view, found.evaluation[view], about.dtype, names)
    with replacing(path, durable=True) as temporary:
        temporary.write_bytes(save(tensors))


def as_stored(view: str, features: np.ndarray, dtype: str, names: Sequence[str]) -> np.ndarray:
    """Returns features [C, ...] in the dtype of a store. Raises InputError that names the first clip whose features are
    not finite, or are too large for the dtype."""
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(features, dtype)
    bad = np.flatnonzero(~np.isfinite(stored).all(tuple(range(1, stored.ndim))))
    if len(bad):
        first, where = features[bad[0]], f"{view}: the features of {names[bad[0]]!r}"
        if np.isfinite(first).all():
            raise InputError(f"{where}: {np.abs(first).max():.3g} is too large for {dtype}; use --dtype float32")
        more = f" (and of {counted(len(bad) - 1, 'other clip')})" if len(bad) > 1 else ""
        raise InputError(f"{where}{more}: expected finite numbers, got NaN or infinity")
    return stored


def _rows(folder: Path, about: Description, shards: Sequence[int]) -> list[np.ndarray]:
    """Returns the positions int64 [C] of the clips that each of some shards holds."""
    from safetensors import safe_open

    view, found = next(iter(about.views)), []
    for shard in shards:
        with safe_open(folder / shard_name(view, shard), "numpy") as file:
            found.append(file.get_tensor("positions"))
    return found


def _finish(folder: Path, about: Description, clips: Sequence[Clip], kept: Sequence[np.ndarray]) -> None:
    """Writes the table, and the description of the complete store. `kept`: see `_rows`, of all shards."""
    counts = [len(positions) for positions in kept]
    rows = np.concatenate(kept).tolist()
    if not rows:
        raise InputError(f"expected features of at least one of {counted(len(clips), 'clip')}, but none could be read")
    table = table_text(COLUMNS, (clips[row] for row in rows)).encode("utf-8", "surrogateescape")
    with replacing(folder / TABLE, durable=True) as temporary:
        temporary.write_bytes(table)
    with replacing(folder / FILE, durable=True) as temporary:
        files = [path for number in range(len(counts)) for path in _paths(folder, about, number)]
        text = dataclasses.replace(about, shards=counts).with_digest([folder / TABLE, *files]).to_json()
        temporary.write_text(text, encoding="utf-8")


def same_clips(clips: Sequence[Clip]) -> None:
    """Raises InputError if two clips have the same path."""
    seen: set[str] = set()
    for clip in clips:
        if clip.path in seen:
            raise InputError(f"expected every clip once, got {clip.path!r} again")
        seen.add(clip.path)
