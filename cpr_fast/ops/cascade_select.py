"""Multi-stage, multi-view similarity-and-select: the mining of CPR [arXiv 2201.07989, Algorithm 1].

Letters: B queries, V views, K memory entries, D feature width, n stages.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cpr_fast.ops import _library  # noqa: F401 - registers torch.ops.cpr_fast

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    """Memory entries that survive n stages of similarity selection, best first.

    Stage s compares in view `views[s]` and keeps the `min(keep[s], survivors)` best entries, by score descending and
    then slot ascending. The score is the dot product as one fp32 chain `acc = fma(q[d], k[d], acc)`, so the result is
    the same bits on every device, for every batch size and thread count. Entries whose id is -1 (empty), equals the
    query's id, or whose score in a compared view is NaN leave before stage 1. Query id -1 equals nothing.
    Not differentiable.

    queries, memory: float32, bfloat16 or float16, one dtype and device, any strides.
    views: n ints in 0..V-1.  keep: n ints, non-increasing, >= 1; may exceed K.
    query_ids, memory_ids: int64; query_ids requires memory_ids.
    precision: "fp32" (exact, as above) or "bf16": approximate on CUDA, where tensor cores score features rounded to
        bfloat16 (about 99 % of the top 5 of random unit vectors stay, and 94 % of the rows); exact on the CPU.

    Returns indices [B, keep[-1]] int64 and scores [B, keep[-1]] float32 of the last stage; -1 and -inf where fewer
    than keep[-1] entries remain. Raises ValueError or TypeError naming the bad argument.
    """
    views, keep = [int(view) for view in views], [int(count) for count in keep]
    if queries.requires_grad or memory.requires_grad:
        queries, memory = queries.detach(), memory.detach()
    arguments = (queries, memory, views, keep, query_ids, memory_ids, precision)
    try:
        return _operator(*arguments)
    except Exception:  # the operator checks too: asking before each call would cost a tenth of a small selection
        _check(*arguments)
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
    """`cascade_select` in plain torch, scored in float64 by stable sorts. O(B K) memory."""
    scores = queries.double() @ memory.double().transpose(1, 2)  # [V, B, K]
    alive = ~scores[list(set(views))].isnan().any(0)  # [B, K]
    if memory_ids is not None:
        alive &= memory_ids != -1
    if query_ids is not None:
        alive &= (query_ids[:, None] != memory_ids) | (query_ids[:, None] == -1)
    for view, count in zip(views, keep, strict=True):
        order = scores[view].argsort(dim=1, descending=True, stable=True)  # [B, K]
        excluded_last = (~alive).gather(1, order).byte().argsort(dim=1, stable=True)
        order = order.gather(1, excluded_last)[:, :count]  # [B, min(K, count)]
        alive = torch.zeros_like(alive).scatter(1, order, alive.gather(1, order))
    valid = alive.gather(1, order)
    padding = (0, keep[-1] - order.shape[1])
    indices = torch.nn.functional.pad(order.where(valid, -1), padding, value=-1)
    last = scores[views[-1]].gather(1, order).where(valid, -torch.inf).float()
    return indices, torch.nn.functional.pad(last, padding, value=-torch.inf)


_operator = torch.ops.cpr_fast.cascade_select.default


@torch.library.register_fake("cpr_fast::cascade_select")
def _fake(queries, memory, views, keep, query_ids, memory_ids, precision):
    _check(queries, memory, views, keep, query_ids, memory_ids, precision)
    shape = (queries.shape[1], keep[-1])
    return queries.new_empty(shape, dtype=torch.int64), queries.new_empty(shape, dtype=torch.float32)


def _check(queries, memory, views, keep, query_ids, memory_ids, precision) -> None:
    for name, tensor in (("queries", queries), ("memory", memory)):
        if tensor.dim() != 3 or 0 in tensor.shape:
            raise ValueError(f"{name}: expected a non-empty shape [V, N, D], got {list(tensor.shape)}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {tensor.dtype}")
    (V, B, D), (memory_V, K, memory_D) = queries.shape, memory.shape
    if (memory_V, memory_D) != (V, D):
        raise ValueError(f"memory: expected shape [V={V}, K, D={D}], got {list(memory.shape)}")
    if memory.dtype != queries.dtype:
        raise TypeError(f"memory: expected the dtype of queries, {queries.dtype}, got {memory.dtype}")
    for name, tensor, size in (("memory", memory, None), ("query_ids", query_ids, B), ("memory_ids", memory_ids, K)):
        if tensor is None:
            continue
        if tensor.device != queries.device:
            raise ValueError(f"{name}: expected the device of queries, {queries.device}, got {tensor.device}")
        if size is not None and tensor.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64, got {tensor.dtype}")
        if size is not None and tensor.shape != (size,):
            raise ValueError(f"{name}: expected shape [{size}], got {list(tensor.shape)}")
    if query_ids is not None and memory_ids is None:
        raise ValueError("query_ids: requires memory_ids, got None")
    if not views or len(views) != len(keep):
        raise ValueError(f"views, keep: expected n >= 1 entries each, got {len(views)} and {len(keep)}")
    if any(not 0 <= view < V for view in views):
        raise ValueError(f"views: expected values in 0..{V - 1}, got {views}")
    if keep[-1] < 1 or any(later > earlier for earlier, later in zip(keep, keep[1:], strict=False)):
        raise ValueError(f"keep: expected non-increasing values >= 1, got {keep}")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f'precision: expected "fp32" or "bf16", got {precision!r}')
