"""Positive mining and its loss in one call: `cascade_select`, then `mil_nce` with the selected entries.

If a stage compares in the view of the loss, cascade and loss need the same scores. On the CPU they are then computed
once, which saves one of four matrix products. In the other cases the two operators are called: on CUDA, where the loss
has another query than the cascade, with a tensor as temperature (it divides the query, and the cascade compares the
query itself), under autocast and torch.vmap, and in compiled programs.

Letters in shapes: V views, B queries, K memory entries, D feature width, n stages, P = keep[-1] positives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .binding import checks
from .cascade_select import cascade_select, cascade_select_ref
from .cascade_select import check as check_cascade
from .mil_nce import REDUCTIONS, MilNce, autocast_enabled, mil_nce, mil_nce_ref
from .mil_nce import check as check_loss


def cascade_mil_nce(
    queries: Tensor,  # [V, B, D]
    own_key: Tensor,  # [B, D]
    memory: Tensor,  # [V, K, D]
    views: Sequence[int],
    keep: Sequence[int],
    *,
    view: int = 0,
    query: Tensor | None = None,  # [B, D]
    query_ids: Tensor | None = None,  # [B]
    memory_ids: Tensor | None = None,  # [K]
    same_id: str = "positive",
    self_positive: str | Tensor = "keep",
    temperature: float | Tensor = 0.07,
    reduction: str = "mean",
    precision: str = "fp32",
) -> tuple[Tensor, Tensor]:
    """Returns the MIL-NCE loss of the queries in one view, and the memory slots selected as its positives.

    Gives the bits of two calls, of `cascade_select(queries, memory, views, keep)` and of
    `mil_nce(queries[view], own_key, memory[view], indices)`, with the same ids. See above for when it is faster.

    Args:
        queries: [V, B, D] float32, bfloat16 or float16, any strides: the features of the queries in each view, which
            the cascade compares. The loss is that of queries[view], which receives a gradient.
        own_key: [B, D] of the same dtype and device: the other view of each query.
        memory: [V, K, D] of the same dtype and device. memory[view] receives a gradient only if memory requires one.
        views, keep, precision: the stages, see `cascade_select`; P = keep[-1].
        view: the view of the loss, in 0..V-1.
        query: [B, D], the query of the loss in place of queries[view], if the cascade compares other features than the
            loss, such as the keys of a momentum encoder.
        query_ids: [B] int64, -1 for none. Requires memory_ids. Entries with the id of the query are not selected.
        memory_ids: [K] int64; -1 marks an empty slot, which is neither selected nor in a sum.
        same_id, self_positive, temperature, reduction: see `mil_nce`.

    Returns:
        loss [] for "mean", [B] for "none", float32; and indices [B, P] int64, -1 where fewer entries remain.

    Raises:
        TypeError, ValueError: the message names the argument. NotImplementedError, MemoryError: see `mil_nce`.

    Example:
        >>> queries, own_key, memory = torch.randn(2, 8, 128), torch.randn(8, 128), torch.randn(2, 4096, 128)
        >>> loss, indices = cascade_mil_nce(queries.requires_grad_(), own_key, memory, [1, 0, 1], [2048, 1024, 5])
        >>> loss.backward()
    """
    views, keep, view = checks.integers("views", views), checks.integers("keep", keep), checks.integer("view", view)
    if not isinstance(temperature, Tensor):
        temperature = checks.positive("temperature", temperature)
    ids, settings = (query_ids, memory_ids), (same_id, self_positive, temperature, reduction)
    if query is None and precision == "fp32" and _shares_scores(queries, temperature):
        return _shared(queries, own_key, memory, views, keep, view, *ids, *settings)
    return _two_calls(queries, own_key, memory, views, keep, view, query, precision, *ids, *settings)


def cascade_mil_nce_ref(
    queries: Tensor,  # [V, B, D]
    own_key: Tensor,  # [B, D]
    memory: Tensor,  # [V, K, D]
    views: Sequence[int],
    keep: Sequence[int],
    *,
    view: int = 0,
    query: Tensor | None = None,  # [B, D]
    query_ids: Tensor | None = None,  # [B]
    memory_ids: Tensor | None = None,  # [K]
    same_id: str = "positive",
    self_positive: str | Tensor = "keep",
    temperature: float | Tensor = 0.07,
    reduction: str = "mean",
) -> tuple[Tensor, Tensor]:
    """Computes `cascade_mil_nce` in plain PyTorch: slow, O(B K) memory.

    Arguments and results as for `cascade_mil_nce`; the scores of the cascade are computed in float64.
    """
    ids = {"query_ids": query_ids, "memory_ids": memory_ids}
    indices, _ = cascade_select_ref(queries.detach(), memory.detach(), views, keep, **ids)
    loss = mil_nce_ref(
        queries[view] if query is None else query, own_key, memory[view], indices, **ids,
        same_id=same_id, self_positive=self_positive, temperature=temperature, reduction=reduction,
    )  # fmt: skip
    return loss, indices


def _shares_scores(queries: Tensor, temperature: float | Tensor) -> bool:
    """Returns whether the operator that computes the scores once can be called."""
    return (
        isinstance(queries, Tensor)
        and not isinstance(temperature, Tensor)
        and queries.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not autocast_enabled(queries)
        and not torch._C._are_functorch_transforms_active()
    )


def _shared(
    queries, own_key, memory, views, keep, view, query_ids, memory_ids, same_id, self_positive, temperature, reduction
) -> tuple[Tensor, Tensor]:
    checks.check_choice("reduction", reduction, REDUCTIONS)
    modes = self_positive if isinstance(self_positive, Tensor) else None
    settings = (modes, same_id, "keep" if modes is not None else self_positive, temperature)
    try:
        tensors = (tensor.detach() for tensor in (queries, own_key, memory))
        *computed, indices, _ = _operator(*tensors, views, keep, view, query_ids, memory_ids, *settings)
        # The loss has the gradients of mil_nce, whose autograd function takes the outputs as they are.
        inputs = (queries[view], own_key, memory[view], indices, query_ids, memory_ids)
        return MilNce.apply(*inputs, *settings, reduction, computed), indices
    except Exception as error:
        _check(queries, own_key, memory, views, keep, view, query_ids, memory_ids, *settings)
        checks.raise_if_out_of_memory("cascade_mil_nce", error, queries=queries, memory=memory, keep=keep)
        raise


def _two_calls(
    queries, own_key, memory, views, keep, view, query, precision,
    query_ids, memory_ids, same_id, self_positive, temperature, reduction,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    ids = {"query_ids": query_ids, "memory_ids": memory_ids}
    indices, _ = cascade_select(queries, memory, views, keep, **ids, precision=precision)
    _check_view(view, queries)
    loss = mil_nce(
        queries[view] if query is None else query, own_key, memory[view], indices, **ids,
        same_id=same_id, self_positive=self_positive, temperature=temperature, reduction=reduction,
    )  # fmt: skip
    return loss, indices


_operator = ops.cascade_mil_nce.default


@torch.library.register_fake(add_op_namespace_prefix("cascade_mil_nce"))
def _fake(queries, own_key, memory, views, keep, view, query_ids, memory_ids, *settings):
    _check(queries, own_key, memory, views, keep, view, query_ids, memory_ids, *settings)
    B, D = own_key.shape
    shapes = ((B,), (B, D), (B,), (B,), (B,), (B, keep[-1]), (B, keep[-1]))
    dtypes = (torch.float32,) * 5 + (torch.int64, torch.float32)
    return tuple(queries.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes))


def _check_view(view: int, queries: Tensor) -> None:
    if not 0 <= view < len(queries):
        raise ValueError(f"view: expected an int in 0..{len(queries) - 1}, got {view}")


def _check(queries, own_key, memory, views, keep, view, query_ids, memory_ids, *settings) -> None:
    """Raises an error for the first invalid argument. Reads shapes and types only."""
    check_cascade(queries, memory, views, keep, query_ids, memory_ids, "fp32")
    _check_view(view, queries)
    check_loss(queries[view], own_key, memory[view], None, query_ids, memory_ids, *settings)
