"""The cascade of a training cycle: selects positives from the memory, and measures how good they are.

Letters: V views, B queries, K memory entries, P positives, D feature width, n stages.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from cpr_fast.config import Config
from cpr_fast.mining.proxies import mined_age, mutual_neighbours, view_agreement
from cpr_fast.mining.stages import stage_keep, stage_views
from cpr_fast.mining.survivors import survivor_rates
from cpr_fast.ops import cascade_select
from cpr_fast.pretrain.state import shards
from cpr_fast.pretrain.state.memory import Memory


@dataclass(frozen=True)
class Cascade:
    """The cascade stages of a cycle whose memory has K entries.

    Attributes:
        views, keep: n ints each, the view compared and the number of survivors of each stage, as `cascade_select`
            takes them; keep[-1] is top-k.
    """

    views: tuple[int, ...]
    keep: tuple[int, ...]

    @classmethod
    def of(cls, config: Config, memory_size: int, top_k: int, own: int = 0) -> Cascade:
        """Returns the cascade of a config for queries of view `own`, 0 or 1."""
        mining = config.mining
        views = stage_views(mining.stages, config.loss.protocol)
        keep = stage_keep(mining.stages, memory_size, mining.ratio, top_k)
        return cls(tuple(view ^ own for view in views), keep)


def mine(anchors: Tensor, memory: Memory, source: Tensor, cascade: Cascade) -> Tensor:
    """Selects the positives of each query with the cascade, best first.

    Args:
        anchors: [2, B, D] float32, the features of the queries' positives in the first two views of the memory.
        source: [B] int64, source ids of the queries; entries of the same source are never mined.
    Returns:
        slots [B, top_k] int64; -1 where fewer entries remain.
    """
    if memory.shard is not None:
        return shards.select(anchors, memory, source, cascade.views, cascade.keep)
    slots, _ = cascade_select(
        anchors, memory.features[:2], cascade.views, cascade.keep, query_ids=source, memory_ids=memory.source
    )
    return slots


def mining_rates(
    anchors: Tensor,
    memory: Memory,
    source: Tensor,
    cascade: Cascade,
    mined: Tensor,
    label: Tensor,
    step: int,
    most: int | None = None,
) -> dict[str, Tensor]:
    """Measures rates of mined positives other than PMR. Does not wait for the device.

    Args:
        anchors, memory, source, cascade: the arguments of `mine`, which returned `mined` [B, P].
        label: [B] int64, classes of the queries, -1 where unknown.
        step: the current step.
        most: number of queries to measure, the first ones of a batch in random order; None measures all.
    Returns:
        {name: [B] float32} for each of `rate_names` of the cascade's number of stages; NaN where a query was not
        measured.
    """
    if most is not None and (others := len(source) - most) > 0:
        anchors, source, mined, label = anchors[:, :most].contiguous(), source[:most], mined[:most], label[:most]
        rates = mining_rates(anchors, memory, source, cascade, mined, label, step)
        return {name: F.pad(rate, (0, others), value=float("nan")) for name, rate in rates.items()}
    view = 1 - cascade.views[-1]  # the one that did not rank the mined entries
    if memory.shard is not None:
        return shards.survivor_rates(anchors, memory, source, cascade.views, cascade.keep, mined, label) | {
            "view_agreement": shards.view_agreement(anchors[view], memory, view, mined, source),
            "mutual_neighbours": shards.mutual_neighbours(anchors[view], memory, view, mined),
            "mined_age_steps": mined_age(mined, memory.enqueued_at, step),
        }
    ids = {"query_ids": source, "memory_ids": memory.source}
    unranked = (anchors[view], memory.features[view], mined)
    rates = survivor_rates(
        anchors, memory.features[:2], cascade.views, cascade.keep, mined, **ids,
        query_labels=label, memory_labels=memory.label,
    )  # fmt: skip
    return rates | {
        "view_agreement": view_agreement(*unranked, **ids),
        "mutual_neighbours": mutual_neighbours(*unranked, **ids),
        "mined_age_steps": mined_age(mined, memory.enqueued_at, step),
    }


def rate_names(stages: int) -> list[str]:
    """Returns the names of the rates of `mining_rates` for a cascade of n stages."""
    survivors = [f"survivor_{rate}_{s}" for s in range(1, stages + 1) for rate in ("precision", "recall")]
    return ["pmr_chance", *survivors, "view_agreement", "mutual_neighbours", "mined_age_steps"]
