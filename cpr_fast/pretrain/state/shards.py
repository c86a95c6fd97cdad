"""Mining and its rates in a queue whose features are divided among the processes (memory.shard).

All processes call the functions here together, each with its own queries, and receive what one process with the whole
queue would. Only view agreement may differ, where two scores are equal up to rounding: here they are those of
`cascade_select`, elsewhere those of a matrix product.

Letters: B queries, R processes, N = R*B queries of all processes, K slots, K_r of this process, P positives, D feature
width, n stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cpr_fast.mining.proxies import agreement, mutual, nearer
from cpr_fast.mining.quality import gather_slots, judge
from cpr_fast.mining.survivors import rates_of_counts
from cpr_fast.ops import cascade_keys, sharded_cascade_select
from cpr_fast.ops.partial.cascade import NO_KEY
from cpr_fast.runtime import distributed

if TYPE_CHECKING:
    from cpr_fast.pretrain.state.memory import Memory

_AT_ONCE = 2**26  # keys that are compared with those of the mined entries at once


def select(anchors: Tensor, memory: Memory, source: Tensor, views: Sequence[int], keep: Sequence[int]) -> Tensor:
    """Returns the slots [B, P] int64 that the cascade selects for the anchors [2, B, D] of this process."""
    queries, ids = _of_all(anchors), distributed.all_gather(source)
    slots, _ = sharded_cascade_select(
        queries, memory.features[:2], views, keep, memory.shard, query_ids=ids,
        memory_ids=memory.source[memory.held],
    )  # fmt: skip
    return _own(slots, len(source))


def survivor_rates(
    anchors: Tensor,
    memory: Memory,
    source: Tensor,
    views: Sequence[int],
    keep: Sequence[int],
    mined: Tensor,
    label: Tensor,
) -> dict[str, Tensor]:
    """Returns `cpr_fast.mining.survivors.survivor_rates` of the queries of this process, [B] each.

    Cost: one additional cascade.
    """
    labels, held = distributed.all_gather(label), memory.label[memory.held]
    counts = torch.zeros(len(views) - 1, 2, len(labels), dtype=torch.int64, device=label.device)

    def count(stage: int, rows: slice, survivors: Tensor) -> None:
        of_queries = labels[rows, None]
        known = survivors & (held >= 0) & (of_queries >= 0)  # [N, K_r]
        counts[stage, 0, rows] = (known & (held == of_queries)).sum(1)
        counts[stage, 1, rows] = known.sum(1)

    sharded_cascade_select(
        _of_all(anchors), memory.features[:2], views, keep, memory.shard,
        query_ids=distributed.all_gather(source), memory_ids=memory.source[memory.held], on_survivors=count,
    )  # fmt: skip
    stages = [(_own(found, len(label)), _own(known, len(label))) for found, known in distributed.sum_(counts)]
    true_positive, known = judge(gather_slots(memory.label, mined), label)
    return rates_of_counts(
        [*stages, (true_positive.sum(1), known.sum(1))], query_ids=source, memory_ids=memory.source,
        query_labels=label, memory_labels=memory.label,
    )  # fmt: skip


def view_agreement(queries: Tensor, memory: Memory, view: int, mined: Tensor, source: Tensor) -> Tensor:
    """Returns `cpr_fast.mining.proxies.view_agreement` of the queries [B, D] of this process in a view, [B]."""
    everyone, slots, ids = (distributed.all_gather(tensor) for tensor in (queries, mined, source))
    places, counts = memory.shard.within(slots), []
    at_once = max(1, _AT_ONCE // memory.shard.largest)  # the same on all processes
    for first in range(0, len(everyone), at_once):
        rows = slice(first, first + at_once)
        keys = cascade_keys(
            everyone[None, rows], memory.features[view, None], [0], query_ids=ids[rows],
            memory_ids=memory.source[memory.held],
        )[0]  # [N, K_r]  # fmt: skip
        of_mined = keys.gather(1, places[rows].clamp(min=0)).where(places[rows] >= 0, NO_KEY)
        counts.append(distributed.sum_(nearer(keys, distributed.largest_(of_mined))))
    found = _own(torch.cat(counts), len(source))
    return agreement(found, mined, query_ids=source, memory_ids=memory.source)


def mutual_neighbours(queries: Tensor, memory: Memory, view: int, mined: Tensor) -> Tensor:
    """Returns `cpr_fast.mining.proxies.mutual_neighbours` of the queries [B, D] of this process in a view, [B].

    Cost: a one-stage cascade of N * P queries.
    """
    slots = distributed.all_gather(mined).clamp(min=0).flatten()  # [N*P]
    entries = memory.entries(view, slots)
    _, nearest = sharded_cascade_select(
        entries[None], memory.features[view, None], [0], [mined.shape[1]], memory.shard, query_ids=memory.source[slots],
        memory_ids=memory.source[memory.held],
    )  # fmt: skip
    return mutual(queries, _own(entries, mined.numel()), _own(nearest[:, -1], mined.numel()), mined)


def _of_all(anchors: Tensor) -> Tensor:
    """Gathers the anchors [2, B, D] of all processes: [2, N, D]."""
    return distributed.all_gather(anchors.transpose(0, 1)).transpose(0, 1).contiguous()


def _own(rows: Tensor, count: int) -> Tensor:
    """Returns the `count` rows of this process among those of all processes."""
    return rows[distributed.rank() * count :][:count]
