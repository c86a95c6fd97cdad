"""Precision and recall of the survivors of every stage of a cascade, measured with labels.

Everything runs on the device of its inputs without synchronising with the host.

Letters: V views, B queries, K memory slots, D feature width, n stages, P positives mined per query.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cpr_fast.mining.quality import candidates, gather_slots, judge
from cpr_fast.ops import cascade_select


def survivor_rates(
    queries: Tensor,
    memory: Tensor,
    views: Sequence[int],
    keep: Sequence[int],
    mined: Tensor,
    *,
    query_ids: Tensor,
    memory_ids: Tensor,
    query_labels: Tensor,
    memory_labels: Tensor,
) -> dict[str, Tensor]:
    """Returns precision and recall of the survivors of stages 1..n, and the precision of random mining.

    For one query, let S(s) be the entries that survive stage s, and T the true positives among all entries that may be
    mined::

        precision(s) = |S(s) & T| / |S(s)|        recall(s) = |S(s) & T| / |T|

    Precision after the last stage is the PMR [paper, Eq. 3]. Where recall falls from one stage to the next, the
    stage discarded true positives; where precision does not rise, the stage had no effect.

    Args:
        queries, memory, views, keep, query_ids, memory_ids: The arguments of `cascade_select`: [V, B, D], [V, K, D], n,
            n, [B], [K].
        mined: [B, keep[-1]] int64 slots that this cascade selected, -1 for padding: its last survivors.
        query_labels, memory_labels: [B], [K] int64, -1 where unknown.
    Returns:
        {"pmr_chance": [B], "survivor_precision_s": [B], "survivor_recall_s": [B], for s = 1..n} float32; NaN where
        nothing is known. Entries of unknown label are not counted.
    Cost: one additional cascade of s stages for every s < n, because the survivors of stage s are computed as the
    result of the cascade that consists of the first s stages.
    """
    cut = (
        cascade_select(queries, memory, views[:s], keep[:s], query_ids=query_ids, memory_ids=memory_ids)[0]
        for s in range(1, len(views))
    )  # [B, keep[s - 1]] each
    stages = (
        judge(gather_slots(memory_labels, survivors), query_labels) for survivors in itertools.chain(cut, [mined])
    )
    counts = ((true_positive.sum(1), known.sum(1)) for true_positive, known in stages)
    labels = {"query_labels": query_labels, "memory_labels": memory_labels}
    return rates_of_counts(counts, query_ids=query_ids, memory_ids=memory_ids, **labels)


def rates_of_counts(
    counts: Iterable[tuple[Tensor, Tensor]],
    *,
    query_ids: Tensor,
    memory_ids: Tensor,
    query_labels: Tensor,
    memory_labels: Tensor,
) -> dict[str, Tensor]:
    """Returns what `survivor_rates` returns, from the number of true positives [B] and of entries of known label [B]
    among the survivors of each stage."""
    allowed = candidates(query_ids, memory_ids) & (memory_labels >= 0) & (query_labels >= 0)[:, None]  # [B, K]
    right = (allowed & (memory_labels == query_labels[:, None])).sum(1)  # |T|, [B]
    rates = {"pmr_chance": right / allowed.sum(1)}
    for s, (found, known) in enumerate(counts, 1):
        rates |= {f"survivor_precision_{s}": found / known, f"survivor_recall_{s}": found / right}
    return {name: rate.to(torch.float32) for name, rate in rates.items()}
