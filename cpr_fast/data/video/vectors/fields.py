"""Reads motion vectors while a video is decoded, and turns those of each frame into a field of motion.

A vector says for a block of a frame where in another frame, its reference, the encoder found similar pixels. Its motion
per frame is the vector divided by the distance of the two frames. FFmpeg tells only whether the reference is shown
before or after the frame (`AVMotionVector`, libavutil/motion_vector.h), so it is taken to be the nearest frame of
another kind than B on that side; with several reference frames that is an approximation. Blocks without a vector, which
are coded by themselves, and whole frames of such blocks have no motion.

Letters: F fields, N frames of a video, h x w cells of CELL x CELL pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from cpr_fast.data.video.container import VideoError, open_video
from cpr_fast.data.video.decode import decode_frames, known_layout, refuse_rotation
from cpr_fast.data.video.pixels import Region

CELL, MACROBLOCK = 4, 16  # pixels; the side of the smallest and of the largest block of H.264
MOST_BETWEEN = 17  # frames between two neighbours of which none is of kind B: x264 writes at most 16
CODECS = ("h264", "mpeg4")  # decoders that export vectors and that tests cover
# The pixels do not matter, only the vectors, which no filter changes: 35 % more frames of H.264 per second.
OPTIONS = {"flags2": "+export_mvs", "skip_loop_filter": "all"}
BIDIRECTIONAL = av.video.frame.PictureType.B


def read_fields(
    path: Path, first: int, last: int, num_frames: int, region: Region | None = None
) -> tuple[np.ndarray, Region]:
    """Returns the motion between neighbouring frames, float32 [F, h, w, 2] (u, v) in pixels, right and down positive,
    and the region that is wanted of it: the given one, or the whole frames.

    Field n of the result is the motion from frame first + n to the next one, in the cells of the latter; it does not
    depend on which other fields are read. The cells cover whole macroblocks, so they may exceed the frame.

    Args:
        first, last: Numbers of the first and the last field, in 0 .. N - 2.
        num_frames: N, frames of the video according to the index.
        region: Part of frames of the size that the index lists.
    Raises:
        VideoError: the codec exports no vectors, a frame does not decode or has another size, or the file has fewer
            frames.
    """
    low, high = max(first - MOST_BETWEEN, 0), min(last + 1 + MOST_BETWEEN, num_frames - 1)
    known = known_layout(path, num_frames)
    form = None if known is None else known.format
    with open_video(path, probe=known is None or known.probe, known_format=form) as (container, stream):
        if stream.codec_context.name not in CODECS:
            raise VideoError(
                path,
                f"data.flow = 'vectors' reads the motion vectors of H.264 and MPEG-4, got {stream.codec_context.name}",
            )
        stream.codec_context.options = OPTIONS
        frames = decode_frames(container, stream, known, list(range(low, high + 1)))
        checked = _Checked(path, region)
        fields = dict(_fields(map(checked, frames), last + 1))
    numbers = range(first + 1, last + 2)
    if missing := [number for number in numbers if number not in fields]:
        raise VideoError(path, f"frame {missing[0]} of {num_frames} does not decode")
    return np.stack([fields[number] for number in numbers]), checked.region


class _Checked:
    """Checks the size and the rotation of frames; `region` is the whole of the first one if none is given."""

    def __init__(self, path: Path, region: Region | None) -> None:
        self._path, self.region = path, region

    def __call__(self, numbered: tuple[int, av.VideoFrame]) -> tuple[int, av.VideoFrame]:
        frame = numbered[1]
        self.region = self.region or Region.whole(frame.height, frame.width)
        self.region.check(self._path, frame.height, frame.width, "rgb")
        refuse_rotation(self._path, frame)
        return numbered


def _fields(frames: Iterator[tuple[int, av.VideoFrame]], last: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (number of a frame, its field) up to frame `last`, and may yield later ones."""
    before: int | None = None  # the last frame that is not of kind B
    waiting: list[tuple[int, av.VideoFrame]] = []  # frames of kind B since
    for number, frame in frames:
        if frame.pict_type == BIDIRECTIONAL:
            waiting.append((number, frame))
            continue
        for place, held in waiting:
            yield place, field_of(held, place - before if before is not None else 1, number - place)
        yield number, field_of(frame, number - before if before is not None else 1, 1)
        before, waiting = number, []
        if number >= last:
            return
    for place, held in waiting:  # at the end of the video
        yield place, field_of(held, place - before if before is not None else 1, 1)


def field_of(frame: av.VideoFrame, since: int, until: int) -> np.ndarray:
    """Returns the motion of each cell of a frame per frame, float32 [h, w, 2]: the mean of its vectors.

    `since` and `until` are the distances, in frames, of the references before and after the frame.
    """
    sides = [-(-side // MACROBLOCK) * (MACROBLOCK // CELL) for side in (frame.height, frame.width)]
    motion, count = np.zeros((sides[0] * sides[1], 2), np.float32), np.zeros((sides[0] * sides[1], 1), np.float32)
    data = frame.side_data.get("MOTION_VECTORS")
    if data is None:
        return motion.reshape(*sides, 2)
    vectors = data.to_ndarray()
    scale = vectors["motion_scale"] * np.where(vectors["source"] < 0, -since, until).astype(np.float32)
    each = np.stack([vectors["motion_x"], vectors["motion_y"]], axis=1) / scale[:, None]
    width, height = vectors["w"].astype(np.int64), vectors["h"].astype(np.int64)
    corner = (vectors["dst_y"] - height // 2) // CELL * sides[1] + (vectors["dst_x"] - width // 2) // CELL
    kind = (vectors["source"] > 0) * 65536 + height * 256 + width
    for some in np.unique(kind):  # no two vectors of a kind cover the same cell
        chosen = np.flatnonzero(kind == some)
        rows, columns = np.arange(height[chosen[0]] // CELL), np.arange(width[chosen[0]] // CELL)
        cells = corner[chosen, None] + np.add.outer(rows * sides[1], columns).ravel()
        motion[cells] += each[chosen, None]
        count[cells] += 1
    return (motion / np.maximum(count, 1)).reshape(*sides, 2)
