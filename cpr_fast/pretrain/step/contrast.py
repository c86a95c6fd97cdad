"""The loss of a step, which compares the queries with the memory; for every kind of memory.

Letters: B queries, K memory slots, E >= K entries compared, D feature width, P positives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cpr_fast.config import Config, Cycle
from cpr_fast.ops import mil_nce, sharded_mil_nce
from cpr_fast.pretrain.state.memory import EMPTY, Memory
from cpr_fast.pretrain.state.schedule import to_device
from cpr_fast.pretrain.step.ids import IdMeaning
from cpr_fast.runtime import distributed

if TYPE_CHECKING:
    from cpr_fast.data.clips.stream import Batch


@dataclass(frozen=True)
class Ids:
    """The origin of clips: source id, position of the video in the index, class, digest of the plan of the video's
    clips (see `Batch`), first source frame; [B] int64 each."""

    source: Tensor
    video: Tensor
    label: Tensor
    plan: Tensor
    start: Tensor

    @classmethod
    def of(cls, batch: Batch, *clips: int) -> Ids:
        """Returns the ids of the clips with these numbers of every video of this rank, video by video.

        They are on the device of the clips; the loader leaves ids on the host.
        """
        columns = torch.stack([batch.source, batch.video, batch.label, batch.plan], dim=1)
        columns = torch.stack([*columns.repeat_interleave(len(clips), 0).T, batch.start[:, list(clips)].flatten()])
        return cls(*to_device(columns, next(iter(batch.clips.values())).device))

    def __getitem__(self, rows: slice) -> Ids:
        return Ids(*(column[rows] for column in self._columns()))

    def of_all_ranks(self) -> Ids:
        """Gathers the ids of the clips of all ranks, [R*B] each, in one collective."""
        return Ids(*distributed.all_gather(torch.stack(self._columns(), dim=1)).unbind(1))

    def _columns(self) -> list[Tensor]:
        return [self.source, self.video, self.label, self.plan, self.start]


def contrast(
    query: Tensor,
    own_key: Tensor,
    entries: Tensor,
    mined: Tensor | None,
    ids: Ids,
    memory: Memory,
    meaning: IdMeaning,
    *,
    temperature: float,
    holds_own: bool,
) -> Tensor:
    """Computes MIL-NCE [paper, Eq. 2]; the positives are q+, the mined entries, and those that `meaning` adds.

    Args:
        query, own_key: [B, D], f_q and f_q+.
        entries: [E, D], the features of the memory in one view, followed by E - K further negatives. If the memory is
            divided among the processes, [K_r, D], those of this process.
        mined: [B, P] int64 slots, -1 for padding, or None.
        ids: the ids of the queries.
        meaning: what equal ids mean.
        holds_own: whether the entries of the query's own video are the query itself or its q+. They are then in neither
            sum of the loss.
    Returns:
        The mean loss, 0-d.
    """
    if meaning.averaged:
        return _averaged_nce(query, own_key, entries, ids, memory, meaning, temperature, holds_own)
    if not holds_own:
        features = (query, own_key, entries, mined)
        settings = {"query_ids": getattr(ids, meaning.ids), "memory_ids": memory.ids(meaning.ids)[memory.held],
                    "same_id": meaning.same_id, "self_positive": meaning.self_positive,
                    "temperature": temperature}  # fmt: skip
        if memory.shard is not None:
            return sharded_mil_nce(*features, memory.shard, **settings)
        return mil_nce(*features, **settings)
    further = len(entries) - memory.size
    positives, memory_ids = mined, memory.video
    if meaning.same_id == "positive":
        slots = torch.arange(memory.size, device=query.device)
        alike = _compared(ids, memory, holds_own) & _alike(ids, memory, meaning)  # [B, K]
        alike = torch.where(alike, slots, -1)
        positives = alike if mined is None else torch.cat([mined, alike], dim=1)
    if further:  # ids above those of all videos, which match no query
        memory_ids = torch.cat([memory_ids, torch.where(memory_ids == EMPTY, EMPTY, memory_ids + further)])
    return mil_nce(
        query, own_key, entries, positives, query_ids=ids.video, memory_ids=memory_ids,
        same_id="ignore", self_positive=meaning.self_positive, temperature=temperature,
    )  # fmt: skip


def chance_loss(config: Config, cycle: Cycle, slots: int, mined: int) -> float | None:
    """Returns the loss of a full memory in which every entry is equally similar to the query: the value that a loss has
    to fall below. In nats.

    That is log((E + 1) / P) for q+ and E entries of which P - 1, the mined ones, are positives, as q+ is. It is not
    known where the number of positives differs from query to query (None): UberNCE in its MIL form. The siblings that
    the published code counts as positives are counted as negatives here.

    Args:
        slots: K.
        mined: number of entries that a cascade mines for a query.
    """
    compared = slots - {"queue": 0, "bank": 1, "batch": 2}[config.memory.kind]  # without those of the query's own video
    positives = 1
    if cycle.mining == "label" and config.loss.protocol != "coclr":
        return None
    if cycle.mining == "cascade":
        positives += mined
    if config.model.shared:  # two losses, of two banks: the clips' and, in each view, that of the intra-negatives
        intra = slots if config.loss.intra_negatives != "none" else 0
        return 2 * math.log((compared + intra + 1) / positives)
    return math.log((compared + 1) / positives)


def _compared(ids: Ids, memory: Memory, holds_own: bool) -> Tensor:
    """Returns which slots each query is compared with, [B, K] bool; if `holds_own`, without those of its own video."""
    compared = memory.compared.expand(len(ids.video), -1)
    return compared & (ids.video[:, None] != memory.video) if holds_own else compared


def _alike(ids: Ids, memory: Memory, meaning: IdMeaning) -> Tensor:
    """Returns which slots have the id of the query, [B, K] bool."""
    return getattr(ids, meaning.ids)[:, None] == memory.ids(meaning.ids)


def _averaged_nce(
    query: Tensor, own_key: Tensor, entries: Tensor, ids: Ids, memory: Memory, meaning: IdMeaning, temperature: float,
    holds_own: bool,
) -> Tensor:  # fmt: skip
    """Computes UberNCE as published [CoCLR]: the log-softmax, averaged over q+ and the entries with an equal id.

    It is written in plain torch, because only UberNCE, a supervised upper bound, uses it.
    """
    present = _compared(ids, memory, holds_own)  # [B, K]
    positive = present & _alike(ids, memory, meaning)
    present = torch.cat([present, present.new_ones(len(query), len(entries) - memory.size)], dim=1)
    scores = (query @ entries.T).masked_fill(~present, -torch.inf)  # [B, E]
    logits = torch.cat([(query * own_key).sum(1, keepdim=True), scores], dim=1) / temperature
    log_softmax = logits - logits.logsumexp(1, keepdim=True)
    listed = torch.where(positive, log_softmax[:, 1 : 1 + memory.size], 0).sum(1)
    return -((log_softmax[:, 0] + listed) / (1 + positive.sum(1))).mean()
