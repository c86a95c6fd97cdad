"""A video wherever it lies: a file, or a record of an LMDB file (FILE.lmdb#CLASS/VIDEO)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cpr_fast.data.storage.records import read_record_frames, split_record
from cpr_fast.data.video import decode
from cpr_fast.data.video.decode import PART, joined
from cpr_fast.data.video.pixels import Region


def is_record(path: Path) -> bool:
    return split_record(path) is not None


def container(path: Path) -> Path:
    """The file; of a record, its LMDB file (or folder)."""
    record = split_record(path)
    return path if record is None else record[0]


def exists(path: Path) -> bool:
    """Returns whether the file exists; of a record, whether the LMDB file does."""
    try:
        return container(path).exists() if is_record(path) else path.is_file()
    except OSError:  # a name that is too long, or a folder that may not be entered
        return False


def read_frames(path: Path, frames: Sequence[int] | np.ndarray, view: str, num_frames: int) -> np.ndarray:
    """The frames of the given, strictly increasing numbers: uint8 [F, H, W, 3] (rgb), [F, H, W, 2] (flow: u, v) or
    [F, H, W] (gray). `num_frames` is what the index says the view holds. Raises VideoError.
    """
    return joined(read_parts(path, frames, view, num_frames), len(frames))


def read_parts(
    path: Path, frames: Sequence[int] | np.ndarray, view: str, num_frames: int, region: Region | None = None
) -> Iterator[np.ndarray]:
    """As `read_frames`, a few frames after the other, and of each only the region. Raises VideoError also for frames
    of another size than the region says."""
    if not is_record(path):
        yield from decode.read_parts(path, frames, view, num_frames, region)
        return
    for begin in range(0, len(frames), PART):
        part = read_record_frames(path, frames[begin : begin + PART], view)
        yield part if region is None else region.of(path, part, view)
