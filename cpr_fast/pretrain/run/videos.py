"""The training videos of a run: which rows of the index they are, and the digest by which a resumed run recognises
them."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cpr_fast.config import DataConfig
from cpr_fast.data.index.index import Index, too_few
from cpr_fast.errors import InputError
from cpr_fast.runtime.progress import first_process
from cpr_fast.wording import counted

log = logging.getLogger(__name__)


def training_videos(data: DataConfig) -> Index:
    """Loads the videos of `data.index` whose split is `data.split`, or all of them where no row has a split, without
    those that `data.short_videos` drops.

    Raises:
        InputError: no index was given, it cannot be read, no video has that split, or all are dropped; the message
            names the setting.
    """
    if not data.index:
        raise InputError("data.index: expected the path of an index (written by `cpr-fast index`), got ''")
    index = Index.load(data.index, require_flow=data.flow == "stored")
    try:
        part = index.select_for_training(data.split)
    except InputError as error:
        raise InputError(f"data.split: {error}. Choose one with --data.split") from None
    kept = part.long_enough(data)
    reason = too_few(len(kept), len({video.source for video in kept}), data.split if index.has_splits else "")
    if reason and first_process():
        log.warning("Warning: data.index: %s; a run on fewer shows only that everything works", reason)
    return kept


def digest(index: Index) -> dict[str, Any]:
    """Summarises which videos an index holds: paths, labels and sources, in order.

    Paths are taken relative to the folder that all of them share, so a data set may be moved as a whole. File times and
    sizes do not count.

    Returns:
        `count`; `rows`, a hash of the ordered rows and of the class names; `any_order`, the same for the sorted
        rows; `paths`, a hash of the ordered paths only. The last two are used to tell how two lists differ.
    """
    paths = [os.path.abspath(video.path) for video in index]
    root = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    names = [path[len(root) :].lstrip("/") for path in paths]
    rows = [(name, video.label, video.source) for name, video in zip(names, index, strict=True)]
    return {
        "count": len(rows),
        "rows": _hash([*rows, tuple(index.classes)]),
        "any_order": _hash(sorted(rows)),
        "paths": _hash((name,) for name in names),
    }


def check_same_videos(before: dict[str, Any] | None, now: dict[str, Any], folder: Path, index: str) -> None:
    """Checks that a resumed run has the same videos as before.

    Args:
        before: the `digest` in the checkpoint; None in a checkpoint of an older version, for which only a note is
            logged.
        now: the `digest` of the present videos.
        folder: the run folder, for the message.
        index: the setting `data.index`, for the message.
    Raises:
        InputError: the videos differ. The memory and the labels of a checkpoint refer to positions in the index.
    """
    if before is None:
        if first_process():
            log.warning(
                "The checkpoint is of an older version, which did not record the training videos: make sure that "
                "data.index has the same rows in the same order as when the run began"
            )
        return
    if before["rows"] == now["rows"]:
        return
    if before["any_order"] == now["any_order"]:
        came = "the same videos in another order, or with the classes in another order"
    elif before["paths"] == now["paths"]:
        came = "the same videos with other labels or sources"
    elif before["count"] != now["count"]:
        came = f"{counted(now['count'], 'video')}"
    else:
        came = "other videos"
    raise InputError(
        f"data.index: the run in {str(folder)!r} was trained on {counted(before['count'], 'video')}, got {came} "
        f"({index!r}). Resume with the index it began with, or start a new run with another --run.out"
    )


def _hash(rows: Iterable[tuple[str, ...]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for field in row:
            raw = field.encode("utf-8", "surrogateescape")
            digest.update(len(raw).to_bytes(8, "little") + raw)  # lengths make this unambiguous
        digest.update(b"\n")
    return digest.hexdigest()[:32]
