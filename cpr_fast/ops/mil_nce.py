"""MIL-NCE loss over a memory [arXiv 2201.07989, Eq. 2], fused: one pass over the memory, no [B, K] matrix.

Letters: B queries, K memory entries, D feature width, P positives.
"""

import torch
from torch import Tensor

from cpr_fast.ops import _library  # noqa: F401 - registers torch.ops.cpr_fast

_SAME_ID = ("positive", "ignore", "negative")
_SELF_POSITIVE = ("keep", "denominator", "drop_both")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def mil_nce(
    query: Tensor,  # [B, D]
    own_key: Tensor,  # [B, D]
    memory: Tensor,  # [K, D]
    positives: Tensor | None = None,  # [B, P]
    *,
    query_ids: Tensor | None = None,  # [B]
    memory_ids: Tensor | None = None,  # [K]
    same_id: str = "positive",
    self_positive: str | Tensor = "keep",
    temperature: float = 0.07,
    reduction: str = "mean",
) -> Tensor:
    """logsumexp of the scores of all keys minus logsumexp of those of the positives, score = q . k / temperature.

    All keys are own_key and the memory; the positives are own_key, the valid `positives` (each slot once) and, where
    same_id="positive", the entries of the query's id. Empty slots (memory id -1) are in neither sum.

    query, own_key, memory: float32, bfloat16, float16 (on the CPU also float64), one dtype and device, any strides;
        autocast casts them to float32. Gradients flow to query and own_key, and to memory only if it requires one.
    positives: int64 memory slots, -1 = none; None is InfoNCE.
    query_ids, memory_ids: int64; query_ids requires memory_ids; query id -1 equals nothing.
    same_id: what entries of the query's id are: "positive", "ignore" (in neither sum) or "negative". An explicit
        positive overrides it.
    self_positive: own_key in rows that have another positive: "keep", "denominator" (there only: the published
        drop) or "drop_both"; or int64 [B] of 0 | 1 | 2, one choice per row.
    reduction: "mean" over B, or "none".

    Returns float32 (float64 for float64), [] or [B]. Raises ValueError or TypeError naming the bad argument, and
    IndexError for a slot outside -1..K-1 (on CUDA a device assert). Cannot be differentiated twice.
    """
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: expected 'mean' or 'none', got {reduction!r}")
    modes = self_positive if isinstance(self_positive, Tensor) else None
    inputs = (query, own_key, memory, positives, query_ids, memory_ids, modes)
    settings = (same_id, "keep" if modes is not None else self_positive, temperature)
    try:
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(query.device.type):
            loss, *_ = torch.ops.cpr_fast.mil_nce(*inputs, *settings)
            return loss.mean() if reduction == "mean" else loss
        # What the operator does, without the dispatcher's way into Python and back, and the mean in the same node:
        # 40 us, a tenth of a small loss.
        return _MilNce.apply(*inputs, *settings, reduction)
    except Exception:  # the operator checks too: asking before each call would cost a tenth of a small loss
        _check(*inputs, *settings)
        raise


def mil_nce_ref(
    query: Tensor,  # [B, D]
    own_key: Tensor,  # [B, D]
    memory: Tensor,  # [K, D]
    positives: Tensor | None = None,  # [B, P]
    *,
    query_ids: Tensor | None = None,  # [B]
    memory_ids: Tensor | None = None,  # [K]
    same_id: str = "positive",
    self_positive: str | Tensor = "keep",
    temperature: float = 0.07,
    reduction: str = "mean",
) -> Tensor:
    """`mil_nce` in plain torch, differentiable by autograd, in the precision of its inputs. O(B K) memory."""
    (B, _), K = query.shape, memory.shape[0]
    listed = torch.zeros(B, K + 1, dtype=torch.bool, device=query.device)
    if positives is not None:
        listed.scatter_(1, positives.where(positives >= 0, K), True)  # -1 lands in a column of its own
    listed = listed[:, :K]
    empty = torch.zeros(K, dtype=torch.bool, device=query.device) if memory_ids is None else memory_ids == -1
    same = torch.zeros_like(listed)
    if query_ids is not None:
        same = (query_ids[:, None] == memory_ids) & (query_ids[:, None] != -1)
    positive = (listed | same if same_id == "positive" else listed) & ~empty  # [B, K]
    present = (listed | ~same if same_id == "ignore" else torch.ones_like(listed)) & ~empty

    mode = self_positive if isinstance(self_positive, Tensor) else _SELF_POSITIVE.index(self_positive)
    mode = positive.any(1) * mode  # [B]: rows without another positive keep own_key
    positive = torch.cat([(mode == 0)[:, None], positive], 1)
    present = torch.cat([(mode != 2)[:, None], present], 1)

    logits = torch.cat([(query * own_key).sum(1, keepdim=True), query @ memory.T], 1) / temperature  # [B, 1 + K]
    loss = logits.where(present, -torch.inf).logsumexp(1) - logits.where(positive, -torch.inf).logsumexp(1)
    return loss.mean() if reduction == "mean" else loss


