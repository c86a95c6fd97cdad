"""Files on a disk or a mount of this machine."""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from typing import BinaryIO


class LocalStorage:
    """The `Storage` of files that the operating system opens."""

    def size(self, path: Path) -> int:
        """Returns the number of bytes of a file. Raises OSError."""
        return os.stat(path).st_size

    def read_range(self, path: Path, start: int, length: int) -> bytes:
        """Returns the `length` bytes from `start` on, fewer only at the end of the file. Raises OSError."""
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(length)

    def held_range(self, path: Path, start: int, length: int) -> bytes | None:
        """Returns None: of local files nothing is kept."""
        return None

    def check(self, path: Path) -> None:
        """Reads the first and the last byte. Raises OSError."""
        self.check_range(path, 0, self.size(path))

    def check_range(self, path: Path, start: int, length: int) -> None:
        """Reads the first and the last of `length` bytes. Raises OSError."""
        for place in {start, start + max(0, length - 1)}:
            self.read_range(path, place, 1)

    def open(self, path: Path) -> BinaryIO:
        """Returns the open file. Raises OSError."""
        return open(path, "rb")

    def version(self, path: Path) -> Hashable:
        """Returns the time of the last change, in ns, and the size, in bytes. Raises OSError."""
        facts = os.stat(path)
        return facts.st_mtime_ns, facts.st_size


LOCAL = LocalStorage()


def local_file(path: str | Path) -> str:
    """Returns the location by which FFmpeg opens a local file; without the prefix, it interprets `name:x.mp4` as a
    network protocol."""
    return f"file:{path}"
