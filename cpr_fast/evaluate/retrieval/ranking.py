"""Ranking of gallery videos by feature similarity, and R@k of the ranks. Letters: Q queries, G gallery, F width."""

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
QUERY_CHUNK = 512  # queries whose similarities are held at once


def prepare(
    queries: Tensor, gallery: Tensor, metric: Metric, *, centre: Literal["each", "gallery"] = "each"
) -> tuple[Tensor, Tensor]:
    """Features [Q, F] and [G, F] made ready to compare.

    "cosine": each set centred by its own mean [CoCLR], or both by the gallery's where a few queries have no mean worth
    the name, then L2. "plain_cosine": L2 alone [iic]. "euclidean": both standardised by the gallery.
    """
    if metric == "plain_cosine":
        return F.normalize(queries, dim=1), F.normalize(gallery, dim=1)
    if metric == "cosine":
        own = queries.mean(0) if centre == "each" else gallery.mean(0)
        return F.normalize(queries - own, dim=1), F.normalize(gallery - gallery.mean(0), dim=1)
    mean, std = gallery.mean(0), gallery.std(0, correction=0)
    constant = std <= 1e-5 * gallery.abs().amax(0)  # its spread is rounding
    scale = torch.where(constant, 0.0, 1 / std)
    return (queries - mean) * scale, (gallery - mean) * scale


@dataclass(frozen=True)
class Comparison:
    """Q queries against G gallery entries by the summed similarity of one or more streams.

    Attributes:
        streams: pairs of features ([Q, F], [G, F]) from `prepare`.
        query_sources, gallery_sources: [Q], [G] int64; where given, entries of the query's own source are left out.
    """

    streams: Sequence[tuple[Tensor, Tensor]]
    metric: Metric
    query_sources: Tensor | None = None
    gallery_sources: Tensor | None = None

    def similarity(self, queries: Tensor) -> Tensor:
        """Similarity of the queries at these positions to the gallery, [len(queries), G]; -inf where left out."""
        total = sum(
            -torch.cdist(q[queries], g) if self.metric == "euclidean" else q[queries] @ g.T for q, g in self.streams
        )
        if self.query_sources is not None:
            own = self.query_sources[queries, None] == self.gallery_sources
            total = total.masked_fill(own, -torch.inf)
        return total

    def chance_r1(self, query_labels: Tensor, gallery_labels: Tensor) -> Tensor:
        """R@1 of a random order for every query, [Q] float32: the share of its class in what it may find."""
        shares = []
        for chunk in torch.arange(len(query_labels)).split(QUERY_CHUNK):
            allowed = self.similarity(chunk) > -torch.inf
            right = allowed & (query_labels[chunk, None] == gallery_labels)
            shares.append(right.sum(1) / allowed.sum(1))
        return torch.cat(shares)

    def ranks(self, query_labels: Tensor, gallery_labels: Tensor) -> Tensor:
        """`first_hit_rank` of every query, [Q] int64. At most QUERY_CHUNK x G similarities are held at once."""
        chunks = torch.arange(len(query_labels)).split(QUERY_CHUNK)
        same_class = (query_labels[chunk, None] == gallery_labels for chunk in chunks)
        return torch.cat([first_hit_rank(self.similarity(c), same) for c, same in zip(chunks, same_class, strict=True)])

    def nearest(self, query: int, k: int) -> list[int]:
        """Positions of the k nearest gallery entries, nearest first; fewer where fewer are left."""
        similarity = self.similarity(torch.tensor([query]))[0]
        order = similarity.sort(descending=True, stable=True).indices[:k]
        return order[similarity[order] > -torch.inf].tolist()


def first_hit_rank(similarity: Tensor, same_class: Tensor) -> Tensor:
    """Rank (0 = nearest) of the nearest gallery entry of the query's class, [Q] int64; NO_HIT where there is none.

    Args:
        similarity: [Q, G] float, -inf where an entry is left out. Equal similarities rank by gallery position.
        same_class: [Q, G] bool.
    Counting what comes before the best hit needs no sort: O(Q G).
    """
    right = same_class & (similarity > -torch.inf)
    best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)  # [Q, 1]
    position = torch.arange(similarity.shape[1], device=similarity.device)  # [G]
    hit = torch.where(right & (similarity == best), position, NO_HIT).amin(1, keepdim=True)  # [Q, 1]
    before = (similarity > best) | ((similarity == best) & (position < hit))
    return torch.where(right.any(1), before.sum(1), NO_HIT)


def recall(ranks: Tensor, sources: Tensor, gallery: int) -> dict[str, Any]:
    """R@k of queries whose nearest hits have these ranks [Q]; None where k exceeds the gallery's size.

    `r@1_ci95` is the `source_interval` of R@1.
    """
    rates = {f"r@{k}": (ranks < k).double().mean().item() if k <= gallery else None for k in RANKS}
    return rates | {"r@1_ci95": source_interval(ranks < 1, sources), "gallery": gallery, "queries": len(ranks)}
