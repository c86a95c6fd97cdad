"""Finds files that hold the same bytes, and reads as little of them as possible."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path

from cpr_fast.data.files.access import storage_of
from cpr_fast.data.files.names import is_remote
from cpr_fast.data.storage.media import is_record

END = 2**16  # bytes: uncompressed videos of one length are all of one size, but their ends differ


def originals(files: Sequence[Path], facts: Sequence[Hashable]) -> list[int]:
    """Returns for each file the position of the first file with the same bytes, which is its own if there is none.

    Links to a file hold its bytes. Records of LMDB files, objects on servers, and files that cannot be read, count as
    different from all others. Files are read only if their sizes and facts are equal, and whole only if their ends are
    equal too.

    Args:
        facts: what copies have in common and is known already, such as the number of frames.
    """
    found = list(range(len(files)))
    sizes = _divided(found, lambda i: None if _is_left_out(files[i]) else (_read(files[i], _size), facts[i]))
    ends = [part for group in sizes for part in _divided(group, lambda i: _read(files[i], _end))]
    for same in [part for group in ends for part in _divided(group, lambda i: _read(files[i], _content))]:
        for position in same:
            found[position] = same[0]
    return found


def _divided(positions: Iterable[int], key: Callable[[int], Hashable | None]) -> list[list[int]]:
    """Returns the groups of two positions or more with equal keys; a position with the key None is in no group."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for position in positions:
        if (value := key(position)) is not None:
            groups[value].append(position)
    return [group for group in groups.values() if len(group) > 1]


def _read(path: Path, read: Callable[[Path], Hashable]) -> Hashable | None:
    try:
        return read(path)
    except OSError:
        return None


def _is_left_out(path: Path) -> bool:
    return is_record(path) or is_remote(path)


def _size(path: Path) -> int:
    return storage_of(path).size(path)


def _end(path: Path) -> bytes:
    return hashlib.blake2b(storage_of(path).read_range(path, max(0, _size(path) - END), END)).digest()


def _content(path: Path) -> bytes:
    with storage_of(path).open(path) as file:
        return hashlib.file_digest(file, "blake2b").digest()
