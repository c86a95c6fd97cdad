"""Determines the properties of a video file by decoding it or by counting its packets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from cpr_fast.data.video.container import VideoError, holds_frame, open_video, shows_times, video_streams

ASSUMED_FPS = 25.0  # of a video whose file says nothing about its frame rate
FPS_LIMIT = 1000  # frames per second; such a "rate" is the clock of the file, as 60,000 for DV and 1,000 for ASF


@dataclass(frozen=True)
class VideoInfo:
    """The properties of a video, as found by reading it instead of from its header.

    Attributes:
        num_frames: Frames that decode, up to the end of the file, an `error`, or a change of the frame size.
        fps: Frames per second: those that the file states, unless the times of its frames contradict them; of a
            variable rate the mean between the first and the last frame; 0 if neither gives a rate below FPS_LIMIT.
        width: Pixels, as stored, before any rotation.
        height: Pixels.
        codec: FFmpeg's name of the codec.
        error: Why decoding ended early; "" if it reached the end of the file.
        rotation: Degrees by which a player turns the stored picture counter-clockwise.
        variable_rate: Whether the frames are not evenly spaced in time.
        corrupt: Frames that the decoder repaired because their data are damaged.
        first_corrupt: Number of the first such frame, -1 if there is none.
        size_change: How the frame size or pixel format changes after `num_frames` frames; "" if it does not.
        streams: Which of several video streams was read; "" if there is one.
    """

    num_frames: int
    fps: float
    width: int
    height: int
    codec: str
    error: str = ""
    rotation: int = 0
    variable_rate: bool = False
    corrupt: int = 0
    first_corrupt: int = -1
    size_change: str = ""
    streams: str = ""


def probe_video(path: str | Path, *, decode: bool = True) -> VideoInfo:
    """Returns the properties of a video, found by decoding it completely; with `decode=False`, only its first frame is
    decoded and its packets are counted.

    Damaged frames and changes of the frame size are found only by decoding. Raises VideoError if no frame decodes.
    """
    found = _Frames()
    facts: dict = {}
    error = ""
    try:
        with open_video(path) as (container, stream):
            facts = {
                "fps": float(frame_rate(stream) or 0),
                "codec": stream.codec_context.codec.canonical_name,
                "streams": which_stream(container, stream),
            }
            clocked, clock = shows_times(container), stream.time_base
            for packet in container.demux(stream):
                frames = stream.codec_context.decode(packet) if decode or found.first is None else []
                if decode:
                    for frame in frames:
                        found.add(frame)
                    if found.size_change:
                        break
                    continue
                found.first = found.first or next(iter(frames), None)
                if holds_frame(packet):
                    found.times.append(packet.pts)
    except VideoError as failure:
        if found.first is None:
            raise
        error = failure.reason
    if found.first is None:
        raise VideoError(path, "no frame decodes")
    first = found.first
    variable = clocked and _irregular(found.times)
    measured = _measured_rate(found.times, clock)
    if not facts["fps"] or variable or (clocked and _misplaces(facts["fps"], measured, found.times)):
        facts["fps"] = measured or facts["fps"]
    info = VideoInfo(len(found.times), width=first.width, height=first.height, error=error, **facts)
    return replace(
        info,
        rotation=first.rotation % 360,
        variable_rate=variable,
        corrupt=len(found.corrupt),
        first_corrupt=found.corrupt[0] if found.corrupt else -1,
        size_change=found.size_change,
    )


def frame_rate(stream: av.VideoStream) -> Fraction | None:
    """Returns the frames per second that the container states, or that FFmpeg guessed when it opened the file; None if
    neither is a frame rate."""
    stated = (Fraction(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate)  # PyAV 19: its own type
    return next((rate for rate in stated if 0 < rate < FPS_LIMIT), None)


def _misplaces(stated: float, measured: float, times: Sequence[int | None]) -> bool:
    """Returns whether the rate that a file states contradicts the times of its frames, all known, by a frame or more
    over the length of the video."""
    return measured > 0 and None not in times and abs(stated / measured - 1) * (len(times) - 1) >= 1


def _measured_rate(times: Sequence[int | None], clock: Fraction | None) -> float:
    """Returns the frames per second of these times, in units of `clock` seconds; 0 if they do not tell."""
    known = [time for time in times if time is not None]
    span = (max(known) - min(known)) * (clock or 0) if known else 0
    rate = float((len(known) - 1) / span) if span else 0.0
    return rate if rate < FPS_LIMIT else 0.0


class _Frames:
    """The decoded frames of a video up to a change of size: the first, all times, and which are damaged."""

    def __init__(self) -> None:
        self.first: av.VideoFrame | None = None
        self.times: list[int | None] = []  # the time of every frame, or packet, in units of the stream's time base
        self.corrupt: list[int] = []
        self.size_change = ""

    def add(self, frame: av.VideoFrame) -> None:
        """Adds the next frame in presentation order; frames after a change of size are not counted."""
        if self.first is None:
            self.first = frame
        before, after = ((f.width, f.height, f.format.name) for f in (self.first, frame))
        if self.size_change or before != after:
            self.size_change = self.size_change or "from {}x{} {} to {}x{} {}".format(*before, *after)
            return
        if frame.is_corrupt:
            self.corrupt.append(len(self.times))
        self.times.append(frame.pts)


def which_stream(container: av.container.InputContainer, chosen: av.VideoStream) -> str:
    """Returns which of several video streams is read, "" if there is one. Cover art does not count."""
    streams = video_streams(container)
    if len(streams) < 2:
        return ""
    sizes = {
        stream.index: "of an unknown codec" if stream.codec_context is None else f"{stream.width}x{stream.height}"
        for stream in streams
    }
    others = ", ".join(f"{index} ({size})" for index, size in sorted(sizes.items()) if index != chosen.index)
    return f"reads video stream {chosen.index} ({sizes[chosen.index]}), the first or default one, not {others}"


def _irregular(times: Sequence[int | None]) -> bool:
    """Returns whether frames shown at these times (in any order and unit) have a variable rate.

    A step is irregular if it differs from the median step by more than a quarter, and by more than rounding to a coarse
    clock explains. One irregular step in a hundred is tolerated, unless it is so long that the mean step differs from
    the median step as much. If any time is unknown (None), the result is False.
    """
    known = np.sort(np.array([time for time in times if time is not None], np.int64))
    if len(known) < 3 or len(known) < len(times):
        return False
    steps = np.diff(known)
    middle = np.median(steps)
    odd = np.abs(steps - middle) > middle / 4 + (middle > 2)
    gap = steps.mean() - middle > middle / 4 + (middle > 2)
    return bool(gap or odd.sum() > max(1, 0.01 * len(steps)))
