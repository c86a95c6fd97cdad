"""The clips of a store as an index, whose rows are made when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from cpr_fast.config import DataConfig
from cpr_fast.data.features.store import FeatureStore
from cpr_fast.data.files.relative import path_in
from cpr_fast.data.index.index import Index, IndexFileError, Video, numbered
from cpr_fast.data.index.listing import known_split


class StoredClips(Index):
    """Clips of a store, in the order of the store: all of them, or those of a split."""

    @classmethod
    def open(cls, folder: str | Path, option: str = "STORE") -> StoredClips:
        """Opens a store; see `FeatureStore`."""
        return cls(FeatureStore(folder, option))

    def __init__(self, store: FeatureStore, rows: np.ndarray | None = None) -> None:
        """`rows`: int64 [N], ascending numbers of clips of the store; None takes all clips."""
        self.store = store
        self.rows = np.arange(len(store.table)) if rows is None else rows
        self.classes = store.table.classes

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Video:
        """Returns a clip as a row of an index. What a store does not know of its video (its length, size and rate) is
        0."""
        table, row = self.store.table, self.rows[position]
        label = table.labels[row]
        return Video(
            path=path_in(self.store.folder, table.paths[row]),
            label=table.classes[label] if label >= 0 else "",
            source=table.source(row),
            split=table.split_names[table.splits[row]],
            num_frames=0, fps=0.0, width=0, height=0,
        )  # fmt: skip

    def __iter__(self) -> Iterator[Video]:
        return (self[position] for position in range(len(self)))

    def select(self, split: str) -> StoredClips:
        """Returns the clips of one split, numbered from 0. Raises IndexFileError if the split has none."""
        table, name = self.store.table, known_split(split)
        number = table.split_names.index(name) if name in table.split_names else -1
        chosen = self.rows[table.splits[self.rows] == number]
        if not len(chosen):
            names = ", ".join(map(repr, filter(None, table.split_names)))
            held = f"its splits are {names}" if names else "no clip of it has a split"
            raise IndexFileError(f"split {split!r}: the store {str(self.store.folder)!r} has no such clip; {held}")
        return StoredClips(self.store, chosen)

    def chosen(self, positions: Iterable[int]) -> StoredClips:
        """Returns the clips at these positions, which ascend, numbered from 0."""
        return StoredClips(self.store, self.rows[list(positions)])

    def long_enough(self, data: DataConfig) -> StoredClips:
        """Returns the same clips: their length was checked when their features were computed."""
        return self

    @property
    def has_splits(self) -> bool:
        """Whether any clip names a split."""
        table = self.store.table
        return any(table.split_names[number] for number in np.unique(table.splits[self.rows]))

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [N]: position in `classes`, -1 where unlabelled."""
        return self.store.table.labels[self.rows]

    @cached_property
    def source_ids(self) -> np.ndarray:
        """int64 [N]: equal for siblings; numbered from 0 in order of first appearance."""
        return numbered(self.store.table.sources[self.rows])

    def originals(self) -> list[int]:
        """Returns every clip's own position: copies are looked for in videos, not in their features."""
        return list(range(len(self)))
