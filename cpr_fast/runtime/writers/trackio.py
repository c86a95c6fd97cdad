"""trackio, a dashboard that keeps its numbers on this machine, or in a Space of Hugging Face."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from cpr_fast.runtime.writers.writer import run_id

PROJECT = "cpr_fast"  # unless TRACKIO_PROJECT names another one


class Trackio:
    """A run of trackio, which a resumed run continues under the same name: that of the run folder and an id.

    Its environment variables (TRACKIO_DIR, TRACKIO_SPACE_ID, ...) act as in every program.

    Args: see `cpr_fast.runtime.writers.opening.open_writers`.
    """

    def __init__(self, folder: Path, about: dict[str, Any] | None, *, resumed: bool) -> None:
        import trackio

        self._step: int | None = None
        self._trackio = trackio
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{folder.absolute().name}-{run_id(folder / 'trackio', resumed=resumed)}",
            config=about,
            resume="allow",
            embed=False,
        )

    def log(self, counter: str, at: int, values: dict[str, float]) -> None:
        if counter == "step/step":
            self._step = at
        self._run.log({counter: at, **values}, step=self._step)

    def conclude(self, values: dict[str, Any]) -> None:
        self._run.log(values)

    def close(self, failed: bool) -> None:
        self._trackio.finish()
