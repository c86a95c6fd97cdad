"""The checkpoint files of an evaluation, and the folder in which its results are stored as JSON files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from cpr_fast.config import View
from cpr_fast.errors import InputError
from cpr_fast.runtime.distributed import is_main
from cpr_fast.runtime.files import replacing, require_writable
from cpr_fast.runtime.metrics import FILE as METRICS_FILE
from cpr_fast.runtime.metrics import MetricsWriter
from cpr_fast.runtime.writers import writers_of_run

Checkpoints = str | Path | Sequence[str | Path]  # one or several of FILE and VIEW=FILE


def checkpoint_files(checkpoints: Checkpoints) -> list[tuple[str | None, Path]]:
    """Returns each file with the requested view, or None for all its views. Raises InputError if no file is given."""
    named = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
    if not named:
        raise InputError("CHECKPOINT: expected at least one file, got none")
    files = []
    for text in map(str, named):
        view, equals, file = text.partition("=")
        files.append((view, Path(file)) if equals and view in get_args(View) else (None, Path(text)))
    return files


def home(checkpoint: str | Path) -> Path:
    """Returns the folder of a checkpoint's evaluations: RUN for RUN/checkpoints/*.pt, else the folder of the file."""
    folder = Path(checkpoint).absolute().parent
    return folder.parent if folder.name == "checkpoints" else folder


def results_folder(folder: Path) -> Path:
    """Returns the folder of an evaluation's results. Raises InputError before the work if it cannot be written."""
    advice = "The results are stored there; copy the checkpoint to a folder that can be written"
    require_writable("CHECKPOINT", folder, advice)
    return folder


def run_of(checkpoints: Checkpoints) -> Path | None:
    """Returns the run folder of the checkpoints, or None if they are in no run folder or in several."""
    homes = {home(file) for _, file in checkpoint_files(checkpoints)}
    folder = homes.pop()
    return folder if not homes and (folder / METRICS_FILE).exists() else None


def run_metrics(run_dir: str | Path) -> MetricsWriter:
    """Opens the metrics of a run for the results of an evaluation, which the writers of the run get too."""
    return MetricsWriter(run_dir, writers=writers_of_run(run_dir))


def write_result(folder: Path, name: str, result: dict[str, Any]) -> Path:
    """Writes FOLDER/NAME.json atomically in the first process of a run; returns the path."""
    path = folder / f"{name}.json"
    if is_main():
        with replacing(path) as temporary:  # two evaluations of one checkpoint may end at the same time
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path
