"""The training videos of a run: which rows of the index they are, whether they are long enough, and the digest by which
a resumed run recognises them."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cpr_fast.config import Config, DataConfig, ModelConfig
from cpr_fast.config.pixels import least_clip
from cpr_fast.config.sections import STORED
from cpr_fast.data.features.index import StoredClips
from cpr_fast.data.index.index import Index, too_few
from cpr_fast.data.storage.media import is_pictures
from cpr_fast.data.video.vectors.fields import codec_without_vectors
from cpr_fast.errors import InputError
from cpr_fast.runtime.progress import first_process
from cpr_fast.wording import counted, listed

OPENED = 8  # videos of which the codec is read before a run that needs their motion vectors
MEASURED_QUERIES = 64  # of each step on features

log = logging.getLogger(__name__)


def every_video(data: DataConfig) -> Index:
    """Loads the videos of `data.index`, or the clips of the store `data.features`. Raises InputError that names the
    setting, if neither was given or it cannot be read."""
    if data.features:
        return StoredClips.open(data.features, "data.features")
    if not data.index:
        raise InputError("data.index: expected the path of an index (written by `cpr-fast index`), got ''")
    return Index.load(data.index, require_flow=data.flow == "stored")


def on_features(config: Config, index: Index) -> Config:
    """Returns the config with the network for the features of `index`, and without `data.index`, if it is of a
    store."""
    if not isinstance(index, StoredClips):
        return config
    ours = ModelConfig(arch=STORED, args={"width": index.store.width})
    kept = {name: getattr(ours, name) for name in ("arch", "args", "width", "conv_std", "pool", "mean", "std")}
    measured = config.health.mining_queries or MEASURED_QUERIES
    return replace(
        config,
        data=replace(config.data, index=""),
        model=replace(config.model, **kept),
        health=replace(config.health, mining_queries=measured),
    )


def training_videos(data: DataConfig) -> Index:
    """Loads the videos of `data.index`, or the clips of the store `data.features`, whose split is `data.split`, or all
    of them where no row has a split, without those that `data.short_videos` drops.

    Raises:
        InputError: no index was given, it cannot be read, no video has that split, or all are dropped; the message
            names the setting.
    """
    index = every_video(data)
    try:
        part = index.select_for_training(data.split)
    except InputError as error:
        raise InputError(f"data.split: {error}. Choose one with --data.split") from None
    kept = part.long_enough(data)
    reason = too_few(len(kept), kept.source_count, data.split if index.has_splits else "")
    if reason and first_process():
        log.warning("Warning: data.index: %s; a run on fewer shows only that everything works", reason)
    return kept


def require_vectors(index: Index, cycle: str) -> None:
    """Raises InputError if all of OPENED videos, evenly spread over the index, are of a kind without motion vectors. A
    few such videos are replaced by others in training."""
    paths = [index[place].path for place in np.unique(np.linspace(0, len(index) - 1, OPENED, dtype=int)).tolist()]
    kinds = ["pictures" if is_pictures(path) else codec_without_vectors(path) for path in paths]
    if all(kinds):
        raise InputError(
            f"data.flow: {cycle} needs the motion vectors of H.264 or MPEG-4 (data.flow = 'vectors'), but each of "
            f"{counted(len(paths), 'video')} that {'was' if len(paths) == 1 else 'were'} opened has none: "
            f"{listed(list(dict.fromkeys(kinds)))} (first: {str(paths[0])!r})"
        )


def about_lengths(config: Config, index: Index) -> Iterator[str]:
    """Yields why many videos are too short for the clips of the config."""
    span = config.data.frames * config.data.stride
    frames = index.shared_frames(config.data) if config.data.fps else index.numbers("num_frames")
    short = int((frames < span).sum())
    if 2 * short >= len(index):
        yield (
            f"{short} of {counted(len(index), 'video')} are shorter than a clip of "
            f"{counted(config.data.frames, 'frame')} at stride "
            f"{config.data.stride}{_sampled(config)} and are padded: {_shorter_clips(config)}"
        )
    if config.data.augment == "none" and not (frames > span).any():
        yield (
            "data.augment is 'none' and no video is longer than a clip: both clips of a video are the same, so that "
            "there is nothing to learn from a pair; choose another data.augment or a lower data.frames"
        )


def _sampled(config: Config) -> str:
    """Returns the sampling of the frames that a message counts, as a part of its sentence."""
    return f" of {config.data.fps:g} samples per second" if config.data.fps else ""


def _shorter_clips(config: Config) -> str:
    """Returns the settings that make clips shorter, as far as the network allows it."""
    least, _ = least_clip(config.model.arch)
    ways = ["data.frames"] * (config.data.frames > least) + ["data.stride"] * (config.data.stride > 1)
    if not ways:
        return f"model.arch {config.model.arch!r} reads no clips of fewer than {least} frames, so use longer videos"
    return f"set {' or '.join(ways)} lower"


def digest(index: Index) -> dict[str, Any]:
    """Summarises which videos an index holds: paths, labels and sources, in order.

    Paths are taken relative to the folder that all of them share, so a data set may be moved as a whole. File times and
    sizes do not count.

    Returns:
        `count`; `rows`, a hash of the ordered rows and of the class names; `any_order`, the same for the sorted
        rows; `paths`, a hash of the ordered paths only. The last two are used to tell how two lists differ.
    """
    if isinstance(index, StoredClips):
        rows = hashlib.sha256(index.store.about.digest.encode() + index.rows.tobytes()).hexdigest()[:32]
        return {"count": len(index), "rows": rows, "any_order": rows, "paths": rows}
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


def check_same_videos(before: dict[str, Any] | None, now: dict[str, Any], folder: Path, data: DataConfig) -> None:
    """Checks that a resumed run has the same videos as before.

    Args:
        before: the `digest` in the checkpoint; None in a checkpoint of an older version, for which only a note is
            logged.
        now: the `digest` of the present videos.
        folder: the run folder, for the message.
        data: the settings of the data, of which the message names `data.index` or `data.features`.
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
        came = "other features, or those of other clips" if data.features else "other videos"
    option, given, what = (
        ("data.features", data.features, "store") if data.features else ("data.index", data.index, "index")
    )
    raise InputError(
        f"{option}: the run in {str(folder)!r} was trained on {counted(before['count'], 'video')}, got {came} "
        f"({given!r}). Resume with the {what} it began with, or start a new run with another --run.out"
    )


def _hash(rows: Iterable[tuple[str, ...]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for field in row:
            raw = field.encode("utf-8", "surrogateescape")
            digest.update(len(raw).to_bytes(8, "little") + raw)  # lengths make this unambiguous
        digest.update(b"\n")
    return digest.hexdigest()[:32]
