"""Film strips: a row of small frames of a clip in one JPEG, which the page plays by moving it as a background."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from cpr_fast.data.storage.media import read_frames
from cpr_fast.data.video.container import VideoError

STRIP_FRAMES = 8
THUMB_WIDTH, THUMB_HEIGHT = 128, 96  # pixels of one frame


Shown = Callable[[np.ndarray], np.ndarray]  # returns the frames of the file at these samples of `data.fps`


def film_strip(path: Path, num_frames: int, start: int, length: int, shown: Shown | None = None) -> str | None:
    """Returns `strip_image` as a data URI; None where the video cannot be read."""
    return strip_uri(strip_image(path, num_frames, start, length, shown))


def strip_uri(strip: Image.Image | None) -> str | None:
    """Returns a film strip as a data URI; None where there is none."""
    if strip is None:
        return None
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=72, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


@functools.lru_cache(maxsize=256)
def whole_strip(path: Path, num_frames: int) -> Image.Image | None:
    """Returns `strip_image` of a whole video; the last 256 are kept, 0.3 MB each."""
    return strip_image(path, num_frames, 0, num_frames)


def strip_image(path: Path, num_frames: int, start: int, length: int, shown: Shown | None = None) -> Image.Image | None:
    """Returns STRIP_FRAMES frames side by side, evenly spread over `length` source frames from `start`, or over the
    samples that `shown` finds.

    Returns None if the video does not exist or does not decode, or has no frames, as a clip of a store of features, so
    that the page is written without this picture.
    """
    if num_frames < 1:
        return None
    wanted = np.linspace(start, start + length - 1, STRIP_FRAMES).round().astype(int)
    try:
        wanted = (wanted if shown is None else shown(wanted.clip(0))).clip(0, num_frames - 1)
        distinct, place = np.unique(wanted, return_inverse=True)
        frames = read_frames(path, distinct, "rgb", num_frames)[place]  # [STRIP_FRAMES, H, W, 3]
    except VideoError:
        return None
    strip = Image.new("RGB", (STRIP_FRAMES * THUMB_WIDTH, THUMB_HEIGHT))
    for i, frame in enumerate(frames):
        strip.paste(_cover(Image.fromarray(frame)), (i * THUMB_WIDTH, 0))
    return strip


def _cover(frame: Image.Image) -> Image.Image:
    """Cuts the largest centred part of the thumbnail's aspect ratio out of a frame, and scales it to its size."""
    scale = max(THUMB_WIDTH / frame.width, THUMB_HEIGHT / frame.height)
    width, height = THUMB_WIDTH / scale, THUMB_HEIGHT / scale
    left, top = (frame.width - width) / 2, (frame.height - height) / 2
    box = (left, top, left + width, top + height)
    return frame.resize((THUMB_WIDTH, THUMB_HEIGHT), Image.Resampling.BILINEAR, box=box)
