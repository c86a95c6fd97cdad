"""A video wherever it lies: a file, or a record of an LMDB file (FILE.lmdb#CLASS/VIDEO)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cpr_fast.data import lmdb, video


def is_record(path: Path) -> bool:
    return lmdb.split_record(path) is not None


def container(path: Path) -> Path:
    """The file; of a record, its LMDB file (or folder)."""
    record = lmdb.split_record(path)
    return path if record is None else record[0]


def exists(path: Path) -> bool:
    """Whether the file is there; of a record, the LMDB file."""
    return container(path).exists() if is_record(path) else path.is_file()


def read_frames(path: Path, frames: Sequence[int] | np.ndarray, view: str, num_frames: int) -> np.ndarray:
    """The frames of the given, strictly increasing numbers: uint8 [F, H, W, 3] (rgb), [F, H, W, 2] (flow: u, v) or
    [F, H, W] (gray). `num_frames` is what the index says the view holds. Raises VideoError.
    """
    if is_record(path):
        return lmdb.read_frames(path, frames, view)
    return video.read_frames(path, frames, view, num_frames)
