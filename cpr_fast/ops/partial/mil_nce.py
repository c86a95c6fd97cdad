"""`mil_nce` in two calls, for a memory that is divided among processes: the sums over parts of the memory, and their
merge.

The sums of a part are those of a running softmax: the greatest score, the sum of exp(score - greatest), and the sum of
the keys weighted by these exponentials, over all keys and over the positives. `mil_nce` on the CPU divides a memory
into at most 16 parts, which depend only on K, and merges them in order; `mil_nce_part_entries` returns their size. If
every process holds whole parts of this size, the merge of all parts is `mil_nce` bit for bit.

Letters in shapes: B queries, K memory entries, D feature width, P positives, S parts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from ..binding import checks, library
from ..mil_nce import REDUCTIONS, SELF_POSITIVE, MilNce, as_under_autocast
from ..mil_nce import check as check_loss

PART_MULTIPLE = 64  # a part holds a multiple of so many entries, but for the last one
_LOWEST = torch.finfo(torch.float32).min  # the greatest score of a part without entries; finite: x - x must be 0
_AT_ONCE = 2**16  # entries whose scores the reference computes at once


def mil_nce_part_entries(size: int) -> int:
    """Returns the number of entries in each of the parts into which `mil_nce` on the CPU divides a memory of `size`
    entries (the last one may hold fewer): at most 16 parts of at least 1,024 entries, rounded up to 64.

    Example:
        >>> mil_nce_part_entries(2**20)
        65536
    """
    return library.part_entries(checks.count("size", size))


def mil_nce_partial(
    query: Tensor,  # [B, D]
    memory: Tensor,  # [K, D]
    positives: Tensor | None = None,  # [B, P]
    *,
    entries: int,
    query_ids: Tensor | None = None,  # [B]
    memory_ids: Tensor | None = None,  # [K]
    same_id: str = "positive",
    temperature: float = 0.07,
) -> Tensor:
    """Returns the sums of `mil_nce` over parts of a memory, without a gradient: `mil_nce_merge` has it.

    Args:
        query, memory, positives, query_ids, memory_ids, same_id: as for `mil_nce`. The memory is the part that this
            process holds, and `positives` are slots in it.
        entries: number of entries in a part, a multiple of 64; `mil_nce_part_entries` of the whole memory.
        temperature: a positive number. For one that is learned, divide the queries by it and pass 1.

    Returns:
        [S, B, 2, 2 + D] float32 (float64 for float64 features), S = ceil(K / entries): over all keys (0) and over the
        positives (1), the greatest score, the sum of exp(score - greatest), and the sum of exp(score - greatest) times
        the key. A part without entries has the greatest score -3.4e38 and sums 0.

    Raises:
        TypeError, ValueError, IndexError, NotImplementedError: as `mil_nce`.

    Example:
        >>> query, memory = torch.randn(8, 16), torch.randn(3000, 16)
        >>> mil_nce_partial(query, memory, entries=1024).shape
        torch.Size([3, 8, 2, 18])
    """
    temperature, entries = checks.positive("temperature", temperature), checks.count("entries", entries)
    check_loss(query, query, memory, positives, query_ids, memory_ids, None, same_id, "keep", temperature)
    if entries % PART_MULTIPLE:
        raise ValueError(f"entries: expected a multiple of {PART_MULTIPLE}, got {entries}")
    features = as_under_autocast(query.detach(), memory.detach())
    if query.device.type == "cuda":
        return mil_nce_partial_ref(
            *features, positives, entries=entries, query_ids=query_ids, memory_ids=memory_ids, same_id=same_id,
            temperature=temperature,
        )  # fmt: skip
    return ops.mil_nce_partial.default(*features, positives, query_ids, memory_ids, same_id, temperature, entries)


@torch.no_grad()
def mil_nce_partial_ref(
    query: Tensor,  # [B, D]
    memory: Tensor,  # [K, D]
    positives: Tensor | None = None,  # [B, P]
    *,
    entries: int,
    query_ids: Tensor | None = None,  # [B]
    memory_ids: Tensor | None = None,  # [K]
    same_id: str = "positive",
    temperature: float = 0.07,
) -> Tensor:
    """Computes `mil_nce_partial` in plain PyTorch, in float64; [B, 65536] matrices in memory.

    Arguments and result as for `mil_nce_partial`.
    """
    (B, D), K = query.shape, len(memory)
    parts = torch.zeros(-(-K // entries), B, 2, 2 + D, dtype=torch.float64, device=query.device)
    parts[..., 0] = _LOWEST
    for first in (f for start in range(0, K, entries) for f in range(start, min(start + entries, K), _AT_ONCE)):
        last = min(first + _AT_ONCE, (first // entries + 1) * entries, K)
        ids = None if memory_ids is None else memory_ids[first:last]
        listed = torch.zeros(B, last - first + 1, dtype=torch.bool, device=query.device)
        if positives is not None:
            inside = (positives >= first) & (positives < last)
            listed.scatter_(1, torch.where(inside, positives - first, last - first), True)
        listed = listed[:, :-1]
        filled = torch.ones_like(listed) if ids is None else (ids != -1).expand_as(listed)
        same = torch.zeros_like(listed)
        if query_ids is not None:
            same = (query_ids[:, None] == ids) & (query_ids[:, None] != -1)
        present = filled & (listed | ~same) if same_id == "ignore" else filled
        positive = filled & (listed | same) if same_id == "positive" else filled & listed
        keys = torch.where(filled[0][:, None], memory[first:last].double(), 0)
        scores = query.double() @ keys.T / temperature
        for group, members in enumerate((present, positive)):
            _add_chunk(parts[first // entries, :, group], scores, members, keys)
    return parts.to(torch.float64 if query.dtype == torch.float64 else torch.float32)


def _add_chunk(sums: Tensor, scores: Tensor, members: Tensor, keys: Tensor) -> None:
    """Adds the `members` [B, C] of a chunk of entries, with `scores` [B, C] and `keys` [C, D], to sums [B, 2 + D]."""
    greatest = torch.maximum(sums[:, 0], scores.where(members, _LOWEST).amax(1))  # [B]
    weights = (scores - greatest[:, None]).exp().where(members, 0)
    sums[:, 1:] *= (sums[:, :1] - greatest[:, None]).exp()
    sums[:, 0] = greatest
    sums[:, 1] += weights.sum(1)
    sums[:, 2:] += weights @ keys


def mil_nce_merge(
    partials: Tensor,  # [S, B, 2, 2 + D]
    query: Tensor,  # [B, D]
    own_key: Tensor,  # [B, D]
    *,
    self_positive: str | Tensor = "keep",
    temperature: float = 0.07,
    reduction: str = "mean",
) -> Tensor:
    """Returns the MIL-NCE loss from the sums over all parts of a memory, merged in the order of the parts.

    Args:
        partials: [S, B, 2, 2 + D], the results of `mil_nce_partial` for these queries, in the order of the memory.
        query, own_key, self_positive, reduction: as for `mil_nce`. Both features can receive a gradient.
        temperature: that of `mil_nce_partial`.

    Returns:
        The loss, [] float32 for "mean", [B] for "none".

    Raises:
        TypeError, ValueError: the message names the argument.

    Example:
        >>> query, own_key, memory = torch.randn(8, 16, requires_grad=True), torch.randn(8, 16), torch.randn(3000, 16)
        >>> partials = [mil_nce_partial(query, part, entries=1024) for part in memory.split(1024)]
        >>> mil_nce_merge(torch.cat(partials), query, own_key).backward()
    """
    checks.check_choice("reduction", reduction, REDUCTIONS)
    temperature = checks.positive("temperature", temperature)
    modes = self_positive if isinstance(self_positive, Tensor) else None
    chosen = "keep" if modes is not None else self_positive
    # Neither ids nor the memory are read; the queries stand in for the memory.
    check_loss(query, own_key, query, None, None, None, modes, "positive", chosen, temperature)
    query, own_key = as_under_autocast(query, own_key)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    checks.check_tensor("partials", partials, (dtype,), "[S, B, 2, 2 + D]", 4)
    checks.check_same_device("partials", partials, query, "query")
    expected = (len(query), 2, 2 + query.shape[1])
    if tuple(partials.shape[1:]) != expected:
        raise ValueError(f"partials: expected shape [S, {', '.join(map(str, expected))}], got {list(partials.shape)}")
    with torch.no_grad():
        merge = _merge if query.device.type == "cuda" else ops.mil_nce_merge.default
        outputs = merge(partials, query.detach(), own_key.detach(), modes, chosen, temperature)
    settings = (modes, "positive", chosen, temperature)
    return MilNce.apply(query, own_key, query.detach(), None, None, None, *settings, reduction, outputs)


def mil_nce_merge_ref(
    partials: Tensor,  # [S, B, 2, 2 + D]
    query: Tensor,  # [B, D]
    own_key: Tensor,  # [B, D]
    *,
    self_positive: str | Tensor = "keep",
    temperature: float = 0.07,
    reduction: str = "mean",
) -> Tensor:
    """Computes `mil_nce_merge` in plain PyTorch, without a gradient.

    Arguments and result as for `mil_nce_merge`.
    """
    modes = self_positive if isinstance(self_positive, Tensor) else None
    loss, *_ = _merge(partials, query, own_key, modes, "keep" if modes is not None else self_positive, temperature)
    return loss.mean() if reduction == "mean" else loss


def _merge(partials, query, own_key, self_mode, self_positive, temperature) -> tuple[Tensor, ...]:
    """Returns the outputs of the operator `mil_nce_merge`, computed in float64."""
    dtype, sums, query, own_key = partials.dtype, partials.double(), query.double(), own_key.double()
    own_score = (query * own_key).sum(1) / temperature  # [B]
    mode = SELF_POSITIVE.index(self_positive) if self_mode is None else self_mode
    mode = mode * (sums[:, :, 1, 1] > 0).any(0)  # [B]: rows without another positive keep own_key
    merged = [
        _logsumexp(sums[:, :, 0], own_score, own_key, mode != 2),
        _logsumexp(sums[:, :, 1], own_score, own_key, mode == 0),
    ]
    (lse_all, mean_all, in_all), (lse_positive, mean_positive, in_positive) = merged
    outputs = (
        lse_all - lse_positive,
        (mean_all - mean_positive) / temperature,
        (in_all - in_positive) / temperature,
        lse_all,
        lse_positive,
    )
    return tuple(output.to(dtype) for output in outputs)


def _logsumexp(sums: Tensor, own_score: Tensor, own_key: Tensor, with_own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merges the sums [S, B, 2 + D] of all parts, and own_key where `with_own` [B].

    Returns the logsumexp [B], the mean of the keys under the softmax [B, D], and the weight of own_key in it [B].
    """
    greatest = torch.maximum(sums[:, :, 0].amax(0), torch.where(with_own, own_score, -math.inf))
    own = torch.where(with_own, (own_score - greatest).exp(), 0)
    weights = (sums[:, :, 0] - greatest).exp()  # [S, B]
    total = (weights * sums[:, :, 1]).sum(0) + own
    mean = ((weights[..., None] * sums[:, :, 2:]).sum(0) + own[:, None] * own_key) / total[:, None]
    return greatest + total.log(), mean, own / total


@torch.library.register_fake(add_op_namespace_prefix("mil_nce_partial"))
def _fake_partial(query, memory, positives, query_ids, memory_ids, same_id, temperature, entries):
    check_loss(query, query, memory, positives, query_ids, memory_ids, None, same_id, "keep", temperature)
    (B, D), S = query.shape, -(-memory.shape[0] // entries)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((S, B, 2, 2 + D), dtype=dtype)


@torch.library.register_fake(add_op_namespace_prefix("mil_nce_merge"))
def _fake_merge(partials, query, own_key, self_mode, self_positive, temperature):
    row = [query.new_empty(query.shape[0], dtype=partials.dtype) for _ in range(4)]
    return row[0], query.new_empty(query.shape, dtype=partials.dtype), *row[1:]
