"""Writes tar files."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path


def write_tar(file: Path, contents: Mapping[str, bytes] | Iterable[tuple[str, bytes]], **options) -> Path:
    """Writes a tar file with the given members, in order; a name may come twice."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **options) as archive:
        for name, data in contents.items() if isinstance(contents, Mapping) else contents:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file
