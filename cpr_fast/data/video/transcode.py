"""Re-encodes videos for training: one codec, a bounded size, short groups of pictures, upright."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from cpr_fast.data.files.access import storage_of
from cpr_fast.data.files.local import local_file
from cpr_fast.data.files.names import is_remote, plain_path
from cpr_fast.data.files.ranges import MOST_BYTES
from cpr_fast.data.video.container import VideoError, open_video
from cpr_fast.data.video.probe import ASSUMED_FPS, VideoInfo, probe_video
from cpr_fast.errors import InputError
from cpr_fast.runtime.files import created, naming, replacing, temporary_folder

OPTIONS = {"preset": "veryfast", "crf": "18", "g": "12", "bf": "0", "threads": "1"}
KEPT = "complete videos are kept, and the same command continues after them"


def transcode_video(path: Path, target: Path, short_side: int) -> VideoInfo:
    """Writes every frame of `path` that decodes to the mp4 file `target`, and returns the properties of `target`.

    The result is H.264 with a key frame every 12 frames and no B-frames, so that decoding of any clip starts at most 12
    frames before it. The short side has at most `short_side` pixels and both sides are even. Rotated videos are turned
    as a player would show them. Frames of a variable rate keep their presentation times, in the clock of the source,
    and others come at the rate that `probe_video` finds. Frames of another size than the first are scaled to it. The
    file appears under its name only when complete. A video on a server is fetched once, to a temporary file beside
    `target`. Raises VideoError if no frame decodes.
    """
    if is_remote(path):
        with _fetched(path, target) as copy:
            try:
                return transcode_video(copy, target, short_side)
            except VideoError as failure:
                raise VideoError(path, failure.reason, unreadable=failure.unreadable) from failure
    error: VideoError | None = None
    with (
        replacing(target, KEPT, durable=True) as temporary,
        av.open(local_file(temporary), "w", format="mp4") as output,
    ):
        writer = _Writer(output, target, short_side)
        try:
            with open_video(path) as (container, stream):
                known = probe_video(path, decode=False)  # the encoder is opened before the last frame is known
                writer.streams, writer.rate = known.streams, Fraction(known.fps or ASSUMED_FPS)
                writer.clock = stream.time_base if known.variable_rate else None
                for frame in container.decode(stream):
                    writer.add(frame)
        except VideoError as failure:
            error = failure
        if writer.stream is None:
            raise error or VideoError(path, "no frame decodes")
        output.mux(writer.stream.encode(None))
    return writer.info(error)


@contextmanager
def _fetched(path: Path, target: Path) -> Iterator[Path]:
    """Yields a copy of a video on a server in a temporary folder beside `target`. Raises VideoError if it cannot be
    read, and InputError if the disk is full."""
    with naming(target, KEPT), created(target.parent), temporary_folder(target.parent) as folder:
        copy = folder / plain_path(path).name  # its suffix, too, tells FFmpeg the format
        with open(copy, "wb") as file:
            for part in _parts(path):
                file.write(part)
        yield copy


def _parts(path: Path) -> Iterator[bytes]:
    """Yields the bytes of a video on a server. Raises VideoError."""
    try:
        storage = storage_of(path)
        for start in range(0, storage.size(path), MOST_BYTES):
            yield storage.read_range(path, start, MOST_BYTES)
    except OSError as error:
        raise VideoError(path, error.strerror or str(error), unreadable=True) from error


class _Writer:
    """Encodes frames, all of them scaled to the size that the first one gives.

    Attributes:
        rate: their mean number per second.
        clock: seconds of a unit of their times; None if they are evenly spaced.
    """

    rate: Fraction
    clock: Fraction | None

    def __init__(self, output: av.container.OutputContainer, target: Path, short_side: int) -> None:
        self._output, self._target = output, target
        self._short_side, self._scaler = short_side, VideoReformatter()
        self.stream: av.VideoStream | None = None
        self.streams = ""  # which of several was read
        self._count, self._corrupt = 0, []
        self._first, self._time = 0, -1  # the time of the first frame in the source, and of the last one here

    def add(self, frame: av.VideoFrame) -> None:
        """Encodes a frame; the first one opens the stream. Raises InputError if the file cannot be written."""
        if frame.is_corrupt:
            self._corrupt.append(self._count)
        picture = _upright(frame, self._scaler)
        if self.stream is None:
            self.stream = self._output.add_stream("libx264", rate=self.rate.limit_denominator(1001), options=OPTIONS)
            self.stream.height, self.stream.width = _size(picture.height, picture.width, self._short_side)
            self.stream.pix_fmt = "yuv420p"
            if self.clock is not None:
                self.stream.codec_context.time_base = self.clock
                self._first = frame.pts or 0
        stream = self.stream
        picture = self._scaler.reformat(
            picture, stream.width, stream.height, "yuv420p", interpolation=Interpolation.BICUBIC
        )
        if self.clock is None:
            picture.pts, picture.time_base = self._count, 1 / stream.codec_context.framerate
        else:
            time = self._time + 1 if frame.pts is None else frame.pts - self._first
            self._time = max(time, self._time + 1)
            picture.pts, picture.time_base = self._time, self.clock
        try:
            self._output.mux(stream.encode(picture))
        except av.FFmpegError as error:  # a full disk must not look like the end of the source
            raise InputError(f"could not write {str(self._target)!r}: {error.strerror}; {KEPT}") from error
        self._count += 1

    def info(self, error: VideoError | None) -> VideoInfo:
        """Returns the properties of the written video; `error` is what ended the source early, if anything."""
        fps, first = float(self.stream.codec_context.framerate), self._corrupt[0] if self._corrupt else -1
        if self.clock is not None and self._time > 0:
            fps = float((self._count - 1) / (self._time * self.clock))
        return VideoInfo(
            self._count, fps, self.stream.width, self.stream.height, "h264", error.reason if error else "",
            variable_rate=self.clock is not None, corrupt=len(self._corrupt), first_corrupt=first,
            streams=self.streams,
        )  # fmt: skip


def _upright(frame: av.VideoFrame, scaler: VideoReformatter) -> av.VideoFrame:
    """Returns the frame as a player shows it."""
    if frame.rotation % 360 == 0:
        return frame
    pixels = scaler.reformat(frame, format="rgb24").to_ndarray()
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90)), format="rgb24")


def _size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Returns (height, width) scaled so that the short side is at most `short_side`, rounded to even numbers."""
    scale = min(1.0, short_side / min(height, width))
    return tuple(max(2, 2 * round(side * scale / 2)) for side in (height, width))
