"""Ranking of gallery videos by the similarity of their features, and the measures of a ranking: R@k and mean average
precision (mAP).

Letters: Q queries, G gallery videos, F feature width, R relevant gallery videos of a query.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError
from cpr_fast.evaluate.features.intervals import source_interval
from cpr_fast.evaluate.features.recipe import Metric
from cpr_fast.models import Encoder
from cpr_fast.wording import counted

TOGETHER = {"two_stream": ("rgb", "flow"), "merged": ("rgb", "residual")}  # [CoCLR] and [IIC]
RANKS = (1, 5, 10, 20, 50)
NO_HIT = torch.iinfo(torch.int64).max
CHUNK = 2**23  # number of similarities in memory at once, 32 MiB as float32

log = logging.getLogger(__name__)


def prepare(
    queries: Tensor, gallery: Tensor, metric: Metric, *, centre: Literal["each", "gallery"] = "each"
) -> tuple[Tensor, Tensor]:
    """Returns features [Q, F] and [G, F] normalised for a metric.

    "cosine": each set is centred by its own mean [CoCLR], or both by the gallery's mean if there are too few queries
    to compute a mean, then L2-normalised. "plain_cosine": L2-normalised only [IIC]. "euclidean": both are standardised
    by the gallery.
    """
    if metric == "plain_cosine":
        return F.normalize(queries, dim=1), F.normalize(gallery, dim=1)
    if metric == "cosine":
        own = queries.mean(0) if centre == "each" else gallery.mean(0)
        return F.normalize(queries - own, dim=1), F.normalize(gallery - gallery.mean(0), dim=1)
    mean, std = gallery.mean(0), gallery.std(0, correction=0)
    constant = std <= 1e-5 * gallery.abs().amax(0)  # the spread is only rounding error
    scale = torch.where(constant, 0.0, 1 / std)
    return (queries - mean) * scale, (gallery - mean) * scale


def compared(names: Collection[str]) -> dict[str, list[str]]:
    """Returns the embeddings "name/view" of every comparison: each on its own, then for each name the pairs of
    `TOGETHER` whose views it has."""
    streams = {name: [name] for name in names}
    for model in dict.fromkeys(name.split("/")[0] for name in names):
        for together, views in TOGETHER.items():
            pair = [f"{model}/{view}" for view in views]
            if set(pair) <= set(names):
                streams[f"{model}/{together}"] = pair
    return streams


def leading_views(views: Sequence[str]) -> list[str]:
    """Returns the views whose similarities are summed for the first result of a network: those of the first pair of
    `TOGETHER` that it has, else only its last view."""
    pairs = [list(pair) for pair in TOGETHER.values() if set(pair) <= set(views)]
    return pairs[0] if pairs else list(views)[-1:]


def encoders_together(
    encoders: Mapping[str, Encoder], index: Index, stored: bool, option: str
) -> tuple[dict[str, Encoder], str | None]:
    """Returns the encoders of the views that retrieval compares together, and a note about those that are left out,
    which is logged.

    Args:
        stored: Whether the view "flow" needs stored flow. It is left out if a video of the index has none.
    Raises:
        InputError: That view is the only one; the message names `option`.
    """
    usable, note = dict(encoders), None
    without = int((~index.has_flow).sum()) if stored and "flow" in usable else 0
    if without and len(usable) == 1:
        videos = counted(len(index), "video")
        raise InputError(
            f"{option}: expected stored flow of every video, got none of {without:,} of {videos}; run `cpr-fast flow` "
            "first"
        )
    if without:
        del usable["flow"]
        note = f"flow is left out: it is missing for {without:,} of {counted(len(index), 'video')} of the index; "
        note += "run `cpr-fast flow` first"
    together = leading_views(list(usable))
    if others := [view for view in usable if view not in together]:
        left_out = f"{' and '.join(others)} is left out: retrieval compares two views, {' and '.join(together)}"
        if len(together) == 1:
            left_out = f"{' and '.join(others)} is left out: retrieval does not compare it together with {together[0]}"
        note = left_out if note is None else f"{note}; {left_out}"
    if note is not None:
        log.warning(note)
    return {view: usable[view] for view in together}, note


def prepare_streams(
    queries: Iterable[Tensor],
    gallery: Iterable[Tensor],
    metric: Metric,
    *,
    centre: Literal["each", "gallery"] = "each",
) -> list[tuple[Tensor, Tensor]]:
    """Returns the streams of a `Comparison` for the features [Q, F] and [G, F] of one or more views.

    The similarity of several views is the sum of their similarities [CoCLR]. With "plain_cosine" it is the cosine of
    their concatenated features, in which a view with longer features weighs more [IIC].
    """
    if metric == "plain_cosine":
        queries, gallery = [torch.cat(list(queries), 1)], [torch.cat(list(gallery), 1)]
    return [prepare(q, g, metric, centre=centre) for q, g in zip(queries, gallery, strict=True)]


@dataclass(frozen=True)
class Comparison:
    """Compares Q queries with G gallery videos by the sum of similarities of one or more streams.

    Attributes:
        streams: Pairs of features ([Q, F], [G, F]) from `prepare_streams`.
        query_sources, gallery_sources: [Q], [G] int64; if given, videos of the query's own source are left out.
    """

    streams: Sequence[tuple[Tensor, Tensor]]
    metric: Metric
    query_sources: Tensor | None = None
    gallery_sources: Tensor | None = None

    def similarity(self, queries: Tensor) -> Tensor:
        """Returns the similarity of these queries to the gallery: [len(queries), G], -inf where left out."""
        total = sum(
            -torch.cdist(q[queries], g) if self.metric == "euclidean" else q[queries] @ g.T for q, g in self.streams
        )
        if self.query_sources is not None:
            own = self.query_sources[queries, None] == self.gallery_sources
            total = total.masked_fill(own, -torch.inf)
        return total

    def rank(self, query_labels: Tensor, gallery_labels: Tensor) -> Ranking:
        """Ranks the gallery for every query. Labels [Q], [G] int64 are classes.

        Equal similarities rank by gallery position. Time O(Q G log G). Memory: a few times CHUNK similarities, or those
        of a single query if they are more.
        """
        gallery = len(gallery_labels)
        parts = []
        for chunk in torch.arange(len(query_labels)).split(max(1, CHUNK // max(1, gallery))):
            similarity = self.similarity(chunk)
            allowed = similarity > -torch.inf
            relevant = allowed & (query_labels[chunk, None] == gallery_labels)
            parts.append(
                (*first_and_precision(similarity, relevant), *_chance(relevant.sum(1), allowed.sum(1), gallery))
            )
        return Ranking(*(torch.cat(values) for values in zip(*parts, strict=True)))

    def nearest(self, query: int, k: int) -> list[int]:
        """Returns the positions of the k nearest gallery videos, nearest first; fewer if there are fewer candidates."""
        similarity = self.similarity(torch.tensor([query]))[0]
        order = similarity.sort(descending=True, stable=True).indices[:k]
        return order[similarity[order] > -torch.inf].tolist()


@dataclass(frozen=True)
class Ranking:
    """Measures of the ranking of every query.

    Attributes:
        first_hit: [Q] int64, the rank (0 = nearest) of the nearest relevant video, one of the query's class; NO_HIT if
            there is none.
        average_precision: [Q] float64, the mean over the relevant videos of the precision at their rank, which is the
            share of relevant videos among those up to and including that rank; NaN if there is no relevant video.
        chance_r1, chance_precision: [Q] float64, the expected R@1 and average precision of a random order.
    """

    first_hit: Tensor
    average_precision: Tensor
    chance_r1: Tensor
    chance_precision: Tensor


def first_and_precision(similarity: Tensor, relevant: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `first_hit` and `average_precision` of `Ranking` for similarities [Q, G] float32.

    `relevant` is [Q, G] bool, and false where the similarity is -inf, which means left out.
    """
    order = torch.from_numpy(np.sort(_sort_keys(similarity).numpy(), axis=1)) & 0xFFFFFFFF
    rows, ranks = relevant.gather(1, order).nonzero(as_tuple=True)  # ranks ascend within a row
    counts = relevant.sum(1)
    before = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]  # number of better ranked relevant videos
    total = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, rows, (before + 1).double() / (ranks + 1))
    first_hit = torch.full_like(counts, NO_HIT)
    first_hit[rows[before == 0]] = ranks[before == 0]
    return first_hit, total / counts  # 0 / 0 is NaN


