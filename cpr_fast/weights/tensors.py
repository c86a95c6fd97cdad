"""Writes safetensors files with the errors and permissions that every other file of the package has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file.

    The library's own function writes a further temporary file, which a killed process leaves, ignores the umask, so
    that only the owner could read the file, and reports a failed write as an error of its own.

    Raises:
        OSError: the file could not be written.
        ImportError: safetensors is not installed.
    """
    from safetensors.torch import save

    path.write_bytes(save(dict(tensors), dict(metadata) if metadata else None))
