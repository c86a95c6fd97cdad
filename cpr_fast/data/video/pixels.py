"""Converts decoded frames to arrays of pixels: a region of each, a few frames at a time.

Letters: F frames, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import av
import cv2
import numpy as np
from av.video.reformatter import VideoReformatter

from cpr_fast.data.video.container import VideoError

# In these formats a box of whole chroma samples is converted exactly as in the whole frame.
PLANAR = ("yuv420p", "yuvj420p")


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
            raise VideoError(path, f"decodes to {width}x{height}, the index says {self.width}x{self.height}")

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
        return _Stacked(frame, box, count)
    return _Halves(box, count) if view == "flow" else _OneByOne(view, box)


class _Stacked:
    """Converts boxes of 4:2:0 frames to RGB: stacks them and converts one tall picture, which is faster."""

    def __init__(self, frame: av.VideoFrame, box: tuple[int, int, int, int], count: int) -> None:
        top, left, bottom, right = box
        # whole chroma samples, and a left edge that is aligned to the converter's vectors
        outer = top - top % 2, left - left % 16, bottom + bottom % 2, right + right % 2
        self._height, width = outer[2] - outer[0], outer[3] - outer[1]
        self._inner = slice(top - outer[0], bottom - outer[0]), slice(left - outer[1], right - outer[1])
        self._tall = av.VideoFrame(width, count * self._height, frame.format.name)
        self._tall.colorspace, self._tall.color_range = frame.colorspace, frame.color_range
        self._targets = [rows.reshape(count, -1, rows.shape[1]) for rows in map(_rows, self._tall.planes)]
        planes = (tuple(edge // scale for edge in outer) for scale in (1, 2, 2))
        self._boxes = [((bottom - top, right - left), top, left) for top, left, bottom, right in planes]
        self._scaler, self._held = VideoReformatter(), 0

    def add(self, frame: av.VideoFrame) -> None:
        for plane, target, (shape, top, left) in zip(frame.planes, self._targets, self._boxes, strict=True):
            row = plane.line_size
            target[self._held] = np.ndarray(shape, np.uint8, plane, top * row + left, (row, 1))
        self._held += 1

    def take(self) -> np.ndarray:
        rows = _rows(self._scaler.reformat(self._tall, format="rgb24", threads=1).planes[0], channels=3)
        frames = rows.reshape(-1, self._height, self._tall.width, 3)
        held, self._held = self._held, 0
        return frames[:held, *self._inner]


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
        cv2.merge([rows[begin + top : begin + bottom, left:right] for begin in (0, half)], dst=self._out[self._held])
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
