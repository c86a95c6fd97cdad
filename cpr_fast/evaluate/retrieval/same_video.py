"""A comparison with the untrained network that needs no labels: is the nearest clip one of the same video?

The first and the last clip of a video have no frame in common. The first clip of each video searches among the last
clips of all videos, and finds the right one if it is of its own video. InfoNCE trains a network to do this, so a
network that does it no better than the same network with random weights is not shown to have learnt anything. The
reverse does not hold: clips of a video also share their scenery, so a high rate does not show that actions are told
apart, which only labels can show.

Exact copies are the same video: only the first of them takes part. Otherwise each would be nearest to the other as
often as to itself, and half of these hits would count as misses.

Letters: M videos, F feature width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cpr_fast.config import DataConfig
from cpr_fast.data.index.index import Index
from cpr_fast.evaluate.features.cache import FeatureCache, NothingReadError, embed_index
from cpr_fast.evaluate.features.embedding import Embedding
from cpr_fast.evaluate.features.intervals import source_interval
from cpr_fast.evaluate.retrieval.paired import paired_difference
from cpr_fast.evaluate.retrieval.ranking import Comparison, compared, first_and_precision, prepare_streams
from cpr_fast.runtime.progress import WHOLE, Part

if TYPE_CHECKING:
    from cpr_fast.data.clips.loader import WindowLoader

MOST_VIDEOS = 256  # evenly spaced in the index: the interval of a rate is then within about 6 points


class TwoClips(NamedTuple):
    """Videos that are compared by two of their clips, and the number of exact copies of them that were left out."""

    videos: Index
    copies: int


def videos_with_two_clips(index: Index, data: DataConfig) -> TwoClips:
    """Returns at most MOST_VIDEOS videos, evenly spaced, whose first and last clip have no frame in common; of exact
    copies among them only the first."""
    long = [video for video in index if video.shared_frames(data) >= 2 * data.frames * data.stride]
    chosen = Index(long[:: max(1, -(-len(long) // MOST_VIDEOS))])
    distinct = [video for place, (video, first) in enumerate(zip(chosen, chosen.originals(), strict=True))
                if place == first]  # fmt: skip
    return TwoClips(Index(distinct), len(chosen) - len(distinct))


def same_video_rates(
    compared_videos: TwoClips,
    embeddings: Mapping[str, Embedding],
    open_pairs: Callable[[Index], WindowLoader],
    *,
    cache: FeatureCache | None = None,
    progress: bool = False,
    work: Part = WHOLE,
) -> list[dict[str, Any]]:
    """Measures how often the nearest clip is of the same video. Other videos of the query's source are left out.

    Under `torchrun` the processes share the videos.

    Args:
        compared_videos: See `videos_with_two_clips`.
        embeddings: "trained/view", and "untrained/view" or baselines.
        open_pairs: Opens a loader of two windows per video, the first and the last, in the order of the index.
        cache: Stores the features of the two clips, and holds those of earlier calls; its identity is that of the
            recipe with two windows per video.
        work: What these videos are a part of.
    Returns:
        A row for each network and view, and after the views of a network two of them together: `name`, `view`, `r@1`
        (a fraction of the videos), `r@1_ci95` (bootstrap over sources), `chance_r@1`, `videos`, `copies` (exact copies
        that were left out); for the trained network also `difference` from the untrained one, and its
        `difference_ci95` (paired bootstrap over sources). No row if fewer than two sources could be read.
    """
    videos, copies = compared_videos
    features, kept = _pairs(videos, embeddings, open_pairs, cache, progress, work)
    sources = torch.from_numpy(videos.source_ids)[kept]
    if len(sources.unique()) < 2:
        return []
    own = torch.eye(len(kept), dtype=torch.bool)
    siblings = (sources[:, None] == sources) & ~own
    chance = (1 / (~siblings).sum(1).double()).mean().item()
    hits: dict[str, Tensor] = {}
    for name, streams in compared(embeddings).items():
        metric = embeddings[streams[0]].metric
        pairs = prepare_streams(*([features[s][:, end] for s in streams] for end in (0, 1)), metric)
        similarity = Comparison(pairs, metric).similarity(torch.arange(len(kept))).masked_fill(siblings, -torch.inf)
        hits[name] = (first_and_precision(similarity, own)[0] == 0).double()
    rows = []
    for name, found in hits.items():
        model, view = name.split("/")
        row = {"name": model, "view": view, "r@1": found.mean().item(), "r@1_ci95": source_interval(found, sources)}
        rows.append(row | {"chance_r@1": chance, "videos": len(kept), "copies": copies})
        if model == "trained" and (before := hits.get(f"untrained/{view}")) is not None:
            paired = paired_difference(found, before, sources)
            rows[-1] |= {"difference": paired["difference"], "difference_ci95": paired["ci95"]}
    networks = list(dict.fromkeys(row["name"] for row in rows))
    return sorted(rows, key=lambda row: networks.index(row["name"]))


def _pairs(
    videos: Index,
    embeddings: Mapping[str, Embedding],
    open_pairs: Callable[[Index], WindowLoader],
    cache: FeatureCache | None,
    progress: bool,
    work: Part,
) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the features of both clips of every readable video, {name: [M, 2, F]}, and its positions [M] int64."""
    both = {name: _of_pairs(embedding) for name, embedding in embeddings.items()}
    try:
        features, found = embed_index(
            videos, both, lambda part: _PairLoader(open_pairs(part)), cache, description="two clips of a video",
            progress=progress, work=work,
        )  # fmt: skip
    except NothingReadError:
        return {}, torch.zeros(0, dtype=torch.int64)
    kept = found.nonzero()[:, 0]
    return {name: rows[kept].unflatten(1, (2, -1)) for name, rows in features.items()}, kept


