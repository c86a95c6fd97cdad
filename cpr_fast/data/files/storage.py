"""The interface through which every byte of a video file is read.

    ClipReader -> open_video -> Storage: a local file, a member of a tar file, an object on a server

`access.storage_of` returns the storage of a path. Records of LMDB files are not read through it: an LMDB file is mapped
into memory, so that its JPEGs are used where they are, without being read (`cpr_fast.data.storage.records`).
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import BinaryIO, Protocol


class Storage(Protocol):
    """Reads files by their paths, from any number of threads.

    Every method raises OSError, whose `strerror` is the end of a sentence that begins with the path, if the file cannot
    be read; a later attempt may succeed.
    """

    def size(self, path: Path) -> int:
        """Returns the number of bytes of a file."""

    def read_range(self, path: Path, start: int, length: int) -> bytes:
        """Returns the `length` bytes from `start` on, fewer only at the end of the file."""

    def held_range(self, path: Path, start: int, length: int) -> bytes | None:
        """Returns the same bytes if a disk cache on this machine, or the memory of this process, holds all of them,
        else None. It does not fail."""

    def check(self, path: Path) -> None:
        """Reads the first and the last byte from where the file is, not from what is kept of it."""

    def open(self, path: Path) -> BinaryIO:
        """Returns a file that can be read and sought. It reads ranges, not the whole file."""

    def version(self, path: Path) -> Hashable:
        """Returns what changes when the file does, such as its size and the time of its last change."""


class HeldRanges(Protocol):
    """What is held on a disk of objects on servers, see `cached.cache`; safe to use from any number of threads."""

    def knows(self, path: Path) -> bool:
        """Returns whether the bytes of a path are being fetched ahead."""

    def read(self, path: Path, start: int, length: int) -> bytes | None:
        """Returns a range of the bytes of a path, a member of a tar file with the header before it; None if not all of
        it is held."""

    def count(self, **numbers: int) -> None:
        """Adds to what is counted."""
