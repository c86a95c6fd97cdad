"""Event files for TensorBoard in `RUN/tensorboard`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class TensorBoard:
    """Numbers of the training are scalars over their counter, the config is a text, and results are scalars of one
    point or texts.

    Args: see `cpr_fast.runtime.writers.opening.open_writers`.
    """

    def __init__(self, folder: Path, about: dict[str, Any] | None, *, resumed: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(folder / "tensorboard"))
        if about is not None:
            self._events.add_text("run", f"```json\n{json.dumps(about, indent=1)}\n```")

    def log(self, counter: str, at: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, at)

    def conclude(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            add = self._events.add_text if isinstance(value, str) else self._events.add_scalar
            add(name, value)

    def close(self, failed: bool) -> None:
        self._events.close()
