"""Weights & Biases. Its files are in `RUN/wandb`, those of its offline mode too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cpr_fast.runtime.writers.writer import COUNTERS, run_id

PROJECT = "cpr_fast"  # unless WANDB_PROJECT names another one
FINISH_TIMEOUT_S = "300"  # unless WANDB_FINISH_TIMEOUT is set; without a limit the end of a run waits for the network


class Wandb:
    """A run of Weights & Biases, which a resumed run continues under the same id.

    Each kind of numbers has its own counter as its horizontal axis. A resumed run therefore writes the steps after its
    checkpoint again, with equal values, without being refused. Its environment variables (WANDB_PROJECT, WANDB_ENTITY,
    WANDB_NAME, WANDB_MODE, WANDB_RUN_ID, ...) act as in every program. A run that was offline stays offline unless
    WANDB_MODE is set, so that an evaluation does not ask for a login.

    Args: see `cpr_fast.runtime.writers.opening.open_writers`.
    """

    def __init__(self, folder: Path, about: dict[str, Any] | None, *, resumed: bool) -> None:
        import wandb

        os.environ.setdefault("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT_S)
        known = run_id(folder / "wandb", os.environ.get("WANDB_RUN_ID", ""), resumed=resumed)
        was_offline = any((folder / "wandb").glob(f"offline-run-*-{known}"))
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", folder.absolute().name),
            id=known,
            dir=str(folder),
            mode="offline" if was_offline and "WANDB_MODE" not in os.environ else None,
            resume="allow",
            settings=wandb.Settings(console="off"),  # the progress line is not a log
        )
        if about is not None:
            self._run.config.update(about, allow_val_change=True)
        for kind, key in COUNTERS.items():
            self._run.define_metric(f"{kind}/*", step_metric=f"{kind}/{key}")

    def log(self, counter: str, at: int, values: dict[str, float]) -> None:
        self._run.log({counter: at, **values})

    def conclude(self, values: dict[str, Any]) -> None:
        self._run.summary.update(values)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
