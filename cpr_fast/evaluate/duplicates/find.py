"""Near-duplicates and clips of one source among the videos of an index.

Letters: M videos of the index, N of them with features, F feature width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpr_fast.data.features.names import base_forms, unique_names, whole_forms
from cpr_fast.data.features.store import FeatureStore
from cpr_fast.data.files.relative import path_in
from cpr_fast.data.index.index import Index, numbered
from cpr_fast.data.storage.media import resolved
from cpr_fast.errors import InputError
from cpr_fast.evaluate.duplicates.graph import Unfinished, relative_spread, stored_graph, unit_features
from cpr_fast.evaluate.duplicates.groups import Groups, Pairs, agreement, at_thresholds, joined, pairs_of, sizes
from cpr_fast.evaluate.features.cache import FeatureCache, embed_index, weights_digest
from cpr_fast.evaluate.features.embedding import encoder_embeddings
from cpr_fast.evaluate.features.pretrained import load_pretrained
from cpr_fast.evaluate.features.recipe import Metric, RecipeName, recipe_for
from cpr_fast.evaluate.features.results import Checkpoints
from cpr_fast.evaluate.features.windows import open_windows
from cpr_fast.evaluate.retrieval.names import percent
from cpr_fast.evaluate.retrieval.ranking import encoders_together, leading_views
from cpr_fast.runtime.distributed import device_of
from cpr_fast.wording import counted

THRESHOLDS = (0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.925, 0.9, 0.85, 0.8)  # of the table from which a user chooses
# Distance from their mean, as a part of its length, up to which features are all equal: it is up to 4.2e-5 of 5,000
# features of 512 dimensions that differ by rounding (1e-6) and were stored in float16.
EQUAL = 1e-4
DOUBTFUL = 0.5  # precision below which the groups are not to be believed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compared:
    """The features of N videos of an index, whose dot product is the similarity, and how they were made.

    Attributes:
        positions: [N] int64, ascending positions in the index; the features of the others could not be read.
        features: [N, F] float32 on the CPU.
        views: what is compared together.
        what: the network or the store, in words.
        equal: the views whose features are the same for all videos, but for rounding.
    """

    index: Index
    positions: np.ndarray
    features: Tensor
    views: list[str]
    what: str
    equal: list[str] = field(default_factory=list)

    def doubts(self) -> list[str]:
        """Returns a sentence that warns of features by which no videos can be told apart, if there are any."""
        if not self.equal:
            return []
        return [
            f"The {' and '.join(self.equal)} features of all {counted(len(self.positions), 'video')} are equal "
            f"({self.what}), so they tell no videos apart: the network has collapsed, or all videos are copies of "
            "one."
        ]


@dataclass(frozen=True)
class Duplicates:
    """What was found.

    Attributes:
        compared: the videos.
        pairs: the pairs of the graph from the lowest threshold of `table` or `sibling` on.
        duplicates, siblings: [M] int64, the group of every video of the index; videos of one group of duplicates are in
            one of siblings.
        sources: [M] int64, the sources of the new index: videos that share a group or a source of the index.
        neighbours, duplicate, sibling: the settings.
        table: see `at_thresholds`.
        agreement: see `cpr_fast.evaluate.duplicates.groups.agreement`, of the groups of siblings with the sources of
            the index; None if no two videos have the same source.
    """

    compared: Compared
    pairs: Pairs
    duplicates: np.ndarray
    siblings: np.ndarray
    sources: np.ndarray
    neighbours: int
    duplicate: float
    sibling: float
    table: list[dict[str, Any]]
    agreement: dict[str, Any] | None

    def doubts(self) -> list[str]:
        """Returns sentences that warn of features that are all equal, and of groups that contradict the sources of the
        index."""
        known = self.agreement
        if known is None or known["precision"] is None or known["precision"] >= DOUBTFUL:
            return self.compared.doubts()
        index = self.compared.index
        return [
            *self.compared.doubts(),
            f"Only {percent(known['precision'])} of the pairs in the groups of siblings are of one source of the "
            f"index, and {counted(index.source_count, 'source')} became {int(self.sources.max()) + 1:,}: if the "
            "sources of the index are right, do not use the new one; choose a greater --sibling, or other features.",
        ]

    def summary(self) -> dict[str, Any]:
        """Returns the numbers of the result."""
        index = self.compared.index
        return {
            "videos": len(index), "compared": len(self.compared.positions), "features": self.compared.what,
            "views": self.compared.views, "neighbours": self.neighbours,
            "duplicate": {"threshold": self.duplicate, **sizes(self.duplicates)},
            "sibling": {"threshold": self.sibling, **sizes(self.siblings)},
            "sources_before": index.source_count, "sources": int(self.sources.max()) + 1,
            "known_sources": self.agreement, "thresholds": self.table,
        }  # fmt: skip


def of_checkpoint(
    index_csv: Path,
    checkpoint: Checkpoints,
    *,
    recipe: RecipeName | None = None,
    pictures_fps: float | None = None,
    device: str = "auto",
    progress: bool = False,
) -> Compared:
    """Returns the features of the videos of an index by a checkpoint, as `retrieve` stores them. `pictures_fps`: see
    `load_pretrained`.

    Raises:
        InputError: see `load_pretrained` and `Index.load`; or fewer than two videos could be read.
    """
    device = str(device_of(device))
    pretrained = load_pretrained(checkpoint, device=device, pictures_fps=pictures_fps)
    pretrained = pretrained.of_videos("dedup", "--checkpoint")
    how = recipe_for(pretrained.data, recipe)
    index = Index.load(index_csv, require_flow=False)
    encoders, _ = encoders_together(pretrained.encoders, index, pretrained.data.flow == "stored", "INDEX")
    views = list(encoders)
    keys = {view: weights_digest(encoder) for view, encoder in encoders.items()}
    features, windows = embed_index(
        index, encoder_embeddings("net", encoders, how, keys),
        partial(open_windows, data=pretrained.data, views=views, recipe=how, device=device),
        FeatureCache(pretrained.features, how.identity(pretrained.data, device)), description="index",
        progress=progress,
    )  # fmt: skip
    kept = windows.nonzero()[:, 0]
    return _compared(index, kept.numpy(), (value[kept] for value in features.values()), how.metric, views,
                     f"checkpoint {pretrained.name}, test-time recipe {how.name}")  # fmt: skip


def of_store(index_csv: Path, folder: Path) -> Compared:
    """Returns the features of the videos of an index in a store of features. Videos that the store lacks are left out,
    which is logged.

    Raises:
        InputError: see `FeatureStore` and `Index.load`; or the store has fewer than two of the videos.
    """
    index = Index.load(index_csv, require_flow=False)
    store = FeatureStore(folder, "--features")
    rows = _rows(index, store, index_csv.parent)
    kept = np.flatnonzero(rows >= 0)
    if missing := len(rows) - len(kept):
        first = index[int(np.flatnonzero(rows < 0)[0])].path
        log.warning("%s of the index have no features in %s and are left out (first: %s)",
                    counted(missing, "video"), folder, first)  # fmt: skip
    views = leading_views(list(store.about.views))
    needed, place = np.unique(rows[kept], return_inverse=True)
    streams = (_stream(store, view, needed)[torch.from_numpy(place)] for view in views)
    how = recipe_for(load_pretrained(str(folder)).data)
    return _compared(index, kept, streams, how.metric, views, f"store {folder}")


def _stream(store: FeatureStore, view: str, rows: np.ndarray) -> Tensor:
    """Returns the evaluation features of a view, [len(rows), F] float32; `rows` ascend."""
    features, begin = torch.empty(len(rows), store.about.views[view]), 0
    for part in store.evaluation(view, rows):
        features[begin : begin + len(part)] = torch.from_numpy(part[:, : features.shape[1]])
        begin += len(part)
    return features


def _rows(index: Index, store: FeatureStore, folder: Path) -> np.ndarray:
    """Returns the row of the store of every video of an index, int64 [M]; -1 where it has none. A video is found by its
    file or, as features of other programs are, by its path in the index or its name without folders; by a name only if
    no other clip of the store and no other video of the index has it."""
    names = list(store.table.paths)
    of_file = {resolved(path_in(store.folder, name)): row for row, name in enumerate(names)}
    rows = [of_file.get(resolved(video.path), -1) for video in index]
    if -1 in rows:
        paths = [Path(video.path) for video in index]
        own = [str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path) for path in paths]
        for forms in (whole_forms, base_forms):
            of_name = unique_names((form, row) for row, name in enumerate(names) for form in forms(name))
            of_video = unique_names((form, place) for place, path in enumerate(own) for form in forms(path))
            for place, path in enumerate(own):
                if rows[place] < 0:
                    known = (of_name[form] for form in forms(path) if form in of_name and form in of_video)
                    rows[place] = next(known, -1)
    return np.array(rows, np.int64)


def _compared(
    index: Index, positions: np.ndarray, streams: Iterable[Tensor], metric: Metric, views: list[str], what: str
) -> Compared:
    if len(positions) < 2:
        raise InputError(f"INDEX: expected features of at least 2 videos, got those of {len(positions)}")
    features = list(streams)
    equal = [view for view, values in zip(views, features, strict=True) if relative_spread(values) <= EQUAL]
    found = Compared(index, positions, unit_features(features, metric), views, what, equal)
    for text in found.doubts():
        log.warning("%s", text)
    return found


def find_duplicates(
    compared: Compared,
    graph: Path,
    *,
    neighbours: int,
    duplicate: float,
    sibling: float,
    shard: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> Duplicates | Unfinished:
    """Finds the groups of near-duplicates and of siblings; `Unfinished` while other shards of the graph are missing.

    Args:
        graph: the file of the graph of neighbours, see `stored_graph`.
        neighbours: k of the graph; all other videos if there are fewer.
        duplicate, sibling: the least mean similarity of the videos of a group, sibling <= duplicate.
        shard: (i, n) first compares the i-th of n shares of the pairs, see `stored_graph`.
    Raises:
        InputError: see `stored_graph`.
    """
    features, index = compared.features, compared.index
    found = stored_graph(features, min(neighbours, len(features) - 1), graph, shard=shard, progress=progress)
    if isinstance(found, Unfinished):
        return found
    indices, scores = found
    pairs = pairs_of(indices, scores, min(sibling, THRESHOLDS[-1]))
    groups = Groups(features)
    groups.join(pairs.above(duplicate), duplicate)
    duplicates = groups.numbers()
    groups.join(pairs.above(sibling), sibling)
    siblings = groups.numbers()
    known = index.source_ids[compared.positions]
    several = len(np.unique(known)) < len(known)
    table = at_thresholds(features, pairs, THRESHOLDS, known if several else None)
    of_all = _of_all(compared, siblings)
    return Duplicates(
        compared, pairs, _of_all(compared, duplicates), of_all, joined(of_all, index.source_ids), neighbours, duplicate,
        sibling, table, agreement(siblings, known) if several else None,
    )  # fmt: skip


def _of_all(compared: Compared, groups: np.ndarray) -> np.ndarray:
    """Returns groups [N] as those of all videos of the index [M], of which each without features is its own."""
    count = len(compared.index)
    found = np.arange(len(groups), len(groups) + count)
    found[compared.positions] = groups
    return numbered(found)
