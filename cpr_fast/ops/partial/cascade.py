"""`cascade_select` in steps, for a memory that is divided among processes.

Every process holds the keys of its entries: integers that order like the scores. The survivors of a stage are found by
the digits of their keys, from the highest to the lowest: `cascade_counts` counts the entries by one digit, and the sums
of the counts of all processes are those of the whole memory. So the exact key of rank `keep` follows from four rounds
of 256 counts per query, however many entries a stage keeps. `cascade_keep` then excludes the others.

Letters in shapes: B queries, V views, K memory entries, D feature width, U compared views.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from ..binding import checks
from ..cascade_select import cascade_select
from ..cascade_select import check as check_cascade

NO_KEY = -(2**31)  # the key of an entry that is excluded or did not survive a stage
DIGITS = 4  # of a key, in base 256


def cascade_keys(
    queries: Tensor,  # [V, B, D]
    memory: Tensor,  # [V, K, D]
    views: Sequence[int],
    *,
    query_ids: Tensor | None = None,  # [B]
    memory_ids: Tensor | None = None,  # [K]
) -> Tensor:
    """Returns the scores of all entries as keys, int32 that order like the scores of `cascade_select`, bit for bit.

    A key is the bits of a positive score, or those of a negative one with all bits but the sign inverted; -0 counts as
    +0.

    Args:
        queries, memory, query_ids, memory_ids: as for `cascade_select`.
        views: U different ints in 0..V-1.

    Returns:
        [U, B, K] int32; -2**31 in all views for an entry that no stage may select: an empty one, one with the id of the
        query, or one with a NaN score in one of `views`.

    Raises:
        TypeError, ValueError, NotImplementedError: as `cascade_select`.

    Example:
        >>> queries, memory = torch.randn(2, 8, 128), torch.randn(2, 4096, 128)
        >>> cascade_keys(queries, memory, [0, 1]).shape
        torch.Size([2, 8, 4096])
    """
    views = checks.integers("views", views)
    if not views:
        raise ValueError("views: expected at least one view, got none")
    check_cascade(queries, memory, views, [1] * len(views), query_ids, memory_ids, "fp32")
    if len(set(views)) < len(views):
        raise ValueError(f"views: expected different views, got {views}")
    arguments = (queries.detach(), memory.detach(), views)
    if queries.device.type == "cuda":
        return _keys_on_cuda(*arguments, query_ids, memory_ids)
    return ops.cascade_keys.default(*arguments, query_ids, memory_ids)


def cascade_keys_ref(
    queries: Tensor,  # [V, B, D]
    memory: Tensor,  # [V, K, D]
    views: Sequence[int],
    *,
    query_ids: Tensor | None = None,  # [B]
    memory_ids: Tensor | None = None,  # [K]
) -> Tensor:
    """Computes `cascade_keys` in plain PyTorch, from scores that are computed in float64 and rounded to float32."""
    scores = (queries.double() @ memory.double().transpose(1, 2))[list(views)].float()
    return _excluded(keys_of(scores), query_ids, memory_ids)


def _keys_on_cuda(
    queries: Tensor, memory: Tensor, views: Sequence[int], query_ids: Tensor | None, memory_ids: Tensor | None
) -> Tensor:
    """Computes the keys with `cascade_select`, which returns all entries with exact scores if it keeps all of them."""
    size = memory.shape[1]
    keys = []
    for view in views:
        indices, scores = cascade_select(queries[view][None], memory[view][None], [0], [size])  # [B, K], best first
        found = torch.full((*indices.shape[:1], size + 1), NO_KEY, dtype=torch.int32, device=queries.device)
        found.scatter_(1, indices.where(indices >= 0, size), keys_of(scores))  # NaN scores are padding at the end
        keys.append(found[:, :size])
    return _excluded(torch.stack(keys), query_ids, memory_ids)


def keys_of(scores: Tensor) -> Tensor:
    """Returns the keys of float32 scores of any shape."""
    bits = (scores + 0.0).view(torch.int32)  # -0 + 0 is +0
    return torch.where(scores.isnan(), NO_KEY, torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


def _excluded(keys: Tensor, query_ids: Tensor | None, memory_ids: Tensor | None) -> Tensor:
    """Returns keys [U, B, K] without the entries that no stage may select."""
    allowed = (keys != NO_KEY).all(0)  # [B, K]
    if memory_ids is not None:
        allowed &= memory_ids != -1
    if query_ids is not None:
        allowed &= (query_ids[:, None] != memory_ids) | (query_ids[:, None] == -1)
    return torch.where(allowed, keys, NO_KEY)


def scores_of(keys: Tensor) -> Tensor:
    """Returns the float32 scores of keys; -inf for an excluded entry."""
    bits = torch.where(keys < 0, keys ^ 0x7FFFFFFF, keys)
    return torch.where(keys == NO_KEY, -torch.inf, bits.view(torch.float32))


def cascade_counts(keys: Tensor, prefix: Tensor, digit: int) -> Tensor:
    """Counts the entries of each query by one digit of their keys.

    The digits are those of key + 2**31, four of them in base 256. The counts of processes that hold different entries
    add up to those of all entries.

    Args:
        keys: [B, K] int32, one view of `cascade_keys`.
        prefix: [B] int32, the higher digits that counted entries have, as one number; not used for digit 0.
        digit: 0 (the highest) to 3.

    Returns:
        [B, 256] int32. Excluded entries are not counted.

    Raises:
        TypeError, ValueError: the message names the argument.

    Example:
        >>> keys = cascade_keys(torch.randn(1, 8, 16), torch.randn(1, 100, 16), [0])
        >>> cascade_counts(keys[0], torch.zeros(8, dtype=torch.int32), 0).sum(1)
        tensor([100, 100, 100, 100, 100, 100, 100, 100])
    """
    _check_keys(keys, "[B, K]", 2)
    _check_column("prefix", prefix, keys.shape[:1], keys)
    if not 0 <= checks.integer("digit", digit) < DIGITS:
        raise ValueError(f"digit: expected 0..{DIGITS - 1}, got {digit}")
    if keys.device.type == "cpu":
        return ops.cascade_counts.default(keys, prefix, digit)
    return cascade_counts_ref(keys, prefix, digit)


def cascade_counts_ref(keys: Tensor, prefix: Tensor, digit: int) -> Tensor:
    """Computes `cascade_counts` in plain PyTorch."""
    ascending = keys.long() + 2**31  # [B, K]
    shift = 8 * (DIGITS - 1 - digit)
    counted = (keys != NO_KEY) & (ascending >> (shift + 8) == (prefix[:, None] if digit else 0))
    digits = torch.where(counted, ascending >> shift & 255, 256)  # an additional digit for what is not counted
    counts = torch.zeros(len(keys), 257, dtype=torch.int32, device=keys.device)
    return counts.scatter_add_(1, digits, torch.ones_like(keys))[:, :256].contiguous()


def cascade_keep(keys: Tensor, row: int, threshold: Tensor, ties: Tensor) -> None:
    """Excludes, in place, the entries that do not survive a stage.

    An entry survives if its key in view `row` is above `threshold`, or if it is one of the first `ties` of the entries
    whose key is `threshold`.

    Args:
        keys: [U, B, K] int32, contiguous: the result of `cascade_keys`. What does not survive becomes -2**31 in all
            views.
        row: position in the first dimension of `keys` of the view that the stage compares.
        threshold, ties: [B] int32.

    Raises:
        TypeError, ValueError: the message names the argument.

    Example:
        >>> keys = torch.tensor([[[3, 5, 3, 1, 3]]], dtype=torch.int32)
        >>> cascade_keep(keys, 0, torch.tensor([3], dtype=torch.int32), torch.tensor([2], dtype=torch.int32))
        >>> keys > -(2**31)
        tensor([[[ True,  True,  True, False, False]]])
    """
    _check_keys(keys, "[U, B, K]", 3)
    if not keys.is_contiguous():
        raise ValueError("keys: expected contiguous memory, because they are changed in place")
    if not 0 <= checks.integer("row", row) < len(keys):
        raise ValueError(f"row: expected 0..{len(keys) - 1}, got {row}")
    _check_column("threshold", threshold, keys.shape[1:2], keys)
    _check_column("ties", ties, keys.shape[1:2], keys)
    if keys.device.type == "cpu":
        ops.cascade_keep.default(keys, row, threshold, ties)
    else:
        cascade_keep_ref(keys, row, threshold, ties)


def cascade_keep_ref(keys: Tensor, row: int, threshold: Tensor, ties: Tensor) -> None:
    """Computes `cascade_keep` in plain PyTorch."""
    tied = keys[row] == threshold[:, None]  # [B, K]
    survives = (keys[row] > threshold[:, None]) | (tied & (tied.cumsum(1) <= ties[:, None]))
    keys.masked_fill_(~survives, NO_KEY)


def _check_keys(keys: Tensor, shape: str, dim: int) -> None:
    checks.check_tensor("keys", keys, (torch.int32,), shape, dim)
    if keys.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"keys: expected a tensor on the CPU or on CUDA, got one on {keys.device}")


def _check_column(name: str, value: Tensor, shape: Sequence[int], keys: Tensor) -> None:
    checks.check_tensor(name, value, (torch.int32,), "[B]", 1)
    if value.shape != torch.Size(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
    checks.check_same_device(name, value, keys, "keys")


@torch.library.register_fake(add_op_namespace_prefix("cascade_keys"))
def _fake_keys(queries, memory, views, query_ids, memory_ids):
    check_cascade(queries, memory, views, [1] * len(views), query_ids, memory_ids, "fp32")
    return queries.new_empty((len(views), queries.shape[1], memory.shape[1]), dtype=torch.int32)


@torch.library.register_fake(add_op_namespace_prefix("cascade_counts"))
def _fake_counts(keys, prefix, digit):
    return keys.new_empty((len(keys), 256))


@torch.library.register_fake(add_op_namespace_prefix("cascade_keep"))
def _fake_keep(keys, row, threshold, ties):
    return None
