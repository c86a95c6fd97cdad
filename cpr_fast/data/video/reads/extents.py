"""Which bytes of a video file FFmpeg reads for given frames, so that they can be fetched before they are needed.

Letters: P packets of the stream that is read.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import av
import numpy as np

from cpr_fast.data.files.access import storage_of
from cpr_fast.data.files.names import is_remote
from cpr_fast.data.files.remote import REMOTE
from cpr_fast.data.video.container import ANY_METADATA, UNPROBED, video_streams
from cpr_fast.data.video.numbering import REMEMBERED_FILES, Layout

READ_AT_ONCE = 2**15  # bytes that FFmpeg asks for when its buffer is empty
Ranges = list[tuple[int, int]]  # [start, end) of bytes


class Extents:
    """The bytes that `decode.read_parts` reads of a file whose layout is known."""

    def __init__(self, layout: Layout, packets: Sequence[av.Packet], opening: Ranges) -> None:
        """Takes the packets that carry frames, in decoding order, and what is read to open the file and to seek in
        it."""
        self._opening = opening
        times = np.array([packet.pts for packet in packets], np.int64)
        self._numbers = layout.numbers(times).astype(np.int32)  # [P]
        self._begin = np.array([packet.pos for packet in packets], np.int64)  # [P]
        self._end = self._begin + np.array([packet.size for packet in packets], np.int64)
        self._starts = {int(time): place for place, time in enumerate(times) if packets[place].is_keyframe}
        self._layout = layout

    def ranges(self, frames: np.ndarray) -> Ranges:
        """Returns the bytes that are read for `frames` (increasing)."""
        first = self._starts.get(int(self._layout.start(int(frames[0]))), 0)
        shown = np.flatnonzero(np.isin(self._numbers, frames))
        last = max(first, int(shown[-1])) if len(shown) else len(self._numbers) - 1
        begin, end = int(self._begin[first : last + 1].min()), int(self._end[first : last + 1].max())
        alone = [(int(self._begin[0]), int(self._end[0]))] if self._layout.first_alone else []
        # FFmpeg's buffer ends at most so far behind: less in most cases, but it may begin to be filled at any byte
        return [*self._opening, *alone, (begin, end + READ_AT_ONCE)]


# By path, of files that are fetched ahead; of any other file nothing is known, and all of it may be read.
EXTENTS: dict[str, Extents] = {}


def remember_extents(path: str | Path, layout: Layout, packets: Sequence[av.Packet]) -> None:
    """Keeps the extents of a file in EXTENTS if it is fetched ahead and its packets state where they are."""
    cache = REMOTE.cache
    if cache is None or not is_remote(path) or not cache.knows(Path(path)) or str(path) in EXTENTS:
        return
    packets = [packet for packet in packets if packet.size]
    if len(EXTENTS) >= REMEMBERED_FILES or any(packet.pos is None or packet.pos < 0 for packet in packets):
        return
    with suppress(OSError, av.FFmpegError):
        EXTENTS[str(path)] = Extents(layout, packets, _opening(Path(path), layout))


def _opening(path: Path, layout: Layout) -> Ranges:
    """Returns what FFmpeg reads to open a file as it does once the layout is known, and to seek in it."""
    with storage_of(path).open(path) as file:
        noted, options = _Noted(file), {} if layout.probe else UNPROBED
        with av.open(noted, format=layout.format, container_options=options, **ANY_METADATA) as container:
            container.seek(layout.first_time, stream=video_streams(container)[0])
        return noted.ranges


class _Noted(io.RawIOBase):
    """A file that notes which ranges of it are read."""

    def __init__(self, file: io.RawIOBase) -> None:
        super().__init__()
        self._file, self.ranges = file, []

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        """Returns the next bytes, and notes where they are."""
        begin, data = self._file.tell(), self._file.read(size)
        if self.ranges and self.ranges[-1][1] == begin:
            begin = self.ranges.pop()[0]
        self.ranges.append((begin, self._file.tell()))
        return data
