"""The names of a store's files. Imports nothing heavy, so that a command can tell a store before it loads NumPy."""

from __future__ import annotations

import os
from pathlib import Path

FILE, TABLE = "store.json", "clips.csv"


def is_store(path: str | Path) -> bool:
    """Returns whether a path is the folder of a store of features, finished or not."""
    return os.path.isfile(os.path.join(path, FILE))


def shard_name(view: str, number: int) -> str:
    """Returns the name of the file of a shard."""
    return f"{view}-{number:05d}.safetensors"
