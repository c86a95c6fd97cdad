"""The predictions of a classifier for test videos: of all of them, and of those that were tested before a stop.

Letters: M videos, L classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cpr_fast.evaluate.classify.classifier import CROP_SETS
from cpr_fast.runtime.files import replacing
from cpr_fast.weights.tensors import save_tensors, stored_tensors

Found = tuple[dict[int, Tensor], Tensor]  # probabilities and windows, see `Predictions`
OnStop = Callable[[Mapping[int, Tensor], Tensor], None]  # takes what was found before a stop


@dataclass(frozen=True)
class Predictions:
    """Predictions for M test videos: {crops: probabilities [M, L] float64}, windows [M] int64, 0 for unread files."""

    probabilities: dict[int, Tensor]
    windows: Tensor
    best_epoch: int

    def save(self, path: Path) -> None:
        """Writes the predictions; the file appears, or is replaced, in one step."""
        tensors = {f"crops{n}": value for n, value in self.probabilities.items()}
        with replacing(path) as temporary:
            save_tensors(tensors | {"windows": self.windows, "best_epoch": torch.tensor(self.best_epoch)}, temporary)

    @classmethod
    def load(cls, path: Path) -> Predictions | None:
        """Returns the stored predictions; None if there are none, or if the file is damaged, which is logged."""
        stored = stored_tensors(path, "its predictions are computed again")
        if stored is None:
            return None
        probabilities = {n: stored[f"crops{n}"] for n in CROP_SETS if f"crops{n}" in stored}
        return cls(probabilities, stored["windows"], int(stored["best_epoch"]))


def tested_videos(
    videos: int,
    measure: Callable[[list[int], OnStop], Found],
    path: Path,
) -> Found:
    """Returns the probabilities and windows of M test videos; those that an earlier call tested are not read again.

    Args:
        videos: M.
        measure: Called with the positions of the videos to test and a function for the case of a stop, which takes the
            probabilities and windows of these videos, 0 windows for a video that is not complete.
        path: The file of the videos that were tested before a stop; it belongs to one classifier.
    """
    before = Predictions.load(path)
    todo = [i for i in range(videos) if before is None or not before.windows[i]]

    def joined(found: Mapping[int, Tensor], windows: Tensor) -> Found:
        if before is None:
            return dict(found), windows
        rows = {n: value.clone() for n, value in before.probabilities.items()}
        for n, value in found.items():
            rows[n][todo] = value
        counts = before.windows.clone()
        counts[todo] = windows
        return rows, counts

    def keep(found: Mapping[int, Tensor], windows: Tensor) -> None:
        Predictions(*joined(found, windows), -1).save(path)

    return joined(*measure(todo, keep)) if todo else (before.probabilities, before.windows)
