"""The loss of a step's queries against the memory, whatever kind of memory it is.

Letters: B queries, K memory slots, E >= K entries compared, D feature width, P positives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cpr_fast.ops import mil_nce
from cpr_fast.pretrain.state.memory import EMPTY, Memory
from cpr_fast.pretrain.step.ids import IdMeaning
from cpr_fast.runtime import distributed

if TYPE_CHECKING:
    from cpr_fast.data.clips.loader import Batch


@dataclass(frozen=True)
class Ids:
    """Where clips come from: sibling group, position in the index, class, first source frame; [B] int64 each."""

    source: Tensor
    video: Tensor
    label: Tensor
    start: Tensor

    @classmethod
    def of(cls, batch: Batch, *clips: int) -> Ids:
        """Of the numbered clips of every video of this rank, video by video."""
        columns = (batch.source, batch.video, batch.label)
        repeated = [column.repeat_interleave(len(clips)) if len(clips) > 1 else column for column in columns]
        return cls(*repeated, batch.start[:, list(clips)].flatten())

    def __getitem__(self, rows: slice) -> Ids:
        return Ids(self.source[rows], self.video[rows], self.label[rows], self.start[rows])

    def of_all_ranks(self) -> Ids:
        """The ids of all ranks' clips, [R*B] each, in one exchange."""
        columns = torch.stack([self.source, self.video, self.label, self.start], dim=1)
        return Ids(*distributed.all_gather(columns).unbind(1))


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
    """MIL-NCE [paper, Eq. 2] of queries whose positives are q+, what was mined, and what equal ids make one.

    Args:
        query, own_key: [B, D]: f_q and f_q+.
        entries: [E, D]: the memory's features in one view, and E - K further negatives, one for every filled slot.
        mined: [B, P] int64 slots, -1 for padding, or None.
        ids: of the queries.
        holds_own: entries of the query's own video are the query or its q+ once more: they stand in neither sum.
    """
    if meaning.averaged:
        return _averaged_nce(query, own_key, entries, ids, memory, meaning, temperature, holds_own)
    further = len(entries) - memory.size
    if not holds_own:
        return mil_nce(
            query, own_key, entries, mined,
            query_ids=getattr(ids, meaning.ids), memory_ids=getattr(memory, meaning.ids),
            same_id=meaning.same_id, self_positive=meaning.self_positive, temperature=temperature,
        )  # fmt: skip
    positives, memory_ids = mined, memory.video
    if meaning.same_id == "positive":
        slots = torch.arange(memory.size, device=query.device)
        alike = _compared(ids, memory, holds_own) & _alike(ids, memory, meaning)  # [B, K]
        alike = torch.where(alike, slots, -1)
        positives = alike if mined is None else torch.cat([mined, alike], dim=1)
    if further:  # numbers past those of the videos: they match no query
        memory_ids = torch.cat([memory_ids, torch.where(memory_ids == EMPTY, EMPTY, memory_ids + further)])
    return mil_nce(
        query, own_key, entries, positives, query_ids=ids.video, memory_ids=memory_ids,
        same_id="ignore", self_positive=meaning.self_positive, temperature=temperature,
    )  # fmt: skip


def _compared(ids: Ids, memory: Memory, holds_own: bool) -> Tensor:
    """Which slots a query is compared with, [B, K] bool: those that hold something, without its own video's where
    `holds_own`."""
    filled = (memory.source != EMPTY).expand(len(ids.video), -1)
    return filled & (ids.video[:, None] != memory.video) if holds_own else filled


def _alike(ids: Ids, memory: Memory, meaning: IdMeaning) -> Tensor:
    """Which slots have the query's id, [B, K] bool."""
    return getattr(ids, meaning.ids)[:, None] == getattr(memory, meaning.ids)


def _averaged_nce(
    query: Tensor, own_key: Tensor, entries: Tensor, ids: Ids, memory: Memory, meaning: IdMeaning, temperature: float,
    holds_own: bool,
) -> Tensor:  # fmt: skip
    """UberNCE as published [CoCLR]: the log-softmax averaged over q+ and the entries of an equal id.

    Plain torch: no recipe but this upper bound takes the form.
    """
    present = _compared(ids, memory, holds_own)  # [B, K]
    positive = present & _alike(ids, memory, meaning)
    present = torch.cat([present, present.new_ones(len(query), len(entries) - memory.size)], dim=1)
    scores = (query @ entries.T).masked_fill(~present, -torch.inf)  # [B, E]
    logits = torch.cat([(query * own_key).sum(1, keepdim=True), scores], dim=1) / temperature
    log_softmax = logits - logits.logsumexp(1, keepdim=True)
    listed = torch.where(positive, log_softmax[:, 1 : 1 + memory.size], 0).sum(1)
    return -((log_softmax[:, 0] + listed) / (1 + positive.sum(1))).mean()
