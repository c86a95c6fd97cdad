"""A video file opened with PyAV: its first video stream, and failures as `VideoError`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av

UNPROBED = {"codec_whitelist": "none", "probesize": "32"}  # the opening of a container decodes nothing


class VideoError(RuntimeError):
    """A video cannot be read: `path` says which, `reason` why."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"video {str(path)!r}: {reason}")
        self.path, self.reason = Path(path), reason


def shows_times(container: av.container.InputContainer) -> bool:
    """Whether packets carry times of presentation; those of AVI, called so, are times of decoding."""
    return container.format.name != "avi"


def holds_frame(packet: av.Packet) -> bool:
    return bool(packet.size) and not packet.is_discard


@contextmanager
def open_video(path: str | Path, *, probe: bool = True) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The file and its first video stream; every failure of FFmpeg inside the block becomes a VideoError.

    Without `probe` no frame is decoded to learn what the container does not say, such as the rate; that takes ten times
    as long as the rest, and frames come out the same but from streams that do not say how they are reordered.
    """
    try:
        options = {} if probe else UNPROBED
        with av.open(str(path), container_options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise VideoError(path, "holds no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise VideoError(path, "is of a codec that has no decoder here")
            stream.codec_context.thread_count = 1  # videos are decoded in parallel, not the frames of one
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise VideoError(path, error.strerror or str(error) or type(error).__name__) from error
