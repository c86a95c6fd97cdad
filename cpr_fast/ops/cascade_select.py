"""Multi-stage, multi-view similarity selection: the positive mining of CPR [arXiv 2201.07989, Algorithm 1].

Letters in shapes: B queries, V views, K memory entries, D feature width, n stages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .binding import checks, library

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PRECISIONS = ("fp32", "bf16")
_MOST_KEPT = 2**40  # results of 12 bytes for each query: more than any machine holds


def cascade_select(
    queries: Tensor,  # [V, B, D]
    memory: Tensor,  # [V, K, D]
    views: Sequence[int],
    keep: Sequence[int],
    *,
    query_ids: Tensor | None = None,  # [B]
    memory_ids: Tensor | None = None,  # [K]
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Returns the memory entries that survive n stages of similarity selection, best first.

    Stage s compares in view `views[s]` and keeps the `min(keep[s], survivors)` best entries in the order (score
    descending, slot ascending). The score is the dot product, computed in float32 as one chain
    `acc = fma(q[d], k[d], acc)`. The result is therefore bitwise equal on all devices, for every batch size and number
    of threads.

    Args:
        queries: [V, B, D] float32, bfloat16 or float16, any strides: the features of the queries in each view.
        memory: [V, K, D] of the same dtype and device.
        views: n ints in 0..V-1, the view that each stage compares in.
        keep: n ints >= 1, non-increasing: how many entries each stage keeps. May exceed K.
        query_ids: [B] int64, the source of each query; -1 is not equal to any id. Requires memory_ids.
        memory_ids: [K] int64, the source of each entry; -1 marks an empty slot. Entries that are empty, that have the
            id of the query or a NaN score in a compared view are removed before the first stage.
        precision: "fp32" is exact, as above. "bf16" is approximate on CUDA, where tensor cores score features rounded
            to bfloat16 (for random unit vectors, about 99 % of the top-5 entries, and 94 % of all rows, are the same as
            with "fp32"), and exact on the CPU. Features of 16 bits are not rounded: only the sums of their products
            differ from "fp32", and half as many bytes are read.

    Returns:
        indices [B, keep[-1]] int64 and scores [B, keep[-1]] float32 in the order of the last stage; -1 and -inf where
        fewer than keep[-1] entries remain. Neither carries a gradient: inputs that require one are detached. Compute
        `(queries[v][:, None] * memory[v][indices]).sum(-1)` where scores should be differentiable.

    Raises:
        TypeError, ValueError: the message names the argument. NotImplementedError: no kernel for the device.
        MemoryError: no memory for the results, or for dense copies of the arguments.

    Example:
        >>> queries, memory = torch.randn(2, 8, 128), torch.randn(2, 4096, 128)
        >>> indices, scores = cascade_select(queries, memory, views=[1, 0, 1], keep=[2048, 1024, 5])
        >>> indices.shape, scores.shape
        (torch.Size([8, 5]), torch.Size([8, 5]))
    """
    views, keep = checks.integers("views", views), checks.integers("keep", keep)
    if precision not in _PRECISIONS:
        checks.check_choice("precision", precision, _PRECISIONS)
    arguments = (queries, memory, views, keep, query_ids, memory_ids, precision)
    try:
        if queries.requires_grad or memory.requires_grad:
            return _operator(queries.detach(), memory.detach(), *arguments[2:])
        return _operator(*arguments)
    except Exception as error:  # the operator checks too; checking before each call would take 10 % longer
        check(*arguments)
        checks.raise_if_out_of_memory("cascade_select", error, queries=queries, memory=memory, keep=keep)
        raise


