"""Where evaluations of a checkpoint keep what they find: whole JSON files in one folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..checkpoint import written_whole
from ..metrics import FILE as METRICS_FILE


def home(checkpoint: str | Path) -> Path:
    """The folder that a checkpoint's evaluations belong to: RUN for RUN/checkpoints/*.pt, else its own."""
    folder = Path(checkpoint).absolute().parent
    return folder.parent if folder.name == "checkpoints" else folder


def run_of(checkpoint: str | Path) -> Path | None:
    """The run folder whose metrics a checkpoint's evaluations join, or None where it lies in none."""
    folder = home(checkpoint)
    return folder if (folder / METRICS_FILE).exists() else None


def write_result(folder: Path, name: str, result: dict[str, Any]) -> Path:
    """Writes FOLDER/NAME.json whole or not at all; returns its path."""
    path = folder / f"{name}.json"
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path
