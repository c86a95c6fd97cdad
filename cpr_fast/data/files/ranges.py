"""A file that is read by ranges: what FFmpeg and `tarfile` read where no operating system has the file."""

from __future__ import annotations

import io
import os
from pathlib import Path

from cpr_fast.data.files.storage import Storage

FIRST_BYTES, MOST_BYTES = 2**16, 2**22  # of a range: the first behind a seek, and the largest of a sequence


class RangeFile(io.RawIOBase):
    """An open file of a storage; it holds no resource but the last range of bytes in memory.

    Each range that follows the one before it is twice as long, so that a whole file takes few requests, and a few bytes
    behind a seek cost a short one. One thread at a time may read it.
    """

    def __init__(self, storage: Storage, path: Path) -> None:
        """Raises OSError if the file cannot be read."""
        super().__init__()
        self._storage, self._path, self._size = storage, path, storage.size(path)
        self._place, self._begin, self._held, self._next = 0, 0, b"", FIRST_BYTES

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def tell(self) -> int:
        """Returns the place of the next byte that is read."""
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves the place of the next byte that is read, and returns it."""
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: memoryview) -> int:
        """Fills a buffer, which takes several ranges if it begins in one and ends in another: `tarfile` takes fewer
        bytes for the end of the file. Returns their number, which is less only at the end. Raises OSError."""
        wanted, done = max(0, min(len(buffer), self._size - self._place)), 0
        while done < wanted:
            if not self._begin <= self._place < self._begin + len(self._held):
                self._fetch(wanted - done)
            first = self._place - self._begin
            part = self._held[first : first + wanted - done]
            if not part:  # the file is shorter than it was
                break
            buffer[done : done + len(part)] = part
            self._place += len(part)
            done += len(part)
        return done

    def _fetch(self, wanted: int) -> None:
        if (held := self._storage.held_range(self._path, self._place, wanted)) is not None:
            self._held, self._begin, self._next = held, self._place, FIRST_BYTES
            return
        follows = self._held and self._place == self._begin + len(self._held)
        self._next = min(2 * self._next, MOST_BYTES) if follows else FIRST_BYTES
        length = min(max(wanted, self._next), self._size - self._place)
        self._held, self._begin = self._storage.read_range(self._path, self._place, length), self._place
