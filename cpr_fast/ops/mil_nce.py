"""MIL-NCE loss over a memory [arXiv 2201.07989, Eq. 2], fused: one pass over the memory, no [B, K] matrix.

Letters in shapes: B queries, K memory entries, D feature width, P positives.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .binding import checks, library

_SAME_ID = ("positive", "ignore", "negative")
SELF_POSITIVE = ("keep", "denominator", "drop_both")
REDUCTIONS = ("mean", "none")
_FLOAT32 = torch.finfo(torch.float32)
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
    temperature: float | Tensor = 0.07,
    reduction: str = "mean",
) -> Tensor:
    """Returns the MIL-NCE loss: logsumexp of the scores of all keys minus logsumexp of the scores of the positives.

    The score is q . k / temperature. All keys are own_key and the memory. The positives are own_key, the valid
    `positives` (each slot once) and, where same_id="positive", the entries with the id of the query.

    Args:
        query: [B, D] float32, bfloat16, float16 (on the CPU also float64), any strides. Autocast casts to float32.
        own_key: [B, D] of the same dtype and device: the feature of the other view of each query, its positive key
            (MoCo).
        memory: [K, D] of the same dtype and device. Receives a gradient only if it requires one.
        positives: [B, P] int64 memory slots, -1 for none. With None, the loss is InfoNCE.
        query_ids: [B] int64; -1 is not equal to any id. Requires memory_ids.
        memory_ids: [K] int64; -1 marks an empty slot, which is in neither sum.
        same_id: how entries with the id of the query are treated: "positive", "ignore" (in neither sum) or "negative".
            A slot listed in `positives` is a positive in any case.
        self_positive: how own_key is treated in rows that have another positive: "keep" (it is in both sums),
            "denominator" (only in the sum over all keys, as in the published code) or "drop_both" (in neither sum). Or
            [B] int64 of 0, 1 or 2, which selects one of these, in this order, for each row.
        temperature: a positive number; or a floating-point tensor with one element, on the CPU or the device of query,
            which receives a gradient if it requires one. On CUDA and in compiled programs its value is not read: one
            that is not positive gives a NaN loss.
        reduction: "mean" over B, or "none".

    Returns:
        float32 (float64 for float64 inputs): [] for "mean", [B] for "none". Second derivatives are not supported.

    Raises:
        TypeError, ValueError: the message names the argument. IndexError: a positive outside -1..K-1 (on CUDA an
        assertion of the device). NotImplementedError: no kernel for the device, or a call under torch.func.grad or
        another differentiating transform of torch.func. MemoryError: no memory for the results, or for dense copies of
        the arguments.

    Example:
        >>> query = torch.randn(8, 128, requires_grad=True)
        >>> own_key, memory, positives = torch.randn(8, 128), torch.randn(4096, 128), torch.randint(4096, (8, 5))
        >>> mil_nce(query, own_key, memory, positives, temperature=0.1).backward()
    """
    checks.check_choice("reduction", reduction, REDUCTIONS)
    features = (query, own_key, memory)
    if isinstance(temperature, Tensor):
        features, temperature = divided(*features, temperature)
    elif type(temperature) is not float or not _FLOAT32.tiny <= temperature <= _FLOAT32.max:
        temperature = checks.positive("temperature", temperature)
    modes = self_positive if isinstance(self_positive, Tensor) else None
    inputs = (*features, positives, query_ids, memory_ids, modes)
    settings = (same_id, "keep" if modes is not None else self_positive, temperature)
    return _loss(inputs, settings, reduction)


def _loss(inputs: tuple, settings: tuple, reduction: str) -> Tensor:
    try:
        if torch.compiler.is_compiling() or autocast_enabled(inputs[0]) or torch._C._are_functorch_transforms_active():
            loss, *_ = ops.mil_nce(*inputs, *settings)
            return loss.mean() if reduction == "mean" else loss
        # Same as calling the operator, but the dispatcher does not call back into Python, and the mean is in the same
        # autograd node. This saves 40 us, 10 % of the time of a small loss.
        return apply_mil_nce(*inputs, *settings, reduction)
    except Exception as error:  # the operator checks too; checking before each call would take 10 % longer
        check(*inputs, *settings)
        checks.raise_if_out_of_memory("mil_nce", error, query=inputs[0], memory=inputs[2])
        raise


def autocast_enabled(query: Tensor) -> bool:
    kind = query.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def as_under_autocast(*features: Tensor) -> tuple[Tensor, ...]:
    """Returns features as autocast gives them to the operator: those of 16 bits in float32. Without it, as they are."""
    if not autocast_enabled(features[0]):
        return features
    return tuple(tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor for tensor in features)


def divided(query: Tensor, own_key: Tensor, memory: Tensor, temperature: Tensor) -> tuple[tuple, float]:
    """Returns the features with the query divided by `temperature`, and the temperature that remains, 1.

    Every score is q . k / t, that of own_key included, and nothing is normalised in between. The loss therefore depends
    on the temperature t and the query q only through q / t, and the chain rule through this division is the exact
    gradient to t: t dL/dt = -sum(q dL/dq) (Euler's identity). No kernel needs code for it, and nothing waits for the
    device. 16-bit features are converted to float32 first: rounding q / t to 16 bits would make the scores less
    accurate.

    The kernel divides each score by a float, and a tensor divides each element of the query. The score then has the
    rounding errors of D quotients instead of one, each at most 2^-24 of its term; errors of a sum of D products are
    as large.

    A temperature that is not positive and finite raises ValueError on the CPU. Elsewhere, and in traced programs, its
    value is not read: the loss becomes NaN.
    """
    for name, tensor in (("query", query), ("own_key", own_key), ("memory", memory)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {checks.describe(tensor)}")
    if not temperature.is_floating_point():
        raise TypeError(f"temperature: expected a number or a tensor of floating-point dtype, got {temperature.dtype}")
    checks.check_dense("temperature", temperature, "a number or a dense (strided) tensor")
    if temperature.numel() != 1:
        raise ValueError(f"temperature: expected a tensor with one element, got shape {list(temperature.shape)}")
    if temperature.device != query.device and temperature.device.type != "cpu":
        raise ValueError(f"temperature: expected the device of query, {query.device}, got {temperature.device}")
    if checks.readable(temperature):
        checks.positive("temperature", temperature.item())
    if not autocast_enabled(query):
        for name, tensor in (("own_key", own_key), ("memory", memory)):
            if tensor.dtype != query.dtype:
                raise TypeError(f"{name}: expected the dtype of query, {query.dtype}, got {tensor.dtype}")
    if query.dtype in (torch.bfloat16, torch.float16):
        query, own_key, memory = (features.float() for features in (query, own_key, memory))
    temperature = temperature.to(torch.promote_types(temperature.dtype, torch.float32)).reshape(())
    valid = (temperature > 0) & (temperature < math.inf)
    scale = torch.where(valid, 1 / temperature, math.nan).double()
    # With one factor for each row, autograd sums the gradient of the factor within rows and then over the rows, in
    # float64. A single sum over all B x D elements would be divided among the threads, so its last bits would depend on
    # their number. (A product instead of expand: `temperature` may be on the CPU with `query` on CUDA.)
    shape = [len(query), 1] if query.dim() == 2 else []  # the operator refuses other shapes of query
    factors = scale * query.new_ones(shape, dtype=torch.float64)  # [B, 1]
    return (query * factors.to(query.dtype), own_key, memory), 1.0


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
    temperature: float | Tensor = 0.07,
    reduction: str = "mean",
) -> Tensor:
    """Computes `mil_nce` in plain PyTorch, in the precision of its inputs: O(B K) memory.

    Arguments and result as for `mil_nce`. Autograd and torch.func can differentiate it any number of times.
    """
    (B, _), K = query.shape, memory.shape[0]
    listed = torch.zeros(B, K + 1, dtype=torch.bool, device=query.device)
    if positives is not None:
        listed.scatter_(1, positives.where(positives >= 0, K), True)  # -1 is written to the additional column K
    listed = listed[:, :K]
    empty = torch.zeros(K, dtype=torch.bool, device=query.device) if memory_ids is None else memory_ids == -1
    same = torch.zeros_like(listed)
    if query_ids is not None:
        same = (query_ids[:, None] == memory_ids) & (query_ids[:, None] != -1)
    positive = (listed | same if same_id == "positive" else listed) & ~empty  # [B, K]
    present = (listed | ~same if same_id == "ignore" else torch.ones_like(listed)) & ~empty

    mode = self_positive if isinstance(self_positive, Tensor) else SELF_POSITIVE.index(self_positive)
    mode = positive.any(1) * mode  # [B]: rows without another positive keep own_key
    positive = torch.cat([(mode == 0)[:, None], positive], 1)
    present = torch.cat([(mode != 2)[:, None], present], 1)

    logits = torch.cat([(query * own_key).sum(1, keepdim=True), query @ memory.T], 1) / temperature  # [B, 1 + K]
    loss = logits.where(present, -torch.inf).logsumexp(1) - logits.where(positive, -torch.inf).logsumexp(1)
    return loss.mean() if reduction == "mean" else loss


@torch.library.register_fake(add_op_namespace_prefix("mil_nce"))
def _fake(query, own_key, memory, positives, query_ids, memory_ids, self_mode, same_id, self_positive, temperature):
    check(query, own_key, memory, positives, query_ids, memory_ids, self_mode, same_id, self_positive, temperature)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    row = [query.new_empty(query.shape[0], dtype=dtype) for _ in range(4)]
    return row[0], query.new_empty(query.shape, dtype=dtype), row[1], row[2], row[3]


@torch.library.register_fake(add_op_namespace_prefix("mil_nce_grad_memory"))
def _fake_grad_memory(query, own_key, memory, *settings_and_outputs):
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return memory.new_empty(memory.shape, dtype=dtype)


class MilNce(torch.autograd.Function):
    """Autograd function of the operator, which returns all of its outputs. With a reduction, it is the autograd
    function of the public functions and returns only the loss; `computed`: the outputs, if cascade_mil_nce has computed
    them. torch.library.register_autograd would suffice for the operator, but reading the schema takes 35 us."""

    @staticmethod
    def forward(
        ctx, query, own_key, memory, positives, query_ids, memory_ids, self_mode, same_id, self_positive, temperature,
        reduction=None, computed=None,
    ):  # fmt: skip
        inputs = (query, own_key, memory, positives, query_ids, memory_ids, self_mode)
        settings = (same_id, self_positive, temperature)
        output = computed
        if output is None:
            with torch._C._AutoDispatchBelowAutograd():
                output = _operator(*inputs, *settings)
        loss, grad_query, own_coefficient, lse_all, lse_positive = output
        ctx.dtype, ctx.settings, ctx.reduction = query.dtype, settings, reduction
        ctx.set_materialize_grads(False)
        # Only the gradients to own_key and to the memory read the features again. Otherwise none is saved, so that a
        # queue may be overwritten before backward.
        keys_learn = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        for_keys = (query, own_coefficient) if keys_learn else ()
        for_memory = (*inputs[1:], lse_all, lse_positive) if ctx.needs_input_grad[2] else ()
        ctx.save_for_backward(grad_query, *for_keys, *for_memory)
        if reduction is not None:
            return loss.mean() if reduction == "mean" else loss
        ctx.mark_non_differentiable(*output[1:])
        return output

    @staticmethod
    def backward(ctx, grad_loss, *_):
        # Autograd treats the gradients below as independent of the inputs, so a gradient penalty would be a constant.
        if torch.is_grad_enabled():
            raise RuntimeError(
                "mil_nce: cannot be differentiated twice (backward ran with create_graph=True); use mil_nce_ref"
            )
        grads = [None] * 12
        if grad_loss is None:
            return tuple(grads)
        grad_query, *for_keys = ctx.saved_tensors
        B = len(grad_query)
        scale = grad_loss / B if ctx.reduction == "mean" else grad_loss[:, None]  # [] or [B, 1]
        if ctx.needs_input_grad[0]:
            grads[0] = (scale * grad_query).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            query, own_coefficient = for_keys[:2]
            grads[1] = (scale * own_coefficient[:, None] * query.to(grad_query.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            query, _, *inputs, lse_all, lse_positive = for_keys
            outputs = (lse_all, lse_positive, scale.expand(B, 1).flatten())
            grads[2] = ops.mil_nce_grad_memory(query, *inputs, *ctx.settings, *outputs).to(ctx.dtype)
        return tuple(grads)

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError("mil_nce: has no forward-mode derivative; use mil_nce_ref")


# MilNce.apply without its layer in Python, which serves transforms of torch.func: it takes 2 us.
apply_mil_nce = super(torch.autograd.Function, MilNce).apply


def _autograd(*arguments):
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "mil_nce: torch.func.grad, vjp, jacrev and jvp are not supported; use backward(), torch.autograd.grad "
            "or mil_nce_ref"
        )
    return MilNce.apply(*arguments)


def _map(info, in_dims, *arguments):
    """Implements torch.vmap: a single call for all slices of the queries if they share a memory."""
    size = info.batch_size
    if in_dims[2] is not None or in_dims[5] is not None:
        return library.one_by_one(ops.mil_nce, in_dims, arguments, size)
    memory, memory_ids = arguments[2], arguments[5]
    rows = (library.fold(arguments[i], in_dims[i], size, 0) for i in (0, 1, 3, 4, 6))
    query, own_key, positives, query_ids, self_mode = rows  # N B rows each
    outputs = ops.mil_nce(query, own_key, memory, positives, query_ids, memory_ids, self_mode, *arguments[7:])
    return tuple(output.unflatten(0, (size, -1)) for output in outputs), (0,) * len(outputs)


_operator = ops.mil_nce.default
_AUTOGRAD = torch.library.Library(library.NAMESPACE, "IMPL")  # a registration lasts as long as its library object
_AUTOGRAD.impl("mil_nce", _autograd, "Autograd")
library.register_vmap("mil_nce", _map)
for _device in ("cpu", "cuda"):
    torch.library.register_autocast(add_op_namespace_prefix("mil_nce"), _device, torch.float32)


def check(
    query, own_key, memory, positives, query_ids, memory_ids, self_mode, same_id, self_positive, temperature
) -> None:
    """Raises an error for the first invalid argument. Reads shapes and types only, never values on a device."""
    on_cuda = isinstance(query, Tensor) and query.device.type == "cuda"
    dtypes = _DTYPES if on_cuda else (*_DTYPES, torch.float64)
    checks.check_tensor("query", query, dtypes, "[B, D]", 2)
    checks.check_tensor("own_key", own_key, dtypes, "[B, D]", 2)
    checks.check_tensor("memory", memory, dtypes, "[K, D]", 2)
    checks.check_device("query", query, "mil_nce")
    B, D = query.shape
    K = memory.shape[0]
    if memory.shape[1] != D:
        raise ValueError(f"memory: expected a non-empty shape [K, D={D}], got {list(memory.shape)}")
    if own_key.shape != query.shape:
        raise ValueError(f"own_key: expected the shape of query, {[B, D]}, got {list(own_key.shape)}")
    autocast = autocast_enabled(query)
    for name, tensor in (("own_key", own_key), ("memory", memory)):
        if tensor.dtype != query.dtype and not (autocast and tensor.dtype in _DTYPES):
            raise TypeError(f"{name}: expected the dtype of query, {query.dtype}, got {tensor.dtype}")
        checks.check_same_device(name, tensor, query, "query")
    if isinstance(positives, Tensor):
        checks.check_dense("positives", positives)
    if isinstance(positives, Tensor) and positives.dim() != 2:
        raise ValueError(f"positives: expected shape [B={B}, P], got {list(positives.shape)}")
    P = positives.shape[1] if isinstance(positives, Tensor) else "P"
    checks.check_int64("positives", positives, (B, P), query, "query")
    checks.check_int64("query_ids", query_ids, (B,), query, "query")
    checks.check_int64("memory_ids", memory_ids, (K,), query, "query")
    checks.check_int64("self_positive", self_mode, (B,), query, "query")
    if query_ids is not None and memory_ids is None:
        raise ValueError("query_ids: requires memory_ids, got None")
    checks.check_choice("same_id", same_id, _SAME_ID)
    checks.check_choice("self_positive", self_positive, SELF_POSITIVE)
    checks.positive("temperature", temperature)
