"""Writes the index with the sources found, and the table of the groups."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from cpr_fast.data.files.relative import Relative
from cpr_fast.data.index.index import Index, Video, changing, keep_previous
from cpr_fast.data.index.tables import write_table
from cpr_fast.errors import InputError
from cpr_fast.evaluate.duplicates.find import Duplicates

COLUMNS = ("path", "label", "split", "source", "new_source", "duplicates", "siblings")


def write_index(found: Duplicates, out: Path) -> None:
    """Writes the index of the videos with the sources found. An index of other content that is there already is kept as
    *.old.csv."""
    videos = [replace(video, source=name) for video, name in _with_new_names(found)]
    index = Index(videos, found.compared.index.classes)
    with changing(out):
        if out.exists():
            try:
                same = list(Index.load(out, require_flow=False)) == list(index)
            except InputError:
                same = False
            if not same:
                keep_previous(out)
        index.save(out)


def write_groups(found: Duplicates, out: Path) -> None:
    """Writes a row for every video that shares a group with another one: its path relative to the folder of the table,
    label, split, its source in the index and the new one, and the numbers of its groups; "" for a group of one."""
    relative, rows = Relative(out.parent), []
    sizes = [np.bincount(groups) for groups in (found.duplicates, found.siblings)]
    groups = found.duplicates.tolist(), found.siblings.tolist()
    for (video, name), duplicate, sibling in zip(_with_new_names(found), *groups, strict=True):
        if sizes[1][sibling] > 1:
            group = duplicate if sizes[0][duplicate] > 1 else ""
            rows.append((sibling, duplicate, relative(video.path), video.label, video.split, video.source, name, group))
    rows.sort(key=lambda row: row[:2])
    write_table(out, COLUMNS, [(*row[2:], row[0]) for row in rows])


def _with_new_names(found: Duplicates) -> Iterator[tuple[Video, str]]:
    """Yields every video of the index with the name of its new source: that of the first video with the new source."""
    names: dict[int, str] = {}
    for video, source in zip(found.compared.index, found.sources.tolist(), strict=True):
        yield video, names.setdefault(source, video.source)
