"""Reads a video from a file or from a record of an LMDB file, FILE.lmdb#CLASS/VIDEO."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cpr_fast.data.storage.records import read_record_frames, require_frames, split_record
from cpr_fast.data.video import decode
from cpr_fast.data.video.decode import PART, frames_at_once, joined
from cpr_fast.data.video.pixels import Region
from cpr_fast.wording import not_a_file


def is_record(path: Path) -> bool:
    """Returns whether the path is that of a record of an LMDB file."""
    return split_record(path) is not None


def container(path: Path) -> Path:
    """Returns the file that holds a video; for a record, the LMDB file or folder."""
    record = split_record(path)
    return path if record is None else record[0]


def file_of(path: Path) -> Path:
    """Returns the file whose bytes are read for a video; for a record, the LMDB file, or that in the LMDB folder."""
    file = container(path)
    return file / "data.mdb" if file.is_dir() else file


def exists(path: Path) -> bool:
    """Returns whether the file exists; for a record, whether the LMDB file exists."""
    return not why_missing(path)


def why_missing(path: Path) -> str:
    """Returns why a file, or the LMDB file of a record, cannot be opened, such as "does not exist", "is a folder" or
    "cannot be reached: Permission denied"; "" if it can."""
    file = container(path)
    there = os.path.exists(file) if is_record(path) else os.path.isfile(file)
    return "" if there else not_a_file(file)


def read_frames(path: Path, frames: Sequence[int] | np.ndarray, view: str, num_frames: int) -> np.ndarray:
    """Returns the frames of the given, strictly increasing numbers.

    `num_frames` is the number of frames of the view according to the index. Returns uint8 [F, H, W, 3] for view "rgb",
    [F, H, W, 2] (u, v) for "flow", [F, H, W] for "gray". Raises VideoError if a frame cannot be read.
    """
    return joined(read_parts(path, frames, view, num_frames), len(frames))


def read_parts(
    path: Path, frames: Sequence[int] | np.ndarray, view: str, num_frames: int, region: Region | None = None
) -> Iterator[np.ndarray]:
    """Yields what `read_frames` returns, a few frames at a time, and of each frame only `region`.

    Raises VideoError also for frames of another size than that of `region`, and, whichever frames are wanted, for a
    file of fewer than `num_frames`.
    """
    if not is_record(path):
        yield from decode.read_parts(path, frames, view, num_frames, region)
        return
    require_frames(path, view, num_frames)
    most = PART if region is None else frames_at_once(region.height * region.width)
    for begin in range(0, len(frames), most):
        yield read_record_frames(path, frames[begin : begin + most], view, region)