def _of_pairs(embedding: Embedding) -> Embedding:
    """Returns an embedding of two clips of a video as one row: clips [2 * N, 3, T, H, W], the two of a video one after
    the other, to [N, 2 * F]."""

    def function(clips: Tensor) -> Tensor:
        features = embedding.function(clips).flatten(1).float()
        if embedding.metric == "cosine":
            features = F.normalize(features, dim=1)
        return features.unflatten(0, (-1, 2)).flatten(1)

    # Each clip has its length already, so the row must keep its own.
    return Embedding(embedding.view, function, "euclidean", embedding.key and f"{embedding.key} two clips")


class _PairLoader:
    """Joins the windows of a loader of two windows per video: a batch holds both clips of its videos one after the
    other, and each video once. A video of which one window could not be read is left out."""

    def __init__(self, loader: WindowLoader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    @property
    def windows(self) -> int:
        return self._loader.windows

    @property
    def skipped(self) -> Sequence[Any]:
        return self._loader.skipped

    def close(self) -> None:
        self._loader.close()

    def __iter__(self) -> Iterator[_PairBatch]:
        rest: dict[str, Tensor] = {}  # the last window, if the other one of its video may be in the next batch
        rest_video = torch.zeros(0, dtype=torch.int64)
        for batch in self._loader:
            video = torch.cat([rest_video, batch.video.cpu()])
            clips = {view: torch.cat([rest[view], x]) if rest else x for view, x in batch.clips.items()}
            first = (video[1:] == video[:-1]).nonzero()[:, 0]
            if len(first):
                both = torch.stack([first, first + 1], 1).flatten()
                yield _PairBatch({view: x[both.to(x.device)] for view, x in clips.items()}, video[first])
            alone = bool(len(video)) and not (len(first) and first[-1] + 2 == len(video))
            rest = {view: x[-1:] for view, x in clips.items()} if alone else {}
            rest_video = video[-1:] if alone else video[:0]


class _PairBatch(NamedTuple):
    """Clips {view: [2 * N, 3, T, H, W]} of N videos [N] int64."""

    clips: dict[str, Tensor]
    video: Tensor
