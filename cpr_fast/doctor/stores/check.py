"""Reads a whole store of features, and compares its clips with the videos of an index."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpr_fast.data.features.names import FILE
from cpr_fast.data.features.store import CHUNK, Description, FeatureStore
from cpr_fast.data.files.names import text_of
from cpr_fast.data.files.relative import path_in
from cpr_fast.data.storage.media import resolved
from cpr_fast.doctor.findings import Finding
from cpr_fast.errors import InputError
from cpr_fast.runtime.progress import track
from cpr_fast.wording import counted

if TYPE_CHECKING:
    from cpr_fast.data.index.index import Index

NAMED = 3  # clips that a finding names
AGAIN = "repeat the `cpr-fast embed` that wrote the store, without --shard; only shards that are not whole are computed"


def check_store(folder: Path, videos: Index | None, findings: list[Finding]) -> dict[str, Any] | None:
    """Checks that a store is complete, that its shards have the dimensions that it states, and that all features are
    finite; every feature is read once.

    Args:
        videos: The index that the store should hold, or None.
        findings: Gets an error for what makes commands fail, and a warning for what changes results.
    Returns:
        `folder`, `clips`, `planned`, `samples`, `views` with the dimensions of each, `dtype`, and, with an index,
        `missing`, how many of its videos the store lacks; None if the store cannot be opened.
    """
    try:
        store = FeatureStore(folder, "STORE")
    except InputError as error:
        findings.append(Finding("error", str(error), AGAIN, "fails"))
        return None
    about = store.about
    result = {"folder": str(folder), "clips": len(store.table), "planned": sum(about.planned),
              "samples": about.samples, "views": about.views, "dtype": about.dtype}  # fmt: skip
    whole = [_check_values(store, view, findings) for view in about.views]
    _check_description(folder, about, len(store.table), findings)
    if videos is not None:
        result["missing"] = _check_clips(store, videos, findings)
    if all(whole):
        wide = ", ".join(f"{view} {width}" for view, width in about.views.items())
        text = f"{folder}: {counted(len(store.table), 'clip')}, all features are finite; dimensions: {wide}"
        findings.append(Finding("ok", text))
    return result


def _check_values(store: FeatureStore, view: str, findings: list[Finding]) -> bool:
    """Returns whether the features of a view are finite and differ between clips; otherwise adds a finding."""
    count, first, differs = len(store.table), None, False
    blocks = range(0, count, CHUNK)
    try:
        for begin in track(blocks, f"features of {view}", total=len(blocks), unit="blocks", progress=True):
            rows = np.arange(begin, min(begin + CHUNK, count))
            samples = store.samples(view, begin, int(rows[-1]) + 1)
            store.require_finite(view, samples, rows)
            (evaluation,) = store.evaluation(view, rows)
            first = evaluation[0].copy() if first is None else first
            differs = differs or bool((evaluation != first).any())
    except InputError as error:
        findings.append(Finding("error", str(error), "delete this file, and " + AGAIN, "fails"))
        return False
    except Exception as error:  # the header of a shard is whole, but the file cannot be read
        text = f"{store.folder}: the features of the view {view!r} cannot be read: {type(error).__name__}: {error}"
        findings.append(Finding("error", text, "copy the store again, or embed the videos again", "fails"))
        return False
    if count > 1 and not differs:
        text = f"{store.folder}: all {counted(count, 'clip')} have the same feature of the view {view!r}"
        findings.append(Finding("error", text, "check the network that computed the features", "results"))
        return False
    return True


def _check_description(folder: Path, about: Description, clips: int, findings: list[Finding]) -> None:
    if left_out := sum(about.planned) - clips:
        text = (f"{folder}: {counted(left_out, 'clip')} of {sum(about.planned):,} could not be read when the store was "
                "written, and are left out")  # fmt: skip
        findings.append(Finding("warning", text, "`cpr-fast doctor INDEX` names the videos that cannot be read",
                                "results"))  # fmt: skip
    if len(set(about.views.values())) > 1:
        wide = ", ".join(f"{view} {width}" for view, width in about.views.items())
        text = f"{folder / FILE}: the views have different dimensions ({wide}); zeros are appended to the narrower ones"
        findings.append(Finding("ok", text))


def _check_clips(store: FeatureStore, videos: Index, findings: list[Finding]) -> int:
    """Returns how many videos of an index a store lacks; adds findings about these and about labels that differ."""
    table = store.table
    stored = {resolved(path_in(store.folder, path)): row for row, path in enumerate(table.paths)}
    missing, other = [], []
    for video in videos:
        row = stored.get(resolved(video.path))
        if row is None:
            missing.append(video.path)
            continue
        label = table.classes[table.labels[row]] if table.labels[row] >= 0 else ""
        split = table.split_names[table.splits[row]]
        if (label, split) != (video.label, video.split):
            other.append(video.path)
    named = [(missing, "are not in the store", "embed them into a new folder"),
             (other, "have another label or split in the store", "embed the index into a new folder")]  # fmt: skip
    for paths, what, advice in named:
        if paths:
            some = ", ".join(map(text_of, paths[:NAMED])) + (", ..." if len(paths) > NAMED else "")
            text = f"{store.folder}: {len(paths):,} of the {counted(len(videos), 'video')} of the index {what}: {some}"
            findings.append(Finding("warning", text, advice, "results"))
    if extra := len(stored) - (len(videos) - len(missing)):
        text = f"{store.folder}: {counted(extra, 'clip')} of the store are not in the index"
        findings.append(Finding("warning", text, "training on the store uses them", "results"))
    return len(missing)
