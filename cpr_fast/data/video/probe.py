"""What a video file really holds, found by decoding it or by counting its packets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpr_fast.data.video.container import VideoError, holds_frame, open_video, shows_times


@dataclass(frozen=True)
class VideoInfo:
    """What a video really holds: `num_frames` frames decode, then comes its end or `error` ("" at a clean end)."""

    num_frames: int
    fps: float
    width: int  # as stored, before any rotation
    height: int
    codec: str
    error: str = ""
    rotation: int = 0  # degrees by which a player turns the stored picture counter-clockwise
    variable_rate: bool = False


def probe_video(path: str | Path, *, decode: bool = True) -> VideoInfo:
    """Decodes the whole video and says what came out, or, without `decode`, its first frame and counts packets.

    Raises VideoError if no frame decodes.
    """
    times: list[int | None] = []  # of every frame, or packet, in the file's clock
    first, error = None, ""
    try:
        with open_video(path) as (container, stream):
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            codec, clocked = stream.codec_context.codec.canonical_name, shows_times(container)
            for packet in container.demux(stream):
                frames = stream.codec_context.decode(packet) if decode or first is None else []
                first = first or next(iter(frames), None)
                if decode:
                    times += [frame.pts for frame in frames]
                elif holds_frame(packet):
                    times.append(packet.pts)
    except VideoError as failure:
        if first is None:
            raise
        error = failure.reason
    if first is None:
        raise VideoError(path, "no frame decodes")
    variable = clocked and _irregular(times)
    return VideoInfo(len(times), rate, first.width, first.height, codec, error, first.rotation % 360, variable)


def _irregular(times: Sequence[int | None]) -> bool:
    """Whether frames shown at these times (any order and unit) have a variable rate; times may be unknown.

    A step is irregular if it differs from the median by more than a quarter (and by more than rounding to a coarse
    clock explains); one in a hundred is forgiven.
    """
    known = np.sort(np.array([time for time in times if time is not None], np.int64))
    if len(known) < 3 or len(known) < len(times):
        return False
    steps = np.diff(known)
    middle = np.median(steps)
    odd = np.abs(steps - middle) > middle / 4 + (middle > 2)
    return bool(odd.sum() > max(1, 0.01 * len(steps)))