def _sort_keys(similarity: Tensor) -> Tensor:
    """Returns numbers whose ascending order is the ranking: [Q, G] int64, in the low 32 bits the gallery position.

    NumPy sorts them with SIMD instructions. With 879 x 9,537 similarities this function and the sort take .28 s of a
    Zen 1 core, a stable sort with indices .88 s.
    """
    bits = (similarity + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0
    ascending = bits ^ (bits >> 31 & 0x7FFFFFFF)  # the bits of negative floats are in reverse order
    return (~ascending).long().bitwise_left_shift_(32).bitwise_or_(torch.arange(similarity.shape[1]))


def _chance(relevant: Tensor, allowed: Tensor, gallery: int) -> tuple[Tensor, Tensor]:
    """Returns the expected R@1 and average precision of a random order, for these numbers of videos [Q] int64.

    With R relevant among N videos, the video at rank k is relevant with probability R / N and each other one then with
    (R - 1) / (N - 1). The expected average precision is therefore (H + (R - 1) (N - H) / (N - 1)) / N, where H is the
    sum of 1 / k for k = 1..N.
    """
    r, n = relevant.double(), allowed.double()
    harmonic = torch.cat([n.new_zeros(1), (1 / torch.arange(1, gallery + 1).double()).cumsum(0)])[allowed]
    precision = (harmonic + (r - 1) * (n - harmonic) / (n - 1).clamp(min=1)) / n
    return r / n, torch.where(relevant > 0, precision, torch.nan)


def rates(ranking: Ranking, counted: Tensor, sources: Tensor, gallery: int) -> dict[str, Any]:
    """Returns R@k and mAP of the counted queries [Q] bool, with their intervals over sources [Q], as fractions.

    Returns:
        `r@k`, None if k exceeds the gallery's size; `r@1_ci95` and `map_ci95`, see `source_interval`; `map`, the mean
        average precision of the queries with a relevant video, None if there is none; `map_left_out`, the number of
        counted queries without one; `chance_r@1` and `chance_map`; `gallery` and `queries`, numbers of videos.
    """
    ranks, sources = ranking.first_hit[counted], sources[counted]
    precision = ranking.average_precision[counted]
    some = not precision.isnan().all()
    recall = {f"r@{k}": (ranks < k).double().mean().item() if k <= gallery else None for k in RANKS}
    return recall | {
        "r@1_ci95": source_interval(ranks < 1, sources),
        "map": precision.nanmean().item() if some else None,
        "map_ci95": source_interval(precision, sources),
        "map_left_out": int(precision.isnan().sum()),
        "chance_r@1": ranking.chance_r1[counted].mean().item(),
        "chance_map": ranking.chance_precision[counted].nanmean().item() if some else None,
        "gallery": gallery,
        "queries": len(ranks),
    }