def cascade_select_ref(
    queries: Tensor,  # [V, B, D]
    memory: Tensor,  # [V, K, D]
    views: Sequence[int],
    keep: Sequence[int],
    *,
    query_ids: Tensor | None = None,  # [B]
    memory_ids: Tensor | None = None,  # [K]
) -> tuple[Tensor, Tensor]:
    """Computes `cascade_select` in plain PyTorch, with float64 scores and stable sorts: slow, O(B K) memory.

    Arguments and results as for `cascade_select`. Use it to check results, or on devices without a kernel.
    """
    scores = queries.double() @ memory.double().transpose(1, 2)  # [V, B, K]
    alive = ~scores[list(set(views))].isnan().any(0)  # [B, K]
    if memory_ids is not None:
        alive &= memory_ids != -1
    if query_ids is not None:
        alive &= (query_ids[:, None] != memory_ids) | (query_ids[:, None] == -1)
    for view, count in zip(views, keep):
        order = scores[view].argsort(dim=1, descending=True, stable=True)  # [B, K]
        excluded_last = (~alive).gather(1, order).byte().argsort(dim=1, stable=True)
        order = order.gather(1, excluded_last)[:, :count]  # [B, min(K, count)]
        alive = torch.zeros_like(alive).scatter(1, order, alive.gather(1, order))
    valid = alive.gather(1, order)
    padding = (0, keep[-1] - order.shape[1])
    indices = torch.nn.functional.pad(order.where(valid, -1), padding, value=-1)
    last = scores[views[-1]].gather(1, order).where(valid, -torch.inf).float()
    return indices, torch.nn.functional.pad(last, padding, value=-torch.inf)


_operator = ops.cascade_select.default


@torch.library.register_fake(add_op_namespace_prefix("cascade_select"))
def _fake(queries, memory, views, keep, query_ids, memory_ids, precision):
    check(queries, memory, views, keep, query_ids, memory_ids, precision)
    shape = (queries.shape[1], keep[-1])
    return queries.new_empty(shape, dtype=torch.int64), queries.new_empty(shape, dtype=torch.float32)


def _map(info, in_dims, queries, memory, views, keep, query_ids, memory_ids, precision):
    """Implements torch.vmap: a single call for all slices of the queries if they share a memory."""
    arguments, size = (queries, memory, views, keep, query_ids, memory_ids, precision), info.batch_size
    of_queries, of_memory, _, _, of_query_ids, of_memory_ids, _ = in_dims
    if of_memory is not None or of_memory_ids is not None:
        return library.one_by_one(_operator, in_dims, arguments, size)
    queries = library.fold(queries, of_queries, size, 1)  # [V, N B, D]
    query_ids = library.fold(query_ids, of_query_ids, size, 0)
    indices, scores = _operator(queries, memory, views, keep, query_ids, memory_ids, precision)
    return (indices.unflatten(0, (size, -1)), scores.unflatten(0, (size, -1))), (0, 0)


library.register_vmap("cascade_select", _map)


def check(queries, memory, views, keep, query_ids, memory_ids, precision) -> None:
    """Raises an error for the first invalid argument. Reads shapes and types only, never values on a device."""
    checks.check_tensor("queries", queries, _DTYPES, "[V, B, D]", 3)
    checks.check_tensor("memory", memory, _DTYPES, "[V, K, D]", 3)
    checks.check_device("queries", queries, "cascade_select")
    (V, B, D), (memory_V, K, memory_D) = queries.shape, memory.shape
    if (memory_V, memory_D) != (V, D):
        raise ValueError(f"memory: expected shape [V={V}, K, D={D}], got {list(memory.shape)}")
    if memory.dtype != queries.dtype:
        raise TypeError(f"memory: expected the dtype of queries, {queries.dtype}, got {memory.dtype}")
    checks.check_same_device("memory", memory, queries, "queries")
    checks.check_int64("query_ids", query_ids, (B,), queries, "queries")
    checks.check_int64("memory_ids", memory_ids, (K,), queries, "queries")
    if query_ids is not None and memory_ids is None:
        raise ValueError("query_ids: requires memory_ids, got None")
    if not views or len(views) != len(keep):
        raise ValueError(f"views, keep: expected the same number of entries, at least 1, got {len(views)}, {len(keep)}")
    if any(not 0 <= view < V for view in views):
        raise ValueError(f"views: expected values in 0..{V - 1}, got {views}")
    if keep[-1] < 1 or any(b > a for a, b in zip(keep, keep[1:])):
        raise ValueError(f"keep: expected non-increasing values >= 1, got {keep}")
    if keep[-1] >= _MOST_KEPT:
        raise ValueError(
            f"keep: expected a last value below {_MOST_KEPT}, because each query has so many results, got {keep}"
        )
    checks.check_choice("precision", precision, _PRECISIONS)