@torch.library.register_fake("cpr_fast::mil_nce")
def _fake(query, own_key, memory, positives, query_ids, memory_ids, self_mode, same_id, self_positive, temperature):
    _check(query, own_key, memory, positives, query_ids, memory_ids, self_mode, same_id, self_positive, temperature)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    row = [query.new_empty(query.shape[0], dtype=dtype) for _ in range(4)]
    return row[0], query.new_empty(query.shape, dtype=dtype), row[1], row[2], row[3]


@torch.library.register_fake("cpr_fast::mil_nce_grad_memory")
def _fake_grad_memory(query, own_key, memory, *settings_and_outputs):
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return memory.new_empty(memory.shape, dtype=dtype)


class _MilNce(torch.autograd.Function):
    """The operator's autograd, with all of its outputs; given a reduction, that of the public function, with the loss
    alone. torch.library.register_autograd would do the first, but asks the schema for defaults: 35 us a call."""

    @staticmethod
    def forward(
        ctx, query, own_key, memory, positives, query_ids, memory_ids, self_mode, same_id, self_positive, temperature,
        reduction=None,
    ):  # fmt: skip
        inputs = (query, own_key, memory, positives, query_ids, memory_ids, self_mode)
        settings = (same_id, self_positive, temperature)
        with torch._C._AutoDispatchBelowAutograd():
            output = _operator(*inputs, *settings)
        loss, grad_query, own_coefficient, lse_all, lse_positive = output
        ctx.dtype, ctx.settings, ctx.reduction = query.dtype, settings, reduction
        ctx.set_materialize_grads(False)
        # The memory is kept only for its own gradient: otherwise a queue may be overwritten before backward.
        learns = (*inputs[1:], lse_all, lse_positive) if ctx.needs_input_grad[2] else ()
        ctx.save_for_backward(query, grad_query, own_coefficient, *learns)
        if reduction is not None:
            return loss.mean() if reduction == "mean" else loss
        ctx.mark_non_differentiable(*output[1:])
        return output

    @staticmethod
    def backward(ctx, grad_loss, *_):
        # Without this a gradient penalty would be a constant: the gradients below are not functions of the inputs.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "mil_nce: cannot be differentiated twice (backward was asked for with create_graph=True)"
            )
        grads = [None] * 11
        if grad_loss is None:
            return tuple(grads)
        query, grad_query, own_coefficient, *rest = ctx.saved_tensors
        scale = grad_loss / len(query) if ctx.reduction == "mean" else grad_loss[:, None]  # [] or [B, 1]
        if ctx.needs_input_grad[0]:
            grads[0] = (scale * grad_query).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grads[1] = (scale * own_coefficient[:, None] * query.to(grad_query.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            *inputs, lse_all, lse_positive = rest
            outputs = (lse_all, lse_positive, scale.expand(len(query), 1).flatten())
            grads[2] = torch.ops.cpr_fast.mil_nce_grad_memory(query, *inputs, *ctx.settings, *outputs).to(ctx.dtype)
        return tuple(grads)


_operator = torch.ops.cpr_fast.mil_nce.default
_AUTOGRAD = torch.library.Library("cpr_fast", "IMPL")  # registered as long as it lives
_AUTOGRAD.impl("mil_nce", _MilNce.apply, "Autograd")
for _device in ("cpu", "cuda"):
    torch.library.register_autocast("cpr_fast::mil_nce", _device, torch.float32)


def _check(
    query, own_key, memory, positives, query_ids, memory_ids, self_mode, same_id, self_positive, temperature
) -> None:
    dtypes = (*_DTYPES, torch.float64) if query.device.type == "cpu" else _DTYPES
    if query.dtype not in dtypes:
        raise TypeError(f"query: expected one of {', '.join(map(str, dtypes))}, got {query.dtype}")
    if query.dim() != 2 or 0 in query.shape:
        raise ValueError(f"query: expected a non-empty shape [B, D], got {list(query.shape)}")
    B, D = query.shape
    if memory.dim() != 2 or memory.shape[0] == 0 or memory.shape[1] != D:
        raise ValueError(f"memory: expected a non-empty shape [K, D={D}], got {list(memory.shape)}")
    if own_key.shape != query.shape:
        raise ValueError(f"own_key: expected the shape of query, {[B, D]}, got {list(own_key.shape)}")
    autocast = torch.is_autocast_enabled(query.device.type)
    for name, tensor in (("own_key", own_key), ("memory", memory)):
        if tensor.dtype != query.dtype and not (autocast and tensor.dtype in _DTYPES):
            raise TypeError(f"{name}: expected the dtype of query, {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected the device of query, {query.device}, got {tensor.device}")
    if positives is not None and positives.dim() != 2:
        raise ValueError(f"positives: expected shape [B={B}, P], got {list(positives.shape)}")
    P = 0 if positives is None else positives.shape[1]
    for name, tensor, shape in (
        ("positives", positives, (B, P)),
        ("query_ids", query_ids, (B,)),
        ("memory_ids", memory_ids, (memory.shape[0],)),
        ("self_positive", self_mode, (B,)),
    ):
        if tensor is None:
            continue
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: expected the device of query, {query.device}, got {tensor.device}")
    if query_ids is not None and memory_ids is None:
        raise ValueError("query_ids: requires memory_ids, got None")
    for name, value, choices in (
        ("same_id", same_id, _SAME_ID),
        ("self_positive", self_positive, _SELF_POSITIVE),
    ):
        if value not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
