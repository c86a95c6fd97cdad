"""Reads a video from a file, wherever it is (see `cpr_fast.data.files.names`), from a record of an LMDB file,
FILE.lmdb#CLASS/VIDEO, or from a folder of extracted frames."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from cpr_fast.data.files.access import storage_of
from cpr_fast.data.files.names import is_frames, is_remote, member_of, text_of
from cpr_fast.data.storage import records
from cpr_fast.data.storage.pictures import (
    count_pictures,
    picture_size,
    read_picture_frames,
    read_pictures,
    require_pictures,
)
from cpr_fast.data.storage.records import split_record
from cpr_fast.data.video import decode
from cpr_fast.data.video.decode import PART, frames_at_once, joined
from cpr_fast.data.video.pixels import Region
from cpr_fast.wording import not_a_file


def is_record(path: Path) -> bool:
    """Returns whether the path is that of a record of an LMDB file."""
    return split_record(path) is not None


def is_pictures(path: Path) -> bool:
    """Returns whether every frame is a picture of its own, in a record or in a folder, so that any frame is read
    without the others."""
    return is_record(path) or is_frames(path)


def read_jpegs(path: Path, frames: Sequence[int] | np.ndarray) -> list[memoryview] | list[bytes]:
    """Returns the JPEG of every frame in `frames`, of a record or of extracted frames. Raises VideoError."""
    return read_pictures(path, frames) if is_frames(path) else records.read_jpegs(path, frames)


def require_frames(path: Path, view: str, num_frames: int) -> None:
    """Raises VideoError if a record or extracted frames hold fewer than `num_frames` frames of `view`."""
    (require_pictures if is_frames(path) else records.require_frames)(path, view, num_frames)


def frame_size(path: Path) -> tuple[int, int, int]:
    """Returns (frames, height, width) of a record or of extracted frames. Raises VideoError."""
    if not is_frames(path):
        return records.frame_size(path)
    return count_pictures(path)[0], *picture_size(path)


def read_picture_parts(
    path: Path, frames: Sequence[int] | np.ndarray, view: str, region: Region | None = None
) -> np.ndarray:
    """Returns what `read_parts` yields, of a record or of extracted frames, as one part."""
    return (read_picture_frames if is_frames(path) else records.read_record_frames)(path, frames, view, region)


def container(path: Path) -> Path:
    """Returns the file that holds a video: for a record the LMDB file or folder, for a member of a tar file the tar
    file, for extracted frames their folder; on a server a picture stands for them."""
    if is_frames(path):
        return path.with_name(path.name % 1) if is_remote(path) else path.parent
    held = split_record(path) or member_of(path)
    return path if held is None else held[0]


def file_of(path: Path) -> Path:
    """Returns the file whose state tells that a video has changed, see `state_of`: its `container`, the file in the
    folder of an LMDB, or the path itself of extracted frames."""
    if is_frames(path):
        return path
    file = container(path)
    return file / "data.mdb" if is_record(path) and file.is_dir() else file


def state_of(path: Path) -> tuple[int, int]:
    """Returns the size, in bytes, and the modification time, in ns, of the file that holds a video; of extracted frames
    those of their folder, with the time of the first picture if it is later; of an object on a server its size and a
    number that changes when it does. Raises OSError."""
    file = container(path) if is_frames(path) else file_of(path)
    if is_remote(file):
        storage = storage_of(file)
        return storage.size(file), zlib.crc32(repr(storage.version(file)).encode())
    facts = os.stat(file)
    # pictures that are written again in place leave the time of their folder
    first = [file / (path.name % number) for number in (0, 1)] if is_frames(path) else []
    times = [os.stat(picture).st_mtime_ns for picture in first if picture.exists()]
    return facts.st_size, max(facts.st_mtime_ns, *times, 0)


def resolved(path: Path) -> str:
    """Returns the text of an absolute path with its symbolic links resolved, or a URL."""
    return text_of(path) if is_remote(path) else os.path.realpath(path)


def exists(path: Path) -> bool:
    """Returns whether the file that holds a video exists; that of a server is not looked for."""
    return not why_missing(path)


def why_missing(path: Path) -> str:
    """Returns why the file that holds a video cannot be opened, such as "does not exist", "is a folder" or "cannot be
    reached: Permission denied"; "" if it can, or is on a server, which is not asked."""
    file = container(path)
    if is_remote(file):
        return ""
    if is_frames(path):
        return "" if os.path.isdir(file) else not_a_file(file)
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
    if not is_pictures(path):
        yield from decode.read_parts(path, frames, view, num_frames, region)
        return
    require_frames(path, view, num_frames)
    most = PART if region is None else frames_at_once(region.height * region.width)
    for begin in range(0, len(frames), most):
        yield read_picture_parts(path, frames[begin : begin + most], view, region)
