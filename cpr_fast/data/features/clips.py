"""The table of a store: what each of its clips is of. Its texts are kept as one block of bytes, which takes less memory
than Python's strings.

    path,label,source,split

is the header of the table (CSV) in a store. `path` is relative to the folder of the store, or any other name of a clip
whose video is not there. A clip without a source is its own source, as in an index.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpr_fast.data.index.index import IndexFileError
from cpr_fast.data.index.listing import known_split

COLUMNS = ("path", "label", "source", "split")


class Clip(NamedTuple):
    """A row of the table."""

    path: str
    label: str = ""
    source: str = ""
    split: str = ""


class Texts(Sequence[str]):
    """N texts in one block of bytes."""

    def __init__(self, texts: Iterable[str]) -> None:
        data, ends = bytearray(), [0]
        for text in texts:
            data += text.encode("utf-8", "surrogateescape")
            ends.append(len(data))
        self._data, self._ends = bytes(data), np.array(ends, np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> str:
        return self._data[self._ends[row] : self._ends[row + 1]].decode("utf-8", "surrogateescape")


class ClipTable:
    """The table of a store with N clips.

    Attributes:
        paths: N texts.
        labels, splits: [N] int64 numbers of `classes` and `split_names`, in order of first appearance; a label is -1
            where the class is unknown.
        sources: [N] int64, equal for clips of equal source.
    """

    def __init__(self, rows: Iterable[Sequence[str]]) -> None:
        """`rows`: path, label, source and split of every clip."""
        classes: dict[str, int] = {}
        sources: dict[str, int] = {}
        splits: dict[str, int] = {}
        numbers: list[np.ndarray] = []

        def paths() -> Iterator[str]:
            block: list[tuple[int, int, int]] = []
            for path, label, source, split in rows:
                block.append((
                    classes.setdefault(label, len(classes)) if label else -1,
                    sources.setdefault(source, len(sources)) if source else -1,
                    splits.setdefault(known_split(split), len(splits)),
                ))  # fmt: skip
                if len(block) == 4096:
                    numbers.append(np.array(block, np.int64))
                    block.clear()
                yield path
            numbers.append(np.array(block, np.int64).reshape(-1, 3))

        self.paths = Texts(paths())
        self.labels, self.sources, self.splits = np.ascontiguousarray(np.concatenate(numbers).T)
        self.classes, self.split_names = list(classes), list(splits)
        self._source_names = Texts(sources)
        own = self.sources < 0  # a dict of these sources, which no other clip has, would need most of the memory
        self.sources[own] = len(sources) + np.flatnonzero(own)

    @classmethod
    def load(cls, path: Path) -> ClipTable:
        """Reads the table that `write_store` wrote. Raises IndexFileError if it is not as it was written."""
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file)
            if (header := next(reader, [])) != list(COLUMNS):
                raise IndexFileError(f"{path}:1: expected the header {','.join(COLUMNS)}, got {','.join(header)!r}")
            try:
                return cls(reader)
            except ValueError:
                raise IndexFileError(f"{path}:{reader.line_num}: expected four fields") from None

    def __len__(self) -> int:
        return len(self.paths)

    def source(self, row: int) -> str:
        """Returns the name of a clip's source."""
        number = self.sources[row]
        return self._source_names[number] if number < len(self._source_names) else self.paths[row]
