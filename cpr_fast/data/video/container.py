"""Opens a video file with PyAV, chooses its video stream, and converts every error to a `VideoError`."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import av.stream
from av.stream import Disposition

from cpr_fast.data.files.access import ffmpeg_input, storage_of
from cpr_fast.data.files.names import text_of
from cpr_fast.data.video.contents import what_it_is
from cpr_fast.wording import counted

UNPROBED = {"codec_whitelist": "none", "probesize": "32"}  # options with which opening a container decodes no frame
# A title that is not UTF-8 must not prevent a file from being opened. PyAV 19 and newer accept it without this option.
ANY_METADATA = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
# Formats that FFmpeg recognises by the content of a file, whatever its name, and that name further files to read: their
# frames change with those files, and a data set from elsewhere could name any file of this machine.
PLAYLISTS = ("concat", "hls", "dash", "imf", "sdp", "rtsp", "webm_dash_manifest")
DISCARD = getattr(av.stream, "Discard", None)  # versions before PyAV 18 cannot make a demultiplexer skip a stream
NO_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image


class VideoError(RuntimeError):
    """A video cannot be read.

    Attributes:
        path: The video.
        reason: Why it cannot be read.
        unreadable: True if the operating system could not read the bytes (a lost mount, missing permission), so that a
            later attempt may succeed; False if the bytes are not a video that decodes.
    """

    def __init__(self, path: str | Path, reason: str, *, unreadable: bool = False) -> None:
        super().__init__(f"video {text_of(Path(path))!r}: {reason}")
        self.path, self.reason, self.unreadable = Path(path), reason, unreadable


def not_as_listed(path: str | Path, found: str, listed: str) -> VideoError:
    """Returns the error about a whole video that its row in the index describes wrongly: what the file has, and what
    the index says instead, such as "holds 20 frames" and "25"."""
    return VideoError(
        path,
        f"{found}, the index says {listed}: correct its row, or list the videos again with `cpr-fast index`; "
        "`cpr-fast doctor` compares the other rows with their files",
    )


def fewer_than_listed(path: str | Path, held: int, num_frames: int, view: str) -> VideoError:
    """Returns the error about a file that holds fewer than the `num_frames` frames of `view` that follow from its row
    in the index; a file of flow holds one field less than its video has frames."""
    if view == "flow":
        return not_as_listed(path, f"holds {counted(held, 'field')} of flow", f"{num_frames + 1:,} frames")
    return not_as_listed(path, f"holds {counted(held, 'frame')}", f"{num_frames:,}")


def shows_times(container: av.container.InputContainer) -> bool:
    """Returns whether packets carry presentation times; the times that AVI reports are decoding times."""
    return container.format.name != "avi"


def holds_frame(packet: av.Packet) -> bool:
    """Returns whether a packet carries a frame that the decoder returns; edit lists discard some frames."""
    return bool(packet.size) and not packet.is_discard


def video_streams(container: av.container.InputContainer) -> list[av.VideoStream]:
    """Returns the streams of moving pictures, starting with the one that is read.

    Cover art, thumbnails and still images are excluded, although FFmpeg lists them as video streams. Among several
    streams the first one that is marked as default is read, or the first of all if none is marked.
    """
    streams = [stream for stream in container.streams.video if not stream.disposition & NO_VIDEO]
    return sorted(streams, key=lambda stream: not stream.disposition & Disposition.default)


def format_name(container: av.container.InputContainer) -> str:
    """Returns a name by which `open_video` finds the format of a container again."""
    return container.format.name.partition(",")[0]


@contextmanager
def open_video(
    path: str | Path, *, probe: bool = True, known_format: str | None = None
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a file and yields (container, video stream); every FFmpeg error in the block is converted to a VideoError.

    With `probe=False` FFmpeg decodes no frame to find properties that the container does not store, such as the frame
    rate. Probing takes ten times as long as the rest of opening. Frames are the same without it, except in streams that
    do not specify how their frames are reordered. `known_format` is the `format_name` of a file that was opened before;
    FFmpeg then does not compare the file with all formats. Packets of other streams are skipped, not read.
    """
    opened = False
    try:
        options = {} if probe else UNPROBED
        with av.open(ffmpeg_input(path), format=known_format, container_options=options, **ANY_METADATA) as container:
            opened = True
            if container.format.name in PLAYLISTS:
                raise VideoError(path, f"is a list of other files ({container.format.name}) and not a video")
            streams = video_streams(container)
            if not streams:
                reason = "holds a cover picture but no video stream" if container.streams.video else None
                raise VideoError(path, reason or "holds no video stream")
            stream = streams[0]
            if stream.codec_context is None:
                raise VideoError(path, "uses a codec for which this FFmpeg has no decoder")
            if DISCARD is not None:
                for other in container.streams:
                    if other.index != stream.index:
                        other.discard = DISCARD.all
            stream.codec_context.thread_count = 1  # videos are decoded in parallel, not the frames of one video
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or str(error) or type(error).__name__
        if not opened and isinstance(error, av.InvalidDataError) and (told := what_it_is(path)):
            reason += f": it {told}"
        raise VideoError(path, reason, unreadable=_unreadable(path, error)) from error


def _unreadable(path: str | Path, error: Exception) -> bool:
    """Returns whether the operating system failed, rather than the parsing or decoding of the bytes."""
    if not isinstance(error, OSError) or error.errno not in errno.errorcode:
        return False
    try:  # demultiplexers also report "Input/output error" for files that end too early
        storage_of(path).check(Path(path))
    except OSError:
        return True
    return False
