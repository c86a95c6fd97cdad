"""Writes a store from features that another program computed, whose clips are those of a table or of their names."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cpr_fast.data.features.clips import COLUMNS, Clip
from cpr_fast.data.features.foreign import Foreign, open_foreign
from cpr_fast.data.features.names import base_forms, unique_names, whole_forms
from cpr_fast.data.features.store import Description
from cpr_fast.data.features.write import Computed, file_states, planned_shards, same_clips, write_store
from cpr_fast.data.index.listing import SPLITS, clip_source
from cpr_fast.data.index.tables import read_table
from cpr_fast.errors import InputError
from cpr_fast.wording import counted

SHARD_BYTES, SHARD_CLIPS = 2**28, 2**14  # of a shard in float32, at most

log = logging.getLogger(__name__)


def adopt(
    features: Mapping[str, Path],
    table: Path | None,
    out: Path,
    *,
    samples: int | None = None,
    dtype: str = "float16",
    progress: bool = False,
) -> dict[str, Any]:
    """Writes a store of the features in `features`, by view.

    Args:
        table: A table (CSV) with the column `path` and any of `label`, `source` and `split`, such as an index. Without
            it, the names of the clips tell: [SPLIT/][CLASS/]NAME.
        samples: M evenly spaced features of each clip; None takes all, whose number must then be equal.
    Returns:
        What `write_store` returns.
    Raises:
        InputError: see `write_store`, `open_foreign` and `Foreign.rows`; or clips are missing.
    """
    found = {view: open_foreign(f"--features {view}", path) for view, path in features.items()}
    first = next(iter(found.values()))
    for foreign in found.values():
        if table is None and foreign.names is None:
            raise InputError(
                f"INDEX: expected a table (CSV) with the column 'path', a row for each of the "
                f"{counted(foreign.count, 'row')} of {str(foreign.path)!r}, which has no names; got none"
            )
    clips = _table_clips(table) if table is not None else _named_clips(first)
    same_clips(clips)
    places = {view: _places(clips, foreign, table) for view, foreign in found.items()}
    counts = {view: samples or foreign.shape[0] for view, foreign in found.items()}
    if len(set(counts.values())) > 1:
        raise InputError(f"--features: expected equally many features of a clip in every view, got {counts}; --samples "
                         "M takes M evenly spaced ones of each")  # fmt: skip
    views = {view: foreign.shape[1] for view, foreign in found.items()}
    count = counts[next(iter(counts))]
    shard = max(1, min(SHARD_CLIPS, SHARD_BYTES // (4 * count * max(views.values()))))
    about = Description(
        views, count, False, dtype, {view: f"read from {foreign.path}" for view, foreign in found.items()},
        _digest(found, clips, count, dtype), planned_shards(len(clips), shard),
    )  # fmt: skip

    def compute(positions: range) -> Computed:
        rows = {view: [places[view][position] for position in positions] for view in found}
        return Computed(np.array(positions), {v: found[v].rows(rows[v], samples) for v in found})

    return write_store(out, clips, about, compute, progress=progress)


def _table_clips(path: Path) -> list[Clip]:
    """Returns the clips of a table. Raises InputError if it has no column `path`, or a row has another length."""
    header, rows = read_table(path, COLUMNS, "table of clips")
    if "path" not in header:
        raise InputError(f"{path}:1: expected a column 'path', and perhaps 'label', 'source' and 'split', got "
                         f"{','.join(header)!r}")  # fmt: skip
    for line, row in rows:
        if len(row) != len(header):
            raise InputError(f"{line}: expected {counted(len(header), 'field')}, got {len(row)}")
    columns = [header.index(name) if name in header else None for name in COLUMNS]
    return [Clip(*("" if i is None else row[i].strip() for i in columns)) for _, row in rows]


def _named_clips(foreign: Foreign) -> list[Clip]:
    """Returns the clips of features that have names, as these tell."""
    clips = []
    for name in foreign.names:
        *folders, stem = name.split("/")
        split = SPLITS[folders.pop(0).lower()] if folders and folders[0].lower() in SPLITS else ""
        label = folders[-1] if folders else ""
        stem = os.path.splitext(stem)[0]
        source = clip_source(label, stem) if label else ""
        source = "" if source == f"{label}/{stem}" else source  # known only from names such as those of UCF101
        clips.append(Clip(name, label, source, split))
    return clips


def _places(clips: Sequence[Clip], foreign: Foreign, table: Path | None) -> list[int]:
    """Returns the position of each clip's features. Raises InputError that names the clips that are missing."""
    if foreign.names is None:
        if len(clips) != foreign.count:
            raise InputError(
                f"INDEX: expected {counted(foreign.count, 'row')}, one for each of {str(foreign.path)!r}, which has no "
                f"names, got {len(clips)} in {str(table)!r}"
            )
        return list(range(len(clips)))
    found: list[int | None] = [None] * len(clips)
    for forms in (whole_forms, base_forms):
        if None in found:
            known = unique_names((form, i) for i, name in enumerate(foreign.names) for form in forms(name))
            found = [
                next((known[form] for form in forms(clip.path) if form in known), None) if place is None else place
                for clip, place in zip(clips, found, strict=True)
            ]
    missing = [clip.path for clip, place in zip(clips, found, strict=True) if place is None]
    if missing:
        raise InputError(
            f"{foreign.path}: expected features of every one of the {counted(len(clips), 'clip')}"
            f"{f' of {table}' if table else ''}, but those of {len(missing):,} are missing (first: {missing[0]!r}); "
            f"its {counted(foreign.count, 'name')} are like {foreign.names[0]!r}"
        )
    first: dict[int, str] = {}  # the first clip that has the features at a position
    for clip, place in zip(clips, found, strict=True):
        if first.setdefault(place, clip.path) != clip.path:
            raise InputError(
                f"{foreign.path}: expected features of every clip, but those of {clip.path!r} are also those of "
                f"{first[place]!r}"
            )
    if foreign.count > len(clips):
        log.info("%s: %s are of no clip of %s, and are left out", foreign.path,
                 counted(foreign.count - len(clips), "feature"), table or "the first view")  # fmt: skip
    return found


def _digest(found: Mapping[str, Foreign], clips: Sequence[Clip], samples: int, dtype: str) -> str:
    """Returns what an unfinished store is recognised by: the files, the clips and the settings."""
    sha = hashlib.sha256()
    files = [
        (view, str(foreign.path.resolve()), foreign.count,
         file_states(foreign.files or [foreign.path], lambda file, folder=foreign.path: os.path.relpath(file, folder)))
        for view, foreign in found.items()
    ]  # fmt: skip
    sha.update(json.dumps([files, samples, dtype]).encode())
    for clip in clips:
        sha.update(json.dumps(clip).encode())
    return sha.hexdigest()[:32]
