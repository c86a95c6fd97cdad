"""Converts decoded frames to arrays of pixels: a region of each, a few frames at a time.

Letters: F frames, H x W pixels.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from cpr_fast._host import Yuv420ToRgb
from cpr_fast.data.video.container import VideoError, not_as_listed

# Formats in which swscale converts each pixel of a frame with even sides by itself, from the nearest chroma sample.
PLANAR = ("yuv420p", "yuvj420p")
# So many frames are converted in a row: each change between decoding and conversion costs cached code and data.
IN_A_ROW = 4
# Weights of red and blue in the luma of BT.601, BT.709, FCC, SMPTE 240M and BT.2020 (ITU-T H.273).
LUMA_WEIGHTS = ((0.299, 0.114), (0.2126, 0.0722), (0.3, 0.11), (0.212, 0.087), (0.2627, 0.0593))


@dataclass(frozen=True)
class Region:
    """A box within frames of a known size."""

    box: tuple[int, int, int, int]  # top, left, bottom, right, ends exclusive, pixels
    height: int  # height of the whole frames, pixels
    width: int

    @classmethod
    def whole(cls, height: int, width: int) -> Region:
        """Returns the region that covers whole frames of this size in pixels."""
        return cls((0, 0, height, width), height, width)

    def check(self, path: str | Path, height: int, width: int, view: str) -> None:
        """Raises VideoError for frames of another size. Flow files pad an odd width by one column, for 4:2:0."""
        padded = view == "flow" and self.width % 2 == 1 and width == self.width + 1
        if height != self.height or (width != self.width and not padded):
            raise not_as_listed(path, f"decodes to {width}x{height}", f"{self.width}x{self.height}")

    def of(self, path: str | Path, frames: np.ndarray, view: str) -> np.ndarray:
        """Returns the box of whole frames [F, H, W, ...], not copied. Raises VideoError for another size."""
        self.check(path, *frames.shape[1:3], view)
        top, left, bottom, right = self.box
        return frames[:, top:bottom, left:right]


class Pixels(Protocol):
    """Converts the frames that were added since the last `take`; at most `count` of them, see `pixels_of`."""

    def add(self, frame: av.VideoFrame) -> None:
        """Adds the next frame."""

    def take(self) -> np.ndarray:
        """Returns uint8 [F, H, W, ...], which the caller owns."""


def pixels_of(path: str | Path, frame: av.VideoFrame, view: str, region: Region | None, count: int) -> Pixels:
    """Returns a converter of frames like the given one, at most `count` at once."""
    height, width = frame.height // 2 if view == "flow" else frame.height, frame.width
    if region is not None:
        region.check(path, height, width, view)
    box = (0, 0, height, width) if region is None else region.box
    if view == "flow" and (
        frame.format.components[0].bits != 8 or not frame.format.name.startswith(("yuv", "gray", "nv"))
    ):
        raise VideoError(path, f"expected flow in 8-bit luma, got the pixel format {frame.format.name}")
    if view == "rgb" and frame.format.name in PLANAR and height % 2 == width % 2 == 0 and not frame.interlaced_frame:
        convert = _like_swscale(frame.format.name, int(frame.colorspace), int(frame.color_range))
        if convert is not None:
            return _Boxes(convert, height, box, count)
    return _Halves(box, count) if view == "flow" else _OneByOne(view, box)


class _Boxes:
    """Converts boxes of 4:2:0 frames to RGB, without the rest of the frames."""

    def __init__(self, convert: Yuv420ToRgb, height: int, box: tuple[int, int, int, int], count: int) -> None:
        top, left, bottom, right = box
        self._convert, self._top, self._left = convert, top - top % 2, left - left % 2  # whole chroma samples
        self._shape = count, bottom + bottom % 2 - self._top, right + right % 2 - self._left, 3
        self._inner = slice(top % 2, top % 2 + bottom - top), slice(left % 2, left % 2 + right - left)
        self._held, self._out = 0, None
        self._waiting, self._height = [], height

    def add(self, frame: av.VideoFrame) -> None:
        self._waiting.append(frame.planes)
        if len(self._waiting) == IN_A_ROW:
            self._convert_waiting()

    def _convert_waiting(self) -> None:
        if self._out is None:
            self._out = np.empty(self._shape, np.uint8)
        out = self._out[self._held : self._held + len(self._waiting)]
        self._convert(self._waiting, self._height, self._top, self._left, out)
        self._held += len(self._waiting)
        self._waiting = []

    def take(self) -> np.ndarray:
        if self._waiting:
            self._convert_waiting()
        frames = self._out[: self._held, *self._inner]
        self._held, self._out = 0, None
        return frames


@functools.cache
def _like_swscale(pixel_format: str, colorspace: int, color_range: int) -> Yuv420ToRgb | None:
    """Returns the conversion that gives swscale's result for 4:2:0 frames of these properties; None if none does, as on
    processors other than x86, whose swscale rounds otherwise.

    The compared picture holds every pair of levels of u and v, of u and y, and of v and y.
    """
    level = np.arange(256, dtype=np.uint8)
    u, v = np.meshgrid(level, level)
    y = np.add.outer(np.array([[0, 64], [128, 192]], np.uint8), u + v)  # of the four pixels that share u and v
    picture = av.VideoFrame(512, 512, pixel_format)
    picture.colorspace, picture.color_range = colorspace, color_range
    for plane, levels in zip(picture.planes, (y.transpose(2, 0, 3, 1).reshape(512, 512), u, v), strict=True):
        _rows(plane)[:] = levels
    whole = _OneByOne("rgb", (0, 0, 512, 512))
    try:
        whole.add(picture)
    except (av.FFmpegError, OSError):  # such as colours that swscale does not convert
        return None
    expected = whole.take()
    for full_range, (red, blue) in itertools.product((False, True), LUMA_WEIGHTS):
        convert = Yuv420ToRgb(red, blue, full_range)
        boxes = _Boxes(convert, 512, (0, 0, 512, 512), 1)
        boxes.add(picture)
        if np.array_equal(boxes.take(), expected):
            return convert
    return None


class _Halves:
    """Takes u and v from the upper and the lower half of the luma of flow frames, only within the box."""

    def __init__(self, box: tuple[int, int, int, int], count: int) -> None:
        self._box, self._count = box, count
        self._held, self._out = 0, None

    def add(self, frame: av.VideoFrame) -> None:
        top, left, bottom, right = self._box
        if self._out is None:
            self._out = np.empty((self._count, bottom - top, right - left, 2), np.uint8)
        rows, half = _rows(frame.planes[0]), frame.height // 2
        u, v = (rows[begin + top : begin + bottom, left:right] for begin in (0, half))
        # as one number, u + 256 v: cv2.merge takes six times as long for parts of rows
        pairs = self._out[self._held].view("<u2")[..., 0]
        np.multiply(v, np.uint16(256), out=pairs)
        np.add(pairs, u, out=pairs)
        self._held += 1

    def take(self) -> np.ndarray:
        frames = self._out[: self._held]
        self._held, self._out = 0, None
        return frames


class _OneByOne:
    """Converts frames of any format to "rgb" or "gray", each as a whole."""

    def __init__(self, view: str, box: tuple[int, int, int, int]) -> None:
        top, left, bottom, right = box
        self._view, self._box, self._frames = view, (slice(top, bottom), slice(left, right)), []
        self._scaler = VideoReformatter()  # kept: creating one per frame takes three times as long as the conversion

    def add(self, frame: av.VideoFrame) -> None:
        name, channels = ("rgb24", 3) if self._view == "rgb" else ("gray", 1)
        pixels = _rows(self._scaler.reformat(frame, format=name, threads=1).planes[0], channels)
        if channels == 3:
            pixels = pixels.reshape(frame.height, frame.width, 3)
        self._frames.append(pixels[self._box])

    def take(self) -> np.ndarray:
        frames, self._frames = np.stack(self._frames), []
        return frames


def _rows(plane: av.video.plane.VideoPlane, channels: int = 1) -> np.ndarray:
    """Returns the bytes of a plane, uint8 [H, W * channels], not copied."""
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, : plane.width * channels]
