"""Proxies of mining quality that need no labels: view agreement, mutual neighbours, age of the mined entries.

A further proxy, hubness, is in `quality`.

Everything runs on the device of its inputs without synchronising with the host.

Letters: B queries, K memory slots, D feature width, P positives mined per query.

The last stage of a cascade ranks its survivors in the *other* view. View agreement and mutual neighbours are therefore
computed in the *query* view. On the features of `bench/results/mining_lab.md`, they then order the cascades in the same
way as PMR; computed in the ranking view, they do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpr_fast.mining.quality import candidates
from cpr_fast.ops import cascade_select


def view_agreement(queries: Tensor, memory: Tensor, mined: Tensor, *, query_ids: Tensor, memory_ids: Tensor) -> Tensor:
    """Returns how near the mined entries are in a view that did not rank them: [B] float32 in 0..1, .5 for random
    mining.

    NaN where nothing was mined. For one query it is the mean over its mined entries x of::

        1 - |{candidates nearer to the query than x}| / |candidates|

    Args:
        queries: [B, D] float32 features of the queries in that view.
        memory: [K, D] float32.
        mined: [B, P] int64 slots, -1 for padding.
        query_ids, memory_ids: [B], [K] int64, as in `cascade_select`.
    Memory: three [B, K] matrices.
    """
    allowed = candidates(query_ids, memory_ids)
    scores = (queries @ memory.T).masked_fill(~allowed, -torch.inf)  # [B, K]
    of_mined = scores.gather(1, mined.clamp(min=0))  # [B, P]
    return agreement(nearer(scores, of_mined), mined, query_ids=query_ids, memory_ids=memory_ids)


def nearer(scores: Tensor, of_mined: Tensor) -> Tensor:
    """Returns how many of the scores [B, K] of a query are above those of its mined entries [B, P]: [B, P] int64."""
    return torch.stack([(scores > score[:, None]).sum(1) for score in of_mined.unbind(1)], dim=1)


def agreement(nearer: Tensor, mined: Tensor, *, query_ids: Tensor, memory_ids: Tensor) -> Tensor:
    """Returns the view agreement [B] of the mined slots [B, P], from the number of nearer candidates [B, P]."""
    candidate_count = candidates(query_ids, memory_ids).sum(1, keepdim=True)
    return _mean_over_mined(1 - nearer / candidate_count, mined)


def mutual_neighbours(
    queries: Tensor, memory: Tensor, mined: Tensor, *, query_ids: Tensor, memory_ids: Tensor
) -> Tensor:
    """Returns the share of the mined entries whose own P nearest entries include the query: [B] float32.

    NaN where nothing was mined. The nearest entries of an entry are searched in the memory without the entries of its
    own source, because an entry may not mine those. Whether the queries are in the memory or not, an entry counts if
    the query is at least as near as its P-th nearest entry, up to the rounding of a float32 dot product. The arguments
    are those of `view_agreement`.
    Cost: a one-stage `cascade_select` of B * P queries.
    """
    slots = mined.clamp(min=0).flatten()
    entries = memory[slots]  # [B*P, D]
    own_ids = memory_ids[slots]
    _, nearest = cascade_select(
        entries[None], memory[None], [0], [mined.shape[1]], query_ids=own_ids, memory_ids=memory_ids
    )  # scores [B*P, P], best first
    return mutual(queries, entries, nearest[:, -1], mined)


def mutual(queries: Tensor, entries: Tensor, furthest: Tensor, mined: Tensor) -> Tensor:
    """Returns the share of the mined slots [B, P] whose entries [B*P, D] are as near to the query [B, D] as to their
    P-th nearest entry, whose score is `furthest` [B*P]: [B] float32."""
    products = queries[:, None] * entries.unflatten(0, mined.shape)  # [B, P, D]; matmul may use TF32
    rounding = 2 * products.shape[2] * 2**-24 * queries.norm(dim=1)[:, None] * entries.norm(dim=1).view(mined.shape)
    return _mean_over_mined((products.sum(2) >= furthest.view(mined.shape) - rounding).float(), mined)


def mined_age(mined: Tensor, written_at: Tensor, step: int) -> Tensor:
    """Returns the mean age of the mined entries in steps: [B] float32, NaN where nothing was mined.

    Args:
        written_at: [K] int64, the step in which each slot was written.
        step: The current step.
    """
    return _mean_over_mined((step - written_at[mined.clamp(min=0)]).float(), mined)


def _mean_over_mined(values: Tensor, mined: Tensor) -> Tensor:
    """Returns the mean over the P mined entries, ignoring padding: [B, P] -> [B]."""
    there = mined >= 0
    return (values * there).sum(1) / there.sum(1)
