"""Ranking of gallery videos by the similarity of their features, and R@k of the ranks.

Letters: Q queries, G gallery videos, F feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cpr_fast.evaluate.features.intervals import source_interval
from cpr_fast.evaluate.features.recipe import Metric

RANKS = (1, 5, 10, 20, 50)
NO_HIT = torch.iinfo(torch.int64).max
QUERY_CHUNK = 512  # number of queries whose similarities are in memory at once


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


@dataclass(frozen=True)
class Comparison:
    """Compares Q queries with G gallery videos by the sum of similarities of one or more streams.

    Attributes:
        streams: Pairs of features ([Q, F], [G, F]) from `prepare`.
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

    def chance_r1(self, query_labels: Tensor, gallery_labels: Tensor) -> Tensor:
        """Returns the R@1 expected for a random order, [Q] float32: the share of the query's class among its
        candidates."""
        shares = []
        for chunk in torch.arange(len(query_labels)).split(QUERY_CHUNK):
            allowed = self.similarity(chunk) > -torch.inf
            right = allowed & (query_labels[chunk, None] == gallery_labels)
            shares.append(right.sum(1) / allowed.sum(1))
        return torch.cat(shares)

    def ranks(self, query_labels: Tensor, gallery_labels: Tensor) -> Tensor:
        """Returns `first_hit_rank` of every query, [Q] int64. Memory: QUERY_CHUNK x G similarities."""
        chunks = torch.arange(len(query_labels)).split(QUERY_CHUNK)
        same_class = (query_labels[chunk, None] == gallery_labels for chunk in chunks)
        return torch.cat([first_hit_rank(self.similarity(c), same) for c, same in zip(chunks, same_class, strict=True)])

    def nearest(self, query: int, k: int) -> list[int]:
        """Returns the positions of the k nearest gallery videos, nearest first; fewer if there are fewer candidates."""
        similarity = self.similarity(torch.tensor([query]))[0]
        order = similarity.sort(descending=True, stable=True).indices[:k]
        return order[similarity[order] > -torch.inf].tolist()


def first_hit_rank(similarity: Tensor, same_class: Tensor) -> Tensor:
    """Returns the rank (0 = nearest) of the nearest gallery video of the query's class: [Q] int64, NO_HIT if none.

    Args:
        similarity: [Q, G] float, -inf where a video is left out. Equal similarities rank by gallery position.
        same_class: [Q, G] bool.
    The videos that rank before the best hit are counted. This needs no sort and takes O(Q G) time.
    """
    right = same_class & (similarity > -torch.inf)
    best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)  # [Q, 1]
    position = torch.arange(similarity.shape[1], device=similarity.device)  # [G]
    hit = torch.where(right & (similarity == best), position, NO_HIT).amin(1, keepdim=True)  # [Q, 1]
    before = (similarity > best) | ((similarity == best) & (position < hit))
    return torch.where(right.any(1), before.sum(1), NO_HIT)


def recall(ranks: Tensor, sources: Tensor, gallery: int) -> dict[str, Any]:
    """Returns R@k of queries whose nearest hits have these ranks [Q]; None if k exceeds the gallery's size.

    `r@1_ci95` is the `source_interval` of R@1.
    """
    rates = {f"r@{k}": (ranks < k).double().mean().item() if k <= gallery else None for k in RANKS}
    return rates | {"r@1_ci95": source_interval(ranks < 1, sources), "gallery": gallery, "queries": len(ranks)}
