"""Writes safetensors files with the errors and permissions that every other file of the package has, and reads those
that hold results which can be computed again."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

log = logging.getLogger(__name__)


def stored_tensors(path: Path, consequence: str) -> dict[str, Tensor] | None:
    """Returns the tensors of a safetensors file, on the CPU; None if there is no such file, or if it is damaged.

    The latter is logged with its `consequence`, such as "its features are computed again".

    Raises ImportError if safetensors is not installed.
    """
    if not path.exists():
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        log.warning("%s cannot be read (%s): %s", path, error, consequence)
        return None


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file.

    Equal tensors and metadata give equal bytes. The library's own function writes the metadata in random order and a
    further temporary file, which a killed process leaves, ignores the umask, so that only the owner could read the
    file, and reports a failed write as an error of its own.

    Raises:
        OSError: the file could not be written.
        ImportError: safetensors is not installed.
    """
    from safetensors.torch import save

    data = save(dict(tensors), dict(metadata) if metadata else None)
    size = int.from_bytes(data[:8], "little")  # of the header, JSON padded with blanks
    header = json.loads(data[8 : 8 + size])
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(memoryview(data)[8 + size :])
