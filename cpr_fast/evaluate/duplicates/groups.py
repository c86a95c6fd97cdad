"""Groups of clips that belong together, from the graph of their nearest neighbours.

Two groups are joined if a pair of the graph connects them and the mean similarity between all of their clips is at
least the threshold: average linkage [Sokal and Michener, A statistical method for evaluating systematic relationships,
1958] along the edges of the graph, the most similar pair first. Joining whatever a pair connects (single linkage) would
build chains: A resembles B and B resembles C, until clips share a group that have nothing in common.

Letters: N clips, F feature width, k neighbours, E pairs, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from cpr_fast.data.index.index import numbered

# A similarity or a mean of some differs by at most so much from the exact one. Clips of equal features are therefore
# never separated, also where they have to be 1.0 similar.
ROUNDING = 1e-5


class Pairs(NamedTuple):
    """Pairs of clips, the most similar first, of equal ones those with the lower numbers: first [E] < second [E] int64
    and similarity [E] float32."""

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray

    def above(self, least: float) -> Pairs:
        """Returns the pairs with a similarity of at least `least`."""
        count = int(np.searchsorted(-self.similarity, -np.float32(least), side="right"))
        return Pairs(*(column[:count] for column in self))


def pairs_of(indices: Tensor, scores: Tensor, least: float) -> Pairs:
    """Returns the pairs of a graph [N, k] with a similarity of at least `least`, each once: one of the two clips is
    among the k nearest of the other. A similarity that differs from 1 only by rounding is 1."""
    row, column = np.nonzero(((indices >= 0) & (scores >= least)).numpy())
    other, similarity = indices.numpy()[row, column], scores.numpy()[row, column]
    similarity[similarity > 1 - ROUNDING] = 1
    low, high = np.minimum(row, other), np.maximum(row, other)
    _, kept = np.unique(low * len(indices) + high, return_index=True)
    low, high, similarity = low[kept], high[kept], similarity[kept]
    order = np.lexsort((high, low, -similarity))
    return Pairs(low[order], high[order], similarity[order])


class Groups:
    """N clips in groups, each on its own at first. `features` [N, F] have the dot product as their similarity."""

    def __init__(self, features: Tensor) -> None:
        self._features = features.numpy()
        self._parent = np.arange(len(features))
        self._size = np.ones(len(features), np.int64)
        self._sums: dict[int, np.ndarray] = {}  # float64, of the groups with several clips

    def join(self, pairs: Pairs, least: float) -> None:
        """Joins the groups of the pairs, which are at least `least` similar, in their order; see above."""
        for a, b in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
            first, second = self._root(a), self._root(b)
            if first == second:
                continue
            sums = self._sum(first), self._sum(second)
            count = int(self._size[first] * self._size[second])
            if count > 1 and float(sums[0] @ sums[1]) / count < least - ROUNDING:
                continue
            low, high = min(first, second), max(first, second)
            self._parent[high] = low
            self._size[low] += self._size[high]
            self._sums[low] = sums[0] + sums[1]
            self._sums.pop(high, None)

    def numbers(self) -> np.ndarray:
        """Returns the group of every clip, int64 [N], numbered from 0 in the order of their first clips."""
        roots = np.array([self._root(clip) for clip in range(len(self._parent))], np.int64)
        return np.unique(roots, return_inverse=True)[1]  # the root is the first clip

    def _root(self, clip: int) -> int:
        while (parent := self._parent[clip]) != clip:
            self._parent[clip] = clip = self._parent[parent]
        return int(clip)

    def _sum(self, root: int) -> np.ndarray:
        found = self._sums.get(root)
        return self._features[root].astype(np.float64) if found is None else found


def grouped(features: Tensor, pairs: Pairs, least: float) -> np.ndarray:
    """Returns the `Groups.numbers` of clips with `features` [N, F] whose groups are joined by the pairs that are at
    least `least` similar."""
    groups = Groups(features)
    groups.join(pairs.above(least), least)
    return groups.numbers()


def joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the groups that clips are in if they share a group in one of two divisions [N] int64, or are connected by
    such clips; numbered in the order of their first clips, int64 [N]."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    size = len(first)
    nodes = np.concatenate([np.arange(size), np.arange(size)])
    groups = np.concatenate([size + first, size + first.max() + 1 + second])
    count = int(groups.max()) + 1
    matrix = coo_matrix((np.ones(len(nodes), bool), (nodes, groups)), shape=(count, count))
    return numbered(connected_components(matrix, directed=False)[1][:size])


def agreement(found: np.ndarray, known: np.ndarray) -> dict[str, Any]:
    """Compares the pairs of clips that share a group with those that share a known source, both [N] int64.

    Returns:
        `pairs` (that share a group), `known_pairs`, `both`, and as fractions `precision` (of the pairs of groups, those
        of one source) and `recall` (of the pairs of sources, those of one group); None where there is no pair.
    """

    def pairs(groups: np.ndarray) -> int:
        sizes = np.unique(groups, return_counts=True)[1].astype(object)  # exact: millions of clips have 1e12 pairs
        return int((sizes * (sizes - 1) // 2).sum())

    both = pairs(found * (int(known.max()) + 1) + known)
    of_groups, of_sources = pairs(found), pairs(known)
    return {
        "pairs": of_groups, "known_pairs": of_sources, "both": both,
        "precision": both / of_groups if of_groups else None, "recall": both / of_sources if of_sources else None,
    }  # fmt: skip


def sizes(groups: np.ndarray) -> dict[str, int]:
    """Returns the number of `groups` with two clips or more, of the `clips` in them, and of the `largest` one."""
    counts = np.bincount(groups)
    several = counts[counts > 1]
    return {"groups": len(several), "clips": int(several.sum()), "largest": int(several.max(initial=1))}


def at_thresholds(
    features: Tensor, pairs: Pairs, thresholds: Sequence[float], known: np.ndarray | None
) -> list[dict[str, Any]]:
    """Returns a row for each threshold: `threshold`, the number of `pairs` of the graph at least so similar, `sizes` of
    the groups, and with `known` sources [N] the `precision` and `recall` of the groups."""
    rows = []
    for threshold in thresholds:
        numbers = grouped(features, pairs, threshold)
        row = {"threshold": threshold, "pairs": len(pairs.above(threshold).first), **sizes(numbers)}
        if known is not None:
            row |= {name: value for name, value in agreement(numbers, known).items() if name in ("precision", "recall")}
        rows.append(row)
    return rows
