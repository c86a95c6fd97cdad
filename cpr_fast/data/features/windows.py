"""The evaluation features of a store's clips, as the windows of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from cpr_fast.data.clips.stream import WindowBatch
from cpr_fast.data.features.index import StoredClips
from cpr_fast.data.features.store import CHUNK


class StoredWindows:
    """Loads the evaluation feature of every clip, one window per clip, in the order of the index.

    Batches hold `clips` {view: float32 [N, D]}. Raises InputError in the iteration if a feature is not finite.
    """

    skipped: Sequence[tuple[Path, str]] = ()

    def __init__(self, index: StoredClips, views: Sequence[str], device: torch.device | str = "cpu") -> None:
        index.store.require_views("--index", views)
        self._index, self._views, self._device = index, tuple(views), torch.device(device)

    def __len__(self) -> int:
        """Returns the number of batches."""
        return -(-len(self._index) // CHUNK)

    @property
    def windows(self) -> int:
        """The number of windows, one per clip."""
        return len(self._index)

    def __iter__(self) -> Iterator[WindowBatch]:
        store, rows, begin = self._index.store, self._index.rows, 0
        for features in zip(*(store.evaluation(view, rows) for view in self._views), strict=True):
            video = torch.from_numpy(np.arange(begin, begin + len(features[0])))
            clips = {view: torch.from_numpy(some).to(self._device)
                     for view, some in zip(self._views, features, strict=True)}  # fmt: skip
            yield WindowBatch(clips, video, torch.zeros_like(video))
            begin += len(video)

    def close(self) -> None:
        """Does nothing; a file is open only while it is read."""
