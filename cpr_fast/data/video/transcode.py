"""Videos encoded anew for training: one codec and size, short groups of pictures, upright, at a constant rate."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from cpr_fast.data.video.container import VideoError
from cpr_fast.data.video.probe import VideoInfo

OPTIONS = {"preset": "veryfast", "crf": "18", "g": "12", "bf": "0", "threads": "1"}


def transcode_video(path: Path, target: Path, short_side: int) -> VideoInfo:
    """Writes every frame of `path` that decodes to `target`, an mp4 file, and says what `target` holds.

    H.264 with a key frame every 12 and no B-frames, so that any clip starts within 12 frames; the short side at most
    `short_side` pixels, both sides even; turned as a player would show it; frame by frame at the average rate. The
    file appears under its name only when complete. Raises VideoError where no frame decodes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.part")
    count, error = 0, ""
    scaler = VideoReformatter()
    try:
        with av.open(str(temporary), "w", format="mp4") as output:
            stream: av.VideoStream | None = None
            try:
                with av.open(str(path)) as source:
                    source.streams.video[0].codec_context.thread_count = 1
                    for frame in source.decode(video=0):
                        picture = _upright(frame, scaler)
                        if stream is None:
                            rate = source.streams.video[0].average_rate or Fraction(25)
                            stream = output.add_stream("libx264", rate=rate.limit_denominator(1001), options=OPTIONS)
                            stream.height, stream.width = _size(picture.height, picture.width, short_side)
                            stream.pix_fmt = "yuv420p"
                        picture = scaler.reformat(
                            picture, stream.width, stream.height, "yuv420p", interpolation=Interpolation.BICUBIC
                        )
                        picture.pts, picture.time_base = count, 1 / stream.codec_context.framerate
                        output.mux(stream.encode(picture))
                        count += 1
            except (av.FFmpegError, OSError, IndexError) as failure:
                error = getattr(failure, "strerror", None) or str(failure)
            if stream is None:
                raise VideoError(path, error or "no frame decodes")
            output.mux(stream.encode(None))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return VideoInfo(count, float(stream.codec_context.framerate), stream.width, stream.height, "h264", error)


def _upright(frame: av.VideoFrame, scaler: VideoReformatter) -> av.VideoFrame:
    """The frame as a player shows it."""
    if frame.rotation % 360 == 0:
        return frame
    pixels = scaler.reformat(frame, format="rgb24").to_ndarray()
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90)), format="rgb24")


def _size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """The shape scaled so that its short side is at most `short_side`, rounded to even numbers."""
    scale = min(1.0, short_side / min(height, width))
    return tuple(max(2, 2 * round(side * scale / 2)) for side in (height, width))
