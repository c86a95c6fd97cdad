"""Reads extracted frames: a folder with a picture for every frame, as MMAction2 and TSN write them.

The path of such a video is a template of the names of its pictures, FOLDER/img_%05d.jpg; that of its flow is the one of
the horizontal component, FOLDER/flow_x_%05d.jpg, beside which flow_y_%05d.jpg is the vertical one. The first picture
has the number 0 or 1. The pictures of flow are gray: the levels of `cpr_fast.data.flow.levels`, 128 without motion.

Letters: F frames, H x W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from cpr_fast.data.files.access import read_whole, storage_of
from cpr_fast.data.files.names import is_remote
from cpr_fast.data.files.remote import remote_files
from cpr_fast.data.video.container import VideoError, fewer_than_listed
from cpr_fast.data.video.pixels import Region

COMPONENTS = (("flow_x", "flow_y"), ("x_", "y_"))  # how the names of the pictures of u and of v begin
REMEMBERED = 2**17  # videos whose first number is kept


def is_jpeg(path: Path) -> bool:
    """Returns whether the pictures of a template are JPEGs, by their suffix."""
    return path.suffix.lower() in (".jpg", ".jpeg")


def vertical(path: Path) -> Path | None:
    """Returns the template of the vertical component of flow for that of the horizontal one, None for other names."""
    for u, v in COMPONENTS:
        if path.name.startswith(u):
            return path.with_name(v + path.name[len(u) :])
    return None


def picture_file(path: Path, frame: int) -> Path:
    """Returns the picture of a frame, which may not exist. Raises VideoError if no picture has the number 0 or 1."""
    return path.with_name(path.name % (first_number(path) + frame))


@lru_cache(maxsize=REMEMBERED)
def first_number(path: Path) -> int:
    """Returns the number of the first picture, 0 or 1. Raises VideoError if there is neither."""
    for number in (0, 1):
        try:
            storage_of(path).size(file := path.with_name(path.name % number))
            return number
        except FileNotFoundError:
            continue
        except OSError as error:
            raise VideoError(file, error.strerror or str(error), unreadable=True) from error
    reason = f"expected the first picture to be {path.name % 0!r} or {path.name % 1!r}, got neither"
    # a folder that is no longer there may come back
    raise VideoError(path, reason, unreadable=not is_remote(path) and not path.parent.is_dir())


def read_pictures(path: Path, frames: Sequence[int] | np.ndarray) -> list[bytes]:
    """Returns the bytes of the picture of every frame in `frames`. Raises VideoError."""
    return [_bytes(path, int(frame)) for frame in frames]


def require_pictures(path: Path, view: str, num_frames: int) -> None:
    """Raises VideoError if a video has fewer than `num_frames` pictures of `view`, judged by the last of them."""
    last = picture_file(path, num_frames - 1)
    try:
        storage_of(last).size(last)
    except FileNotFoundError:
        raise fewer_than_listed(path, count_pictures(path)[0], num_frames, view) from None
    except OSError as error:
        raise VideoError(path, error.strerror or str(error), unreadable=True) from error


def count_pictures(path: Path) -> tuple[int, str]:
    """Returns the number of pictures before the first one that is missing, and which that is, "" if none is missing
    between others. Raises VideoError."""
    first = first_number(path)
    names = {file.name for file in remote_files(path.parent)} if is_remote(path) else set(os.listdir(path.parent))
    count = 0
    while path.name % (first + count) in names:
        count += 1
    begin, end = path.name.split("%")[0], path.suffix
    rest = sum(name.startswith(begin) and name.endswith(end) and name[len(begin) : -len(end)].isdecimal()
               for name in names) - count  # fmt: skip
    return count, f"{path.name % (first + count)} is missing" if rest > 0 else ""


def picture_size(path: Path) -> tuple[int, int]:
    """Returns (height, width) of the first picture. Raises VideoError."""
    return _decoded(path, 0, "gray").shape[:2]


def read_picture_frames(
    path: Path, frames: Sequence[int] | np.ndarray, view: str, region: Region | None = None
) -> np.ndarray:
    """Returns decoded frames, or only `region` of each: uint8 [F, H, W, 3] for view "rgb", [F, H, W, 2] (u, v) for
    "flow", [F, H, W] for "gray".

    Raises VideoError if a picture is missing, does not decode or has another size than the first or than that of
    `region`.
    """
    out: np.ndarray | None = None
    for place, frame in enumerate(frames):
        picture = _flow(path, int(frame)) if view == "flow" else _decoded(path, int(frame), view)
        if out is None:
            size = picture.shape[:2]
            if region is not None:
                region.check(path, *size, view)
            top, left, bottom, right = (0, 0, *size) if region is None else region.box
            out = np.empty((len(frames), bottom - top, right - left, *picture.shape[2:]), np.uint8)
        elif picture.shape[:2] != size:
            raise VideoError(path, f"the frame size changes from {size} to {picture.shape[:2]}")
        out[place] = picture[top:bottom, left:right]
    return out


def _flow(path: Path, frame: int) -> np.ndarray:
    """Returns the flow of a frame, uint8 [H, W, 2] (u, v)."""
    other = vertical(path)
    if other is None:
        expected = " or ".join(u for u, _ in COMPONENTS)
        raise VideoError(path, f"expected pictures of flow whose names begin with {expected}")
    u, v = (_decoded(template, frame, "gray") for template in (path, other))
    if u.shape != v.shape:
        raise VideoError(path, f"the components of flow {frame} have the sizes {u.shape} and {v.shape}")
    return np.stack([u, v], axis=-1)


def _decoded(path: Path, frame: int, view: str) -> np.ndarray:
    """Returns a picture, uint8 [H, W, 3] for view "rgb", [H, W] for "gray". Raises VideoError."""
    data = _bytes(path, frame)
    try:
        if is_jpeg(path):
            colours = "RGB" if view == "rgb" else "GRAY"
            picture = simplejpeg.decode_jpeg(data, colours)
            return picture if view == "rgb" else picture[..., 0]
        how = cv2.IMREAD_COLOR if view == "rgb" else cv2.IMREAD_GRAYSCALE
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), how) if data else None
        if picture is None:
            raise ValueError("it is no picture")
    except ValueError as error:
        raise VideoError(path, f"{picture_file(path, frame).name} does not decode: {error}") from error
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB) if view == "rgb" else picture


def _bytes(path: Path, frame: int) -> bytes:
    file = picture_file(path, frame)
    try:
        return read_whole(file)
    except FileNotFoundError:
        raise VideoError(path, f"{file.name} is missing", unreadable=False) from None
    except OSError as error:
        raise VideoError(path, f"{file.name}: {error.strerror or error}", unreadable=True) from error
