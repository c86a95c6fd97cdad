"""Reads motion vectors while a video is decoded, and turns those of each frame into a field of motion.

A vector says for a block of a frame where in another frame, its reference, the encoder found similar pixels. Its motion
per frame is the vector divided by the distance of the two frames. FFmpeg tells only whether the reference is shown
before or after the frame (`AVMotionVector`, libavutil/motion_vector.h), so it is taken to be the nearest frame on that
side to which the frame may refer: of H.264 one that was decoded before and is marked as a reference, of MPEG-4 one that
is no B-frame. With several reference frames that is an approximation. Blocks without a vector, which are coded by
themselves, and whole frames of such blocks have no motion. In B-frames of MPEG-4, FFmpeg exports vectors of 0 for
blocks of direct mode; these frames have the motion per frame of the next frame of another kind, whose vectors span
them.

Letters: F fields, N frames of a video, h x w cells of CELL x CELL pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from cpr_fast.data.video.bitstream import is_reference
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
        VideoError: the codec exports no vectors, every frame is a key frame, a frame does not decode or has another
            size, or the file has fewer frames.
    """
    low, high = max(first - MOST_BETWEEN, 0), min(last + 1 + MOST_BETWEEN, num_frames - 1)
    known = known_layout(path, num_frames)
    if known is not None and known.only_keys:
        raise VideoError(
            path, "data.flow = 'vectors' reads motion vectors, but every frame is a key frame: it has none"
        )
    form = None if known is None else known.format
    with open_video(path, probe=known is None or known.probe, known_format=form) as (container, stream):
        if stream.codec_context.name not in CODECS:
            raise VideoError(
                path,
                f"data.flow = 'vectors' reads the motion vectors of H.264 and MPEG-4, got {stream.codec_context.name}",
            )
        stream.codec_context.options = OPTIONS
        packets, checked = _Packets(stream.codec_context), _Checked(path, region)
        wanted = list(range(low, high + 1))
        frames = decode_frames(container, stream, known, wanted, watch=packets.watch)
        found = _read(packets, map(checked, frames), last + 1)
    numbers = range(first + 1, last + 2)
    if missing := [number for number in numbers if number not in found]:
        raise VideoError(path, f"frame {missing[0]} of {num_frames} does not decode")
    sources = [_source(found, number) for number in numbers]
    fields = {n: field_of(found[n], _distance(found, n, -1), _distance(found, n, 1)) for n in set(sources)}
    return np.stack([fields[number] for number in sources]), checked.region


def codec_without_vectors(path: Path) -> str | None:
    """Returns FFmpeg's name of the codec of a video that has no motion vectors for `read_fields`; None if it has them,
    or if the file cannot be opened."""
    try:
        with open_video(path) as (_, stream):
            codec = stream.codec_context.name
    except VideoError:
        return None
    return None if codec in CODECS else codec


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


@dataclass(frozen=True)
class _Coded:
    """What is needed of a decoded frame."""

    vectors: np.ndarray | None  # AVMotionVector [M]
    size: tuple[int, int]  # height and width, pixels
    bidirectional: bool  # of kind B
    order: int | None  # its place in decoding order, if known
    reference: bool  # whether other frames may refer to it

    def may_refer_to(self, other: _Coded, *, before: bool) -> bool:
        """Returns whether its vectors may point to another frame, which is shown before or after it."""
        if None in (self.order, other.order):
            return other.reference and (before or self.bidirectional)
        return other.reference and other.order < self.order


class _Packets:
    """Remembers of each packet, by its time, its place in decoding order and whether it is one of a reference."""

    def __init__(self, decoder: av.VideoCodecContext) -> None:
        self._decoder, self._seen = decoder, {}

    def watch(self, packet: av.Packet) -> None:
        if self._decoder.name == "h264":
            self._seen[packet.pts] = len(self._seen), is_reference(packet, self._decoder)

    def coded(self, frame: av.VideoFrame) -> _Coded:
        data, is_b = frame.side_data.get("MOTION_VECTORS"), frame.pict_type == BIDIRECTIONAL
        order, reference = self._seen.get(frame.pts, (None, not is_b))
        unused = data is None or (is_b and self._decoder.name == "mpeg4")
        vectors = None if unused else data.to_ndarray()
        return _Coded(vectors, (frame.height, frame.width), is_b, order, reference)


def _read(packets: _Packets, frames: Iterator[tuple[int, av.VideoFrame]], last: int) -> dict[int, _Coded]:
    """Returns the frames by number, up to one from `last` on that is not of kind B, to which all before may refer."""
    found = {}
    for number, frame in frames:
        found[number] = packets.coded(frame)
        if number >= last and not found[number].bidirectional:
            break
    return found


def _source(frames: dict[int, _Coded], number: int) -> int:
    """Returns the number of the frame whose vectors tell the motion to a frame: of a B-frame without vectors it is the
    next frame of another kind, whose vectors span the motion since the previous one."""
    later = number
    while later in frames and frames[later].bidirectional and frames[later].vectors is None:
        later += 1
    return later if later in frames else number


def _distance(frames: dict[int, _Coded], number: int, step: int) -> int:
    """Returns the distance of a frame from the nearest one before (step -1) or after it (1) to which it may refer."""
    for away in range(1, MOST_BETWEEN + 1):
        other = frames.get(number + step * away)
        if other is not None and frames[number].may_refer_to(other, before=step < 0):
            return away
    return 1


def field_of(coded: _Coded, since: int, until: int) -> np.ndarray:
    """Returns the motion of each cell of a frame per frame, float32 [h, w, 2]: the mean of its vectors.

    `since` and `until` are the distances, in frames, of the references before and after the frame.
    """
    height, width = (-(-side // MACROBLOCK) * (MACROBLOCK // CELL) for side in coded.size)
    motion, vectors = np.zeros((height * width, 2), np.float32), coded.vectors
    if vectors is None:
        return motion.reshape(height, width, 2)
    count = np.zeros((len(motion), 1), np.float32)
    scale = vectors["motion_scale"] * np.where(vectors["source"] < 0, -since, until).astype(np.float32)
    each = np.stack([vectors["motion_x"], vectors["motion_y"]], axis=1, dtype=np.float32) / scale[:, None]
    tall, wide = vectors["h"].astype(np.int64), vectors["w"].astype(np.int64)
    corner = (vectors["dst_y"] - tall // 2) // CELL * width + (vectors["dst_x"] - wide // 2) // CELL
    for side in (vectors["source"] < 0, vectors["source"] > 0):  # the blocks of a side do not overlap
        vector, cells = _covered(np.flatnonzero(side), corner, tall // CELL, wide // CELL, width)
        motion[cells] += each[vector]
        count[cells] += 1
    return (motion / np.maximum(count, 1)).reshape(height, width, 2)


def _covered(
    chosen: np.ndarray, corner: np.ndarray, rows: np.ndarray, columns: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns each cell that the `chosen` blocks cover, and the number of its block, both int64.

    A block covers `rows` times `columns` cells from its `corner` on, of a picture with `width` cells in a row.
    """
    sizes = rows[chosen] * columns[chosen]
    vector = chosen.repeat(sizes)
    place = np.arange(len(vector)) - (sizes.cumsum() - sizes).repeat(sizes)
    row, column = np.divmod(place, columns[vector])
    return vector, corner[vector] + row * width + column
