"""Finds the storage of a path, and what FFmpeg opens to read it."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from cpr_fast.data.files.local import LOCAL, local_file
from cpr_fast.data.files.names import is_remote, member_of
from cpr_fast.data.files.remote import REMOTE
from cpr_fast.data.files.storage import Storage
from cpr_fast.data.files.tar import TAR


def storage_of(path: str | Path) -> Storage:
    """Returns the storage that reads a path."""
    if member_of(path) is not None:
        return TAR
    return REMOTE if is_remote(path) else LOCAL


def read_whole(path: Path) -> bytes:
    """Returns all bytes of a file. Raises OSError."""
    storage = storage_of(path)
    return storage.read_range(path, 0, storage.size(path))


def ffmpeg_input(path: str | Path) -> str | BinaryIO:
    """Returns what FFmpeg opens to read a file: on a local disk a location that it reads itself, without Python, and
    elsewhere an open file. Raises OSError."""
    if is_remote(path):
        return storage_of(path).open(Path(path))
    if (member := member_of(path)) is None:
        return local_file(path)
    TAR.version(Path(path))  # raises OSError if the member is not where the path says
    return f"subfile,,start,{member.start},end,{member.start + member.size},,:{local_file(member.file)}"
