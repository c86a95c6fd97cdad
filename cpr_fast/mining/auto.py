"""Choosing the cascade automatically: `mining.stages = "auto"` finds order of views, n, r and top-k without labels.

Every entry of a memory is used as a query for all other entries. A cascade is judged by how near the entries that it
mines are to something that did not select them:

- `siblings`: to another entry of the query's source, which has the query's class but another noise;
- `mined_agree`: to the first mined entry of the same query, as neither was compared with the other.

The cascade of the highest mean of both is chosen. View agreement and mutual neighbours (`proxies`) do not serve for
this: a cascade that compares a view of pure noise more often finds entries that agree in this view by chance. Within
one cascade they do order the entries; so the number of entries that are kept as positives follows from

- `mutual`: how near the query is to the entry, among all that the entry could mine.

All three are the nearness ``-ln(rank / candidates)``, averaged over queries, mined entries and both views, minus 1, its
mean at chance. Measured in `bench/results/auto_cascade.md`.

Letters: K memory entries, D feature width, Q queries, P entries mined per query, n stages.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpr_fast.mining.quality import candidates
from cpr_fast.mining.stages import RATIOS, STAGES, idle_stages, stage_keep
from cpr_fast.ops import cascade_select
from cpr_fast.wording import counted

COUNTS = (1, 2, 3, 5, 10, 20, 50)  # top-k, up to the largest one that is allowed
JUDGED = 5  # number of mined entries by which a cascade is judged, whatever its top-k will be
LEAST_MUTUAL = 0.95  # of the mutual nearness of the first mined entry, the share that the positives have on average
QUERIES = 1024  # largest Q; the queries are spread evenly over the memory
PAIRS = 64  # least number of queries with a sibling; with fewer, `siblings` is not used
SCORES = 2**24  # largest number of scores that are in memory at once


@dataclass(frozen=True)
class Stages:
    """A cascade that can be chosen: views and survivors of its n stages."""

    views: tuple[int, ...]
    ratio: float
    keep: tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """A chosen cascade and what it was chosen by.

    Attributes:
        views, keep: n ints each, as `cascade_select` takes them; keep[-1] is the chosen top-k.
        ratio: r.
        criteria: of the chosen cascade: `siblings` and `mined_agree` (nats above chance, None where not measured),
            `score`, their mean; `queries`; `pairs`, the number of queries with a sibling; `mutual`, one value for each
            count of entries that could be kept as positives, as a share of that of the first entry.
        judged: every cascade that was compared, with its criteria, the best first.
    """

    views: tuple[int, ...]
    keep: tuple[int, ...]
    ratio: float
    criteria: dict[str, Any]
    judged: list[dict[str, Any]]

    @property
    def top_k(self) -> int:
        """The number of mined entries that are kept as positives."""
        return self.keep[-1]

    def reason(self, names: tuple[str, str]) -> str:
        """Returns the choice and why it was made in one sentence; `names` are those of the two views."""
        order = "-".join(names[view] for view in self.views)
        ratio = f", ratio {self.ratio:g}" if len(self.views) > 1 else ""
        chosen = f"{order}{ratio}, top-{self.top_k}"
        if self.criteria["score"] is None:
            return f"{chosen}: the entries of the memory allow no judgement"
        measured = {"siblings": "nearness to siblings", "mined_agree": "agreement of the mined"}
        found = " and ".join(
            f"{said} {self.criteria[name]:.2f}" for name, said in measured.items() if self.criteria[name] is not None
        )
        worst = min(row["score"] for row in self.judged if row["score"] is not None)
        kept = "only the first entry is kept as a positive"
        if self.top_k > 1:
            share = self.criteria["mutual"][self.top_k]
            kept = f"these entries keep {share:.0%} of the mutual nearness of the first one"
        return (
            f"{chosen}: the best of {counted(len(self.judged), 'cascade')} by {found} nats above chance (mean "
            f"{self.criteria['score']:.2f}, lowest {worst:.2f}); {kept}"
        )


def choose(features: Tensor, ids: Tensor, top_k: int) -> Choice:
    """Chooses a cascade for the entries of a memory by criteria that need no labels.

    A pure function of its arguments; it waits for the device. On equal scores the cascade that is listed first is
    chosen: view 1 last, fewer stages, a lower ratio.

    Args:
        features: [2, K, D] float32 features of the memory in two views.
        ids: [K] int64 source ids; -1 marks an empty slot.
        top_k: the largest number of entries that may be kept as positives, 1..K.
    Raises:
        ValueError: a shape is wrong, top_k is out of range, or every slot is empty.
    """
    if features.dim() != 3 or features.shape[0] != 2 or ids.shape != features.shape[1:2]:
        raise ValueError(f"features, ids: expected [2, K, D] and [K], got {list(features.shape)} and {list(ids.shape)}")
    size = len(ids)
    if not 1 <= top_k <= size:
        raise ValueError(f"top_k: expected 1..{size}, got {top_k}")
    if (ids == -1).all():
        raise ValueError(f"ids: expected at least one filled slot, got {size} empty ones")
    mined_count = min(size, max(JUDGED, top_k))
    queries = _Queries.of(features, ids)
    rows = []
    for stages in possible(size, mined_count):
        mined = queries.mine(stages)
        rows.append((stages, mined, queries.judge(mined[:, :JUDGED])))
    # `max` keeps the first of equal scores.
    stages, mined, criteria = max(rows, key=lambda row: -math.inf if row[2]["score"] is None else row[2]["score"])
    mutual = queries.mutual(mined, [*dict.fromkeys([*(count for count in COUNTS if count < top_k), top_k])])
    positives = max((count for count, share in mutual.items() if share >= LEAST_MUTUAL), default=1)
    judged = [{"views": list(s.views), "ratio": s.ratio, **_rounded(found)} for s, _, found in rows]
    judged.sort(key=lambda row: -math.inf if row["score"] is None else row["score"], reverse=True)
    keep = stage_keep(len(stages.views), size, stages.ratio, positives)
    counts = {"queries": len(queries.rows), "pairs": len(queries.paired)}
    return Choice(stages.views, keep, stages.ratio, criteria | counts | {"mutual": mutual}, judged)


def possible(size: int, mined: int) -> Iterator[Stages]:
    """Yields the cascades to choose from: those of which every stage selects something, and those of one stage.

    Args:
        size: K.
        mined: number of entries that the last stage keeps.
    """
    for last, n in itertools.product((1, 0), STAGES):
        views = tuple(last if (n - s) % 2 == 0 else 1 - last for s in range(1, n + 1))
        for ratio in RATIOS if n > 1 else (1.0,):
            keep = stage_keep(n, size, ratio, mined)
            if n == 1 or not idle_stages(keep, size):
                yield Stages(views, ratio, keep)


@dataclass(frozen=True)
class _Queries:
    """The entries of a memory that are used as queries, and one sibling of each.

    Attributes:
        features, ids: [2, K, D] and [K], the memory.
        rows: [Q], slots of the queries.
        paired: the positions among the queries of those that have a sibling; empty if there are too few.
        siblings: slots of their siblings.
    """

    features: Tensor
    ids: Tensor
    rows: Tensor
    paired: Tensor
    siblings: Tensor

    @classmethod
    def of(cls, features: Tensor, ids: Tensor) -> _Queries:
        filled = (ids != -1).nonzero().flatten()
        rows = filled[:: max(1, -(-len(filled) // QUERIES))]
        sibling = siblings_of(ids)[rows]
        paired = ((sibling >= 0) & (ids[rows] != -1)).nonzero().flatten()
        if len(paired) < PAIRS:
            paired = paired[:0]
        return cls(features.float(), ids, rows, paired, sibling[paired])

    def mine(self, stages: Stages) -> Tensor:
        """Returns the slots that a cascade mines for each query, best first: [Q, P] int64, -1 for padding."""
        ids = self.ids[self.rows]
        queries = self.features[:, self.rows]
        return cascade_select(queries, self.features, stages.views, stages.keep, query_ids=ids, memory_ids=self.ids)[0]

    def judge(self, mined: Tensor) -> dict[str, float | None]:
        """Returns `siblings`, `mined_agree` and `score`, their mean; None where nothing can be measured."""
        first, others = mined[:, :1].clamp(min=0).flatten(), mined[:, 1:]
        other_source = self.ids[others.clamp(min=0)] != self.ids[first][:, None]
        others = torch.where((mined[:, :1] >= 0) & other_source, others, -1)
        found = {
            "siblings": _mean(self._nearness(self.siblings, mined[self.paired])),
            "mined_agree": _mean(self._nearness(first, others)),
        }
        known = [value for value in found.values() if value is not None]
        return found | {"score": sum(known) / len(known) if known else None}

    def mutual(self, mined: Tensor, counts: list[int]) -> dict[int, float]:
        """Returns, for each count, the mean nearness of the queries to their first `count` mined entries, as a share of
        that to the first one; nothing if that is not above chance."""
        queries = torch.where(mined >= 0, self.rows[:, None], -1)  # [Q, P]
        near = self._nearness(mined.clamp(min=0).flatten(), queries.flatten()[:, None]).view(mined.shape)
        means = {count: _mean(near[:, :count]) for count in counts}
        first = _mean(near[:, :1])
        if first is None or first <= 0:
            return {1: 1.0}
        return {count: mean / first for count, mean in means.items()}

    def _nearness(self, anchors: Tensor, slots: Tensor) -> Tensor:
        """Returns ``-ln(rank / candidates) - 1`` of entries among the candidates of an anchor, mean of both views.

        Args:
            anchors: [B] slots of the entries that are compared with the whole memory but their own source.
            slots: [B, P] int64, -1 for padding, none of the anchor's source.
        Returns:
            [B, P] float64, NaN where padded.
        """
        if not slots.numel():
            return slots.double()
        parts, at_once = [], max(1, SCORES // len(self.ids))
        for part, wanted in zip(anchors.split(at_once), slots.split(at_once), strict=True):
            allowed = candidates(self.ids[part], self.ids)  # [b, K]
            total = torch.zeros(wanted.shape, dtype=torch.float64, device=wanted.device)
            for view in self.features:
                scores = (view[part] @ view.T).masked_fill(~allowed, -torch.inf)
                of_wanted = scores.gather(1, wanted.clamp(min=0))
                nearer = torch.stack([(scores > score[:, None]).sum(1) for score in of_wanted.unbind(1)], dim=1)
                total -= ((1 + nearer) / allowed.sum(1, keepdim=True)).double().log() / len(self.features)
            parts.append(torch.where(wanted >= 0, total - 1, torch.nan))
        return torch.cat(parts)


def siblings_of(ids: Tensor) -> Tensor:
    """Returns for every slot the next one of the same source, after the last of them the first: [K] int64, -1 for a
    slot that is alone."""
    order = torch.argsort(ids, stable=True)
    ordered, place = ids[order], torch.arange(len(ids), device=ids.device)
    first = torch.searchsorted(ordered, ordered)
    last = torch.searchsorted(ordered, ordered, right=True) - 1
    found = torch.empty_like(order)
    found[order] = torch.where(first == last, -1, order[torch.where(place == last, first, place + 1)])
    return found


def _mean(values: Tensor) -> float | None:
    """Returns the mean of the values that are not NaN, None if there is none."""
    mean = values.nanmean().item()
    return None if math.isnan(mean) else mean


def _rounded(criteria: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None else round(value, 4) for name, value in criteria.items()}
