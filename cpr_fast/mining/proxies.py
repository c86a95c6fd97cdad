"""Signs of good mining that need no labels: view agreement, mutual neighbours, age (and hubness: `mining_quality`).

Everything runs on the device of its inputs and never syncs with the host.
Letters: B queries, K memory slots, D feature width, P positives mined per query.
A cascade ranks its last survivors in the *other* view; both agreement rates ask the *query* view, which did not rank
them. On `bench/results/mining_lab.md`'s features they order the cascades as PMR does; in the ranking view they do not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpr_fast.mining.quality import candidates
from cpr_fast.ops import cascade_select


def view_agreement(queries: Tensor, memory: Tensor, mined: Tensor, *, query_ids: Tensor, memory_ids: Tensor) -> Tensor:
    """How near the mined entries are in a view that did not rank them, [B] float32; .5 by chance, NaN if none mined.

    Of one query, the mean over its mined entries x::

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
    nearer = torch.stack([(scores > score[:, None]).sum(1) for score in of_mined.unbind(1)], dim=1)  # [B, P]
    return _mean_over_mined(1 - nearer / allowed.sum(1, keepdim=True), mined)


def mutual_neighbours(
    queries: Tensor, memory: Tensor, mined: Tensor, *, query_ids: Tensor, memory_ids: Tensor
) -> Tensor:
    """Share of the mined entries that would have the query among their own P nearest, [B] float32; NaN if none mined.

    An entry's nearest are what it may mine itself: the memory without its own source. Whether the queries are in the
    memory or not, an entry counts when the query is at least as near as its P-th nearest, to the rounding of a float32
    dot product. Arguments as in `view_agreement`.
    Cost: a one-stage `cascade_select` of B * P queries.
    """
    slots = mined.clamp(min=0).flatten()
    entries = memory[slots]  # [B*P, D]
    own_ids = memory_ids[slots]
    _, nearest = cascade_select(
        entries[None], memory[None], [0], [mined.shape[1]], query_ids=own_ids, memory_ids=memory_ids
    )  # scores [B*P, P], best first
    products = queries[:, None] * entries.unflatten(0, mined.shape)  # [B, P, D]; no GEMM: those may be TensorFloat-32
    rounding = 2 * products.shape[2] * 2**-24 * queries.norm(dim=1)[:, None] * entries.norm(dim=1).view(mined.shape)
    return _mean_over_mined((products.sum(2) >= nearest[:, -1].view(mined.shape) - rounding).float(), mined)


def mined_age(mined: Tensor, written_at: Tensor, step: int) -> Tensor:
    """Mean age of the mined entries in steps, [B] float32; NaN where nothing was mined.

    Args:
        written_at: [K] int64, the step that wrote each slot.
        step: the one under way.
    """
    return _mean_over_mined((step - written_at[mined.clamp(min=0)]).float(), mined)


def _mean_over_mined(values: Tensor, mined: Tensor) -> Tensor:
    """[B, P] -> [B], padding left out."""
    there = mined >= 0
    return (values * there).sum(1) / there.sum(1)
