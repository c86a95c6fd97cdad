"""The names of a store's files and of its clips. Imports nothing heavy, so that a command can tell a store before it
loads NumPy."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

FILE, TABLE = "store.json", "clips.csv"


def is_store(path: str | Path) -> bool:
    """Returns whether a path is the folder of a store of features, finished or not."""
    return os.path.isfile(os.path.join(path, FILE))


def shard_name(view: str, number: int) -> str:
    """Returns the name of the file of a shard."""
    return f"{view}-{number:05d}.safetensors"


def whole_forms(name: str) -> Iterator[str]:
    """Yields the name of a clip and, if it has one, the name without its suffix."""
    yield name
    stem, suffix = os.path.splitext(name)
    if suffix:
        yield stem


def base_forms(name: str) -> Iterator[str]:
    """Yields the name of a clip without folders, with and without its suffix."""
    yield from whole_forms(name.rpartition("/")[2])


def unique_names(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Returns the positions by name, without the names that several positions have."""
    found: dict[str, int] = {}
    several: set[str] = set()
    for name, position in pairs:
        if found.setdefault(name, position) != position:
            several.add(name)
    return {name: position for name, position in found.items() if name not in several}
