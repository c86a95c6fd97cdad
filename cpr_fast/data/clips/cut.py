"""Crops and resizes frames that were decoded outside of DALI, before DALI's graph does the rest.

On the CPU DALI takes 36 ms to resize a clip of 32 frames to 128x128, and torch's vectorised resize of bytes takes 1.7
ms (one Zen 4 core). `Resize` gives torch's result, bit for bit, in less time: it reads a box of frames in place, and
two channels of flow without a third. The result differs from PIL's by one or two levels of 255, and by up to five in
some pixels of boxes that are taller than wide, where Pillow resizes the columns first. `finish.py` gives the same
comparison for colour and blur.

Clips are cut while they are decoded, up to 32 frames at a time, so that long decoded clips are never held in memory.
Holding the complete clips of a batch required new memory pages at every step. This took 7 ms for a clip of 320x240,
whereas copying the clip takes 0.3 ms.

Letters: M clips, T frames of a clip, F some of them, H x W pixels of a region, S side of the square output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from cpr_fast._host import Resize
from cpr_fast.config import DataConfig
from cpr_fast.data.clips.finish import finish_clip
from cpr_fast.data.clips.sampling import IIC_FRAME, IIC_SIDE, Clips, clip_frames
from cpr_fast.data.video.decode import PART
from cpr_fast.data.video.pixels import Region


def needed_region(clips: Clips, height: int, width: int, data: DataConfig) -> Region:
    """Returns the part of the frames that the clips of one video need: the box around the boxes of all clips, or with
    `data.augment = "iic"` the whole frame."""
    if data.augment == "iic":
        return Region.whole(height, width)
    (top, left), (bottom, right) = clips.box[:, :2].min(axis=0), clips.box[:, 2:].max(axis=0)
    return Region((int(top), int(left), int(bottom), int(right)), height, width)


def cut_clips(
    parts: Iterable[np.ndarray],
    clips: Clips,
    view: str,
    data: DataConfig,
    region: Region,
    *,
    finish: bool,
    frames: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Cuts the planned clips of one video as `ClipGraph` takes them: M arrays, uint8 [T, S, S, 3].

    `parts` yields the distinct frames that the clips need, in increasing order and a few at a time, each cut to
    `region`: uint8 [F, H, W, C]. `frames` are the numbers of all frames of the clips in the file, int64 [M, T]; by
    default those of the plan. With `finish` colours, blur and flip are applied here, not in the graph. Flow (u, v)
    comes out in the published channel order (128, v, u), with the constant first, as PIL reads the published BGR files.
    """
    frames = np.stack([clip_frames(start, data) for start in clips.start]) if frames is None else frames
    numbers = np.unique(frames)
    cutters = [_cutter(box, data, region) for box in clips.box]
    out, done = np.empty((*frames.shape, data.size, data.size, 3), np.uint8), 0
    for pixels in _small(parts):
        here = numbers[done : done + len(pixels)]
        done += len(pixels)
        for clip, wanted, cutter in zip(out, frames, cutters, strict=True):
            begin, end = np.searchsorted(wanted, (here[0], here[-1] + 1))
            if begin < end:
                _cut_rows(cutter, pixels, np.searchsorted(here, wanted[begin:end]), clip[begin:end])
    if finish:
        for row, clip in enumerate(out):
            finish_clip(clip, clips[row : row + 1], view, data)
    return list(out)


def _cut_rows(
    cutter: Callable[[np.ndarray, np.ndarray], None], pixels: np.ndarray, rows: np.ndarray, out: np.ndarray
) -> None:
    """Cuts pixels[rows] into `out`. Rows that a short video repeats are cut once: 32 8K frames take 3 GB."""
    distinct, places = np.unique(rows, return_inverse=True)
    if len(distinct) == len(rows):
        cutter(taken(pixels, rows), out)
        return
    small = np.empty((len(distinct), *out.shape[1:]), np.uint8)
    cutter(taken(pixels, distinct), small)
    out[:] = small[places]


def taken(pixels: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns pixels[rows], without a copy if the rows are consecutive (a stride of 1, no padding)."""
    if rows[-1] - rows[0] == len(rows) - 1 and np.all(np.diff(rows) == 1):
        return pixels[rows[0] : rows[-1] + 1]
    return pixels[rows]


def _small(parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for part in parts:
        for begin in range(0, len(part), PART):
            yield part[begin : begin + PART]


def _cutter(box: np.ndarray, data: DataConfig, region: Region) -> Callable[[np.ndarray, np.ndarray], None]:
    """Returns the function (frames, out) that cuts frames of one planned clip: uint8 [F, H, W, C] -> [F, S, S, 3]. Flow
    (u, v) becomes (128, v, u).

    With `data.augment = "iic"`, as published, the whole frame is resized to 128x171, a square of 112 is cropped, and
    the square is resized to S.
    """
    side = (data.size, data.size)
    if data.augment == "iic":
        sides = (region.height, region.width)
        top, left = (round(float(box[i]) * IIC_FRAME[i] / sides[i]) for i in (0, 1))
        whole, square = Resize(sides, IIC_FRAME, "bilinear"), Resize((IIC_SIDE, IIC_SIDE), side, "bilinear")

        def cut(frames: np.ndarray, out: np.ndarray) -> None:
            small = np.empty((len(frames), *IIC_FRAME, 3), np.uint8)
            whole(frames, small)
            square(small[:, top : top + IIC_SIDE, left : left + IIC_SIDE], out)
    else:
        top, left, bottom, right = (int(edge) for edge in box - np.tile(region.box[:2], 2))
        resize = Resize((bottom - top, right - left), side, "bicubic")

        def cut(frames: np.ndarray, out: np.ndarray) -> None:
            resize(frames[:, top:bottom, left:right], out)

    return cut
