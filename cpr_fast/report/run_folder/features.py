"""The features that `cpr-fast retrieve` stored for a run's trained network, one row per video.

Letters: M videos, F feature width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cpr_fast.data.index.index import Index, Video
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.cache import FeatureCache, digest, video_digest, weights_digest
from cpr_fast.evaluate.features.embedding import Embedding
from cpr_fast.evaluate.features.pretrained import load_pretrained
from cpr_fast.evaluate.features.recipe import Metric
from cpr_fast.evaluate.retrieval.baselines import BASELINES
from cpr_fast.evaluate.retrieval.ranking import leading_views

PIXELS = "single_frame/rgb"  # the baseline features: the pixels of one small frame of a video


@dataclass(frozen=True)
class StoredFeatures:
    """Features of the trained network for M videos.

    Attributes:
        videos: the videos of the index that have features of every view.
        streams: {view: [M, F] float32} of the views that `retrieve` compares together, see `leading_views`.
        metric, recipe: how the features are compared, and how they were computed; see
            `cpr_fast.evaluate.features.recipe.Recipe`.
        pixels: [M, F] of the baseline `PIXELS`, or None where it was not stored.
    """

    videos: list[Video]
    streams: dict[str, Tensor]
    metric: Metric
    recipe: str
    pixels: Tensor | None


def names_of(videos: Sequence[Video]) -> dict[Video, str]:
    """Returns the name of each video below the folder that holds all of them: file names alone may occur twice."""
    paths = [video.path.absolute() for video in videos]
    common = os.path.commonpath([path.parent for path in paths])
    return {video: str(path.relative_to(common)) for video, path in zip(videos, paths, strict=True)}


def stored_features(run: Path, index: Index) -> StoredFeatures | None:
    """Returns the features of the videos of `index`, from the newest checkpoint of the run that has stored features;
    None if no checkpoint has.

    A file of features is named after the weights and the recipe that it was made with, which tells the trained network
    from the untrained one and from older checkpoints.
    """
    files = _described(run / "features")
    for checkpoint in _checkpoints(run) if files else ():
        try:
            encoders = load_pretrained(str(checkpoint)).encoders
        except (InputError, OSError, RuntimeError, KeyError):
            continue  # skip damaged and unknown files, but read the features of the others
        embeddings = {view: Embedding(view, encoder, key=weights_digest(encoder)) for view, encoder in encoders.items()}
        found = [_collect(run / "features", identity, embeddings, index) for identity in dict.fromkeys(files.values())]
        usable = [features for features in found if features is not None]
        if usable:
            return max(usable, key=lambda features: (len(features.streams), len(features.videos)))
    return None


def _described(folder: Path) -> dict[str, str]:
    """Returns {file name: identity of the recipe} of every file of features."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as stored:
                found[file.name] = (stored.metadata() or {}).get("identity", "")
        except (SafetensorError, OSError):
            continue
    return {name: identity for name, identity in found.items() if identity}


def _checkpoints(run: Path) -> Iterator[Path]:
    """Yields the checkpoints of a run, last.pt first, then from the newest to the oldest."""
    files = sorted((run / "checkpoints").glob("*.pt"), key=lambda file: -file.stat().st_mtime)
    yield from sorted(files, key=lambda file: file.name != "last.pt")


def _collect(folder: Path, identity: str, embeddings: dict[str, Embedding], index: Index) -> StoredFeatures | None:
    """Returns the features of one recipe, of the views that were stored; None if there is no video."""
    cache = FeatureCache(folder, identity)
    known = {view: rows for view, embedding in embeddings.items() if (rows := cache.load(embedding))}
    known = {view: known[view] for view in leading_views(list(known))}
    if not known:
        return None
    videos, rows = [], {view: [] for view in known}
    pixels: list[Tensor] | None = []
    baseline = cache.load(BASELINES[PIXELS])
    for video in index:
        keys = {view: _key(video, view, identity) for view in (*known, "rgb")}
        if any(keys[view] not in known[view] for view in known):
            continue
        videos.append(video)
        for view in known:
            rows[view].append(known[view][keys[view]][0])
        feature = baseline.get(keys["rgb"])
        pixels = None if feature is None or pixels is None else [*pixels, feature[0]]
    if not videos:
        return None
    recipe = json.loads(identity)["recipe"]
    streams = {view: torch.stack(features).float() for view, features in rows.items()}
    small = torch.stack(pixels).float() if pixels else None
    return StoredFeatures(videos, streams, recipe["metric"], recipe["name"], small)


def _key(video: Video, view: str, identity: str) -> str:
    try:
        return video_digest(video, view, identity)
    except OSError:  # the video no longer exists
        return digest("")
