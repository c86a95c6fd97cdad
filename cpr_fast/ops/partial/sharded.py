"""`cascade_select` and `mil_nce` over a memory that is divided among the processes of a torch.distributed group.

Every process holds a range of slots and scores the queries of all processes against it; so the computation per process
is that of a whole memory on each, and the memory per process is 1/R of it. What is exchanged does not grow with the
memory: for each query 4 KiB of counts per stage of the cascade, the best entries of the last stage, and the sums of the
loss. All of it is merged in the order of the processes, which is the order of the slots.

Letters in shapes: R processes, B queries per process, V views, K entries of the whole memory, K_r of this process, D
feature width, P positives, S parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..binding import checks
from ..cascade_select import check as check_cascade
from ..mil_nce import REDUCTIONS, as_under_autocast, divided
from ..mil_nce import check as check_loss
from .cascade import DIGITS, NO_KEY, cascade_counts, cascade_keep, cascade_keys, scores_of
from .mil_nce import PART_MULTIPLE, mil_nce_merge, mil_nce_part_entries, mil_nce_partial

_MOST_ALIKE = 16  # with up to so many processes a memory has the parts of `mil_nce`
_LEAST_ENTRIES = 1024  # of a part of `mil_nce`; a memory has at most one process for each
_KEYS_AT_ONCE = 2**28  # keys of a process that are in memory at once, 1 GiB
_LEAST_QUERIES = 32  # that are compared at once


@dataclass(frozen=True)
class Shard:
    """The part of a memory that one of several processes holds: a range of slots, made of whole parts of `mil_nce`.

    Up to 16 processes hold the parts of `mil_nce`, so that results do not depend on their number; of 16 parts, each of
    9 to 15 processes holds one or two. More processes than 16 hold one part each, of sizes that differ by at most 64,
    and the last bits of a loss differ from those of 16 processes and fewer.

    Args:
        size: K, the number of entries of the whole memory, at least 1,024 for each process.
        rank: the number of the process, from 0.
        processes: R.

    Attributes:
        entries: number of entries in a part; the last part, and with more than 16 processes any part, may hold fewer.
        begin, end: the slots of this process, [begin, end).

    Raises:
        TypeError, ValueError: the message names the argument.

    Example:
        >>> shard = Shard(10_000, rank=1, processes=4)
        >>> shard.begin, shard.end
        (2048, 5120)
    """

    size: int
    rank: int
    processes: int

    def __post_init__(self) -> None:
        checks.count("size", self.size), checks.count("processes", self.processes)
        if not 0 <= checks.integer("rank", self.rank) < self.processes:
            raise ValueError(f"rank: expected 0..{self.processes - 1}, got {self.rank}")
        most = -(-self.size // _LEAST_ENTRIES)
        if self.processes > most:
            raise ValueError(
                f"processes: expected at most {most} for a memory of {self.size} entries, one for each 1,024 "
                f"entries, got {self.processes}"
            )

    @property
    def entries(self) -> int:
        if self.processes <= _MOST_ALIKE:
            return mil_nce_part_entries(self.size)
        return -(-self.size // (PART_MULTIPLE * self.processes)) * PART_MULTIPLE

    @property
    def parts(self) -> int:
        """S, the number of parts of the whole memory."""
        return -(-self.size // self.entries) if self.processes <= _MOST_ALIKE else self.processes

    def parts_of(self, rank: int) -> range:
        """Returns the parts that a process holds."""
        return range(rank * self.parts // self.processes, (rank + 1) * self.parts // self.processes)

    def slots_of(self, rank: int) -> range:
        """Returns the slots that a process holds."""
        parts = self.parts_of(rank)
        if self.processes <= _MOST_ALIKE:
            return range(parts.start * self.entries, min(parts.stop * self.entries, self.size))
        multiples = -(-self.size // PART_MULTIPLE)
        begin, end = (bound * multiples // self.processes * PART_MULTIPLE for bound in (rank, rank + 1))
        return range(begin, min(end, self.size))

    @property
    def largest(self) -> int:
        """The number of entries of the process that holds most, the same on every process."""
        return max(len(self.slots_of(rank)) for rank in range(self.processes))

    @property
    def begin(self) -> int:
        return self.slots_of(self.rank).start

    @property
    def end(self) -> int:
        return self.slots_of(self.rank).stop

    def within(self, slots: Tensor) -> Tensor:
        """Returns `slots` of the whole memory, of any shape, as positions in this part of it; -1 for other slots."""
        return torch.where((slots >= self.begin) & (slots < self.end), slots - self.begin, -1)


@torch.no_grad()
def sharded_cascade_select(
    queries: Tensor,  # [V, N, D]
    memory: Tensor,  # [V, K_r, D]
    views: Sequence[int],
    keep: Sequence[int],
    shard: Shard,
    *,
    query_ids: Tensor | None = None,  # [N]
    memory_ids: Tensor | None = None,  # [K_r]
    group: dist.ProcessGroup | None = None,
    on_survivors: Callable[[int, slice, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns what `cascade_select` returns for the whole memory, the same on every process and for every number of
    processes.

    All processes call it with the same queries, usually those of all of them.

    Args:
        queries: [V, N, D], the same on every process.
        memory: [V, K_r, D], the slots shard.begin..shard.end-1.
        views, keep, query_ids: as for `cascade_select`.
        memory_ids: [K_r] int64, as for `cascade_select`.
        on_survivors: called as on_survivors(stage, rows, survivors) after every stage but the last: `survivors`
            [n, K_r] bool are the entries of this process that survive stage `stage` (from 0) for the queries `rows`.

    Returns:
        indices [N, keep[-1]] int64, slots of the whole memory, and scores [N, keep[-1]] float32; -1 and -inf where
        fewer remain.

    Raises:
        TypeError, ValueError, NotImplementedError: as `cascade_select`.

    Example:
        >>> queries, memory = torch.randn(2, 8, 128), torch.randn(2, 4096, 128)
        >>> sharded_cascade_select(queries, memory, [1, 0, 1], [2048, 1024, 5], Shard(4096, 0, 1))[0].shape
        torch.Size([8, 5])
    """
    views, keep = checks.integers("views", views), checks.integers("keep", keep)
    check_cascade(queries, memory, views, keep, query_ids, memory_ids, "fp32")
    _check_shard(shard, memory.shape[1], group)
    compared = list(dict.fromkeys(views))
    at_once = _KEYS_AT_ONCE // (shard.largest * len(compared))  # the same on all processes, which exchange in step
    at_once = max(_LEAST_QUERIES, at_once // _LEAST_QUERIES * _LEAST_QUERIES)
    found = []
    for first in range(0, queries.shape[1], at_once):
        rows = slice(first, first + at_once)
        ids = None if query_ids is None else query_ids[rows]
        keys = cascade_keys(queries[:, rows], memory, compared, query_ids=ids, memory_ids=memory_ids)
        for stage, (view, count) in enumerate(zip(views[:-1], keep[:-1])):
            row = compared.index(view)
            cascade_keep(keys, row, *_threshold(keys[row], count, shard, group))
            if on_survivors is not None:
                on_survivors(stage, rows, keys[0] != NO_KEY)
        found.append(_best(keys, compared.index(views[-1]), keep[-1], shard, group))
    indices, scores = zip(*found)
    return torch.cat(indices), torch.cat(scores)


def sharded_mil_nce(
    query: Tensor,  # [B, D]
    own_key: Tensor,  # [B, D]
    memory: Tensor,  # [K_r, D]
    positives: Tensor | None,  # [B, P]
    shard: Shard,
    *,
    query_ids: Tensor | None = None,  # [B]
    memory_ids: Tensor | None = None,  # [K_r]
    same_id: str = "positive",
    self_positive: str | Tensor = "keep",
    temperature: float | Tensor = 0.07,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Returns `mil_nce` of the queries of this process over the whole memory. The memory receives no gradient.

    All processes call it together, with equally many queries. On the CPU, loss and gradients are those of `mil_nce`
    bit for bit, with up to 16 processes.

    Args:
        memory: [K_r, D], the slots shard.begin..shard.end-1.
        positives: [B, P] int64 slots of the whole memory, -1 for none; None for InfoNCE.
        memory_ids: [K_r] int64.
        query, own_key, query_ids, same_id, self_positive, temperature, reduction: as for `mil_nce`; those of this
            process.

    Returns:
        The loss of this process, [] for "mean", [B] for "none".

    Raises:
        TypeError, ValueError, IndexError, NotImplementedError: as `mil_nce`. On CUDA, where values are not read, a
        positive outside the memory is ignored.

    Example:
        >>> query, own_key, memory = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16), torch.randn(3000, 16)
        >>> sharded_mil_nce(query, own_key, memory, torch.randint(3000, (8, 5)), Shard(3000, 0, 1)).backward()
    """
    if isinstance(temperature, Tensor):
        (query, own_key, memory), temperature = divided(query, own_key, memory, temperature)
    # Everything is checked before the first exchange: a process that raised an error later would let the others wait.
    checks.check_choice("reduction", reduction, REDUCTIONS)
    modes = self_positive if isinstance(self_positive, Tensor) else None
    settings = (modes, same_id, "keep" if modes is not None else self_positive, temperature)
    check_loss(query, own_key, memory, None, query_ids, memory_ids, *settings)
    _check_shard(shard, len(memory), group)
    query, own_key, memory = as_under_autocast(query, own_key, memory)
    if positives is not None:
        _check_positives(positives, query, shard)
        positives = shard.within(_gathered(positives, shard, group))
    partials = mil_nce_partial(
        _gathered(query.detach(), shard, group), memory, positives, entries=shard.entries,
        query_ids=None if query_ids is None else _gathered(query_ids, shard, group), memory_ids=memory_ids,
        same_id=same_id, temperature=temperature,
    )  # fmt: skip  # [S_r, R*B, 2, 2 + D]
    return mil_nce_merge(
        _exchanged(partials, shard, group), query, own_key, self_positive=self_positive, temperature=temperature,
        reduction=reduction,
    )  # fmt: skip


def _check_shard(shard: Shard, entries: int, group: dist.ProcessGroup | None) -> None:
    if entries != shard.end - shard.begin:
        raise ValueError(f"memory: expected the {shard.end - shard.begin} entries of the shard, got {entries}")
    processes = dist.get_world_size(group) if dist.is_initialized() else 1
    if processes != shard.processes:
        raise ValueError(f"shard: expected one of the {processes} processes of the group, got one of {shard.processes}")


def _check_positives(positives: Tensor, query: Tensor, shard: Shard) -> None:
    columns = positives.shape[1:] if isinstance(positives, Tensor) and positives.dim() == 2 else ("P",)
    checks.check_int64("positives", positives, (len(query), *columns), query, "query")
    if checks.readable(positives) and ((positives < -1) | (positives >= shard.size)).any():
        raise IndexError(f"positives: expected memory slots 0..{shard.size - 1} or -1")


def _gathered(tensor: Tensor, shard: Shard, group: dist.ProcessGroup | None) -> Tensor:
    """Returns the tensors [B, ...] of all processes, [R*B, ...]."""
    if shard.processes == 1:
        return tensor
    tensor = tensor.contiguous()
    everyone = [torch.empty_like(tensor) for _ in range(shard.processes)]
    dist.all_gather(everyone, tensor, group=group)
    return torch.cat(everyone)


def _exchanged(partials: Tensor, shard: Shard, group: dist.ProcessGroup | None) -> Tensor:
    """Sends the sums [S_r, R*B, 2, 2 + D] of every process's queries to it; returns those of all parts for the queries
    of this process, [S, B, 2, 2 + D]."""
    if shard.processes == 1:
        return partials
    sent = torch.cat(partials.chunk(shard.processes, dim=1)).contiguous()  # [R*S_r, B, 2, 2 + D]
    parts = [len(shard.parts_of(rank)) for rank in range(shard.processes)]
    received = sent.new_empty(shard.parts, *sent.shape[1:])
    dist.all_to_all_single(received, sent, parts, [len(partials)] * shard.processes, group=group)
    return received


def _threshold(keys: Tensor, keep: int, shard: Shard | None, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Returns the key [B] of rank `keep` among the keys [B, K_r] of all processes, and how many of the entries of this
    process that have it survive [B], int32 each; with shard None, among those of this process alone.

    If fewer than `keep` entries are left, all of them survive.
    """
    prefix, left = torch.zeros(len(keys), dtype=torch.int64, device=keys.device), None
    for digit in range(DIGITS):
        own = cascade_counts(keys, prefix.int(), digit)  # [B, 256]
        counts = own
        if shard is not None and shard.processes > 1:
            counts = own.clone()
            dist.all_reduce(counts, group=group)
        if left is None:
            left = counts.sum(1).clamp(max=keep)  # entries below the present prefix that survive
        at_least = counts.flip(1).cumsum(1).flip(1)  # entries with this digit or a greater one
        chosen = (at_least >= left[:, None]).sum(1, keepdim=True) - 1  # [B, 1]
        left = left - torch.nn.functional.pad(at_least, (0, 1)).gather(1, chosen + 1)[:, 0]
        prefix = prefix * 256 + chosen[:, 0]
    if shard is not None and shard.processes > 1:
        tied = _gathered(own.gather(1, chosen).T, shard, group)  # [R, B]; processes hold the slots in order
        left = (left - tied[: shard.rank].sum(0)).clamp(min=0)
    return (prefix - 2**31).int(), left.int()


def _best(keys: Tensor, row: int, count: int, shard: Shard, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Returns slots and scores [B, count] of the best entries of all processes in view `row` of keys [U, B, K_r]."""
    cascade_keep(keys, row, *_threshold(keys[row], count, None, None))  # at most `count` remain, so that topk is exact
    best, places = keys[row].topk(min(count, keys.shape[2]), dim=1)  # in any order where keys are equal
    found = torch.stack([best, places.int() + shard.begin], dim=2)  # [B, <= count, 2]
    padding = torch.tensor([NO_KEY, 2**31 - 1], dtype=torch.int32, device=keys.device)
    found = torch.cat([found, padding.expand(len(best), count - found.shape[1], 2)], dim=1)
    everyone = torch.cat(_gathered(found, shard, group).chunk(shard.processes), dim=1)  # [B, R*count, 2]
    everyone = everyone.gather(1, everyone[..., 1:].argsort(1).expand_as(everyone))
    order = everyone[..., :1].argsort(dim=1, descending=True, stable=True)[:, :count]
    best, slots = everyone.gather(1, order.expand(-1, -1, 2)).unbind(2)
    return torch.where(best == NO_KEY, -1, slots.long()), scores_of(best)
