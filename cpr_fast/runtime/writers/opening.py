"""Which writers a run has: the settings `run.tensorboard`, `run.wandb` and `run.trackio`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpr_fast.config import RunConfig, load
from cpr_fast.errors import InputError, is_installed
from cpr_fast.runtime.files import RUN_LOCK, is_locked
from cpr_fast.runtime.writers.tensorboard import TensorBoard
from cpr_fast.runtime.writers.trackio import Trackio
from cpr_fast.runtime.writers.wandb import Wandb
from cpr_fast.runtime.writers.writer import Guarded, Writer

WRITERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}  # by setting, package and folder in the run
NAMES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "trackio": "trackio"}


def require_packages(run: RunConfig) -> None:
    """Raises InputError that names the setting if a writer's package is not installed."""
    for name in WRITERS:
        if getattr(run, name) and not is_installed(name):
            raise InputError(f"run.{name}: expected the package {name} to be installed, got none: pip install {name}")


def open_writers(run: RunConfig, folder: Path, about: dict[str, Any], *, resumed: bool) -> list[Writer]:
    """Opens the writers of a training run, in the process that writes its files.

    Args:
        about: config and environment, which every writer shows.
        resumed: whether the run continues one that the programs may know already.
    """
    return [
        Guarded(NAMES[name], lambda name=name: WRITERS[name](folder, about, resumed=resumed))
        for name in WRITERS
        if getattr(run, name)
    ]


def writers_of_run(folder: str | Path) -> list[Writer]:
    """Opens the writers of a run that has been trained, for the results of an evaluation.

    There are none while the run still trains, because a program takes numbers of a run from one process at a time; if
    the folder holds no run; or for a program that does not know the run or whose package is not installed here.
    """
    folder = Path(folder)
    if is_locked(folder / RUN_LOCK):
        return []
    try:
        run = load(folder / "config.json").run
    except InputError:  # of another version, or there is none
        return []
    known = [name for name in WRITERS if getattr(run, name) and is_installed(name) and (folder / name).is_dir()]
    return [Guarded(NAMES[name], lambda name=name: WRITERS[name](folder, None, resumed=True)) for name in known]
