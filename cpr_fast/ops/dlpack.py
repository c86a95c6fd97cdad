"""The operators for arrays of other libraries: NumPy, CuPy, JAX and whatever else exchanges memory by DLPack.

Arguments are arrays with `__dlpack__` [https://dmlc.github.io/dlpack/latest/python_spec.html]; their memory is read
where it is, without a copy, and never written. Only ids and slots of another integer type than int64 are converted,
such as JAX's int32. Results are arrays of the library of the first argument, on its device. Shapes, dtypes and settings
are those of the functions of the same names in this package, and so are the results, bit for bit.

Letters in shapes: V views, B queries, K memory entries, D feature width, P positives, T frames, H x W pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .binding import checks
from .cascade_select import cascade_select as _cascade_select
from .mil_nce import mil_nce as _mil_nce
from .tvl1_flow import tvl1_flow as _tvl1_flow

__all__ = ["cascade_select", "mil_nce", "mil_nce_value_and_grad", "tvl1_flow"]

_FEATURES = ("query", "own_key", "memory")
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32)


def cascade_select(
    queries: Any,  # [V, B, D]
    memory: Any,  # [V, K, D]
    views: Sequence[int],
    keep: Sequence[int],
    *,
    query_ids: Any = None,  # [B]
    memory_ids: Any = None,  # [K]
    precision: str = "fp32",
) -> tuple[Any, Any]:
    """Returns the memory entries that survive n stages of similarity selection, best first: indices [B, keep[-1]] and
    scores [B, keep[-1]].

    Args: see `cascade_select` of this package; the features and ids are arrays. The indices are int64, or int32 in JAX
    without `jax_enable_x64`.

    Raises:
        TypeError, ValueError: as that function, and for an array that DLPack cannot pass on; the message names the
        argument.

    Example:
        >>> queries, memory = (numpy.random.rand(2, n, 16).astype("float32") for n in (8, 64))
        >>> indices, scores = cascade_select(queries, memory, views=[1, 0], keep=[32, 5])
        >>> type(indices).__name__, indices.shape
        ('ndarray', (8, 5))
    """
    selected = _cascade_select(
        _features("queries", queries), _features("memory", memory), views, keep,
        query_ids=_integers("query_ids", query_ids), memory_ids=_integers("memory_ids", memory_ids),
        precision=precision,
    )  # fmt: skip
    return _like(queries, selected[0]), _like(queries, selected[1])


def mil_nce(
    query: Any,  # [B, D]
    own_key: Any,  # [B, D]
    memory: Any,  # [K, D]
    positives: Any = None,  # [B, P]
    *,
    query_ids: Any = None,  # [B]
    memory_ids: Any = None,  # [K]
    same_id: str = "positive",
    self_positive: Any = "keep",
    temperature: float = 0.07,
    reduction: str = "mean",
) -> Any:
    """Returns the MIL-NCE loss, [] for reduction="mean" and [B] for "none"; see `mil_nce` of this package.

    The temperature is a number. `mil_nce_value_and_grad` also returns gradients.

    Raises:
        TypeError, ValueError: as that function, and for an array that DLPack cannot pass on; the message names the
        argument. IndexError: a positive outside -1..K-1.
    """
    features = [_features(name, array) for name, array in zip(_FEATURES, (query, own_key, memory))]
    rest = _settings(positives, query_ids, memory_ids, same_id, self_positive, temperature)
    return _like(query, _mil_nce(*features, reduction=reduction, **rest))


def mil_nce_value_and_grad(
    query: Any,  # [B, D]
    own_key: Any,  # [B, D]
    memory: Any,  # [K, D]
    positives: Any = None,  # [B, P]
    *,
    of: Sequence[str] = ("query",),
    query_ids: Any = None,  # [B]
    memory_ids: Any = None,  # [K]
    same_id: str = "positive",
    self_positive: Any = "keep",
    temperature: float = 0.07,
) -> tuple[Any, tuple]:
    """Returns the mean MIL-NCE loss [] and its gradients.

    Args:
        of: the arguments to differentiate by, any of "query", "own_key" and "memory"; the gradients have this order,
            and the shapes and dtypes of these arguments.
        The others: see `mil_nce`.

    Raises:
        TypeError, ValueError: as `mil_nce`, and for `of`.

    Example:
        >>> query, key, memory = (numpy.random.rand(n, 16).astype("float32") for n in (8, 8, 64))
        >>> loss, (grad_query, grad_key) = mil_nce_value_and_grad(query, key, memory, of=("query", "own_key"))
        >>> grad_query.shape
        (8, 16)
    """
    if isinstance(of, str) or not isinstance(of, Sequence) or not of:
        raise TypeError(f"of: expected a sequence of names, such as ('query',), got {checks.describe(of)}")
    for name in of:
        checks.check_choice("of", name, _FEATURES)
    if len(set(of)) < len(of):
        raise ValueError(f"of: expected each name once, got {tuple(of)}")
    features = {name: _features(name, array) for name, array in zip(_FEATURES, (query, own_key, memory))}
    rest = _settings(positives, query_ids, memory_ids, same_id, self_positive, temperature)
    for name in of:
        if not features[name].is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype, got {features[name].dtype}")
    with torch.enable_grad():
        wanted = [features[name].requires_grad_() for name in of]
        loss = _mil_nce(*features.values(), **rest)
        gradients = torch.autograd.grad(loss, wanted)
    return _like(query, loss.detach()), tuple(_like(query, gradient) for gradient in gradients)


def tvl1_flow(frames: Any, **settings: Any) -> Any:
    """Returns the TV-L1 flow [..., T - 1, 2, H, W] float32, in pixels, of grey frames [..., T, H, W].

    Args:
        frames: an array, uint8 in 0..255 or float32 in 0..1.
        settings: see `tvl1_flow` of this package.

    Raises:
        TypeError, ValueError: as that function, and for an array that DLPack cannot pass on; the message names the
        argument.
    """
    return _like(frames, _tvl1_flow(_features("frames", frames), **settings))


def _settings(positives, query_ids, memory_ids, same_id, self_positive, temperature) -> dict[str, Any]:
    if not isinstance(self_positive, str):
        self_positive = _integers("self_positive", self_positive)
    return {
        "positives": _integers("positives", positives),
        "query_ids": _integers("query_ids", query_ids),
        "memory_ids": _integers("memory_ids", memory_ids),
        "same_id": same_id,
        "self_positive": self_positive,
        "temperature": checks.positive("temperature", temperature),
    }


def _features(name: str, array: Any) -> Tensor:
    """Returns a tensor of the memory of `array`, which takes no part in torch's differentiation."""
    if isinstance(array, Tensor):
        return array.detach()
    if not hasattr(array, "__dlpack__"):
        raise TypeError(f"{name}: expected an array with __dlpack__ (NumPy, CuPy, JAX), got {checks.describe(array)}")
    if hasattr(array, "mask"):  # of numpy.ma, which DLPack drops
        raise TypeError(f"{name}: expected an array without a mask, got {checks.describe(array)}; fill it")
    strides = getattr(array, "strides", None)  # torch ends the process for a negative one
    if strides is not None and any(stride < 0 for stride in strides):
        raise ValueError(
            f"{name}: expected an array without reversed dimensions, got strides {tuple(strides)}; copy it"
        )
    try:
        return torch.from_dlpack(array)
    except Exception as error:
        kind, dtype = checks.describe(array), getattr(array, "dtype", "unknown")
        message = str(error).split("\n", 1)[0]
        raise TypeError(f"{name}: torch cannot read {kind} of dtype {dtype} by DLPack: {message}") from error


def _integers(name: str, array: Any) -> Tensor | None:
    """Returns ids or slots as int64, without a copy if they are int64."""
    if array is None:
        return None
    tensor = _features(name, array)
    if tensor.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected integers that int64 holds, got {tensor.dtype}")
    return tensor.long()


def _like(first: Any, result: Tensor) -> Any:
    """Returns a result as an array of the library of the first argument, without a copy."""
    if isinstance(first, Tensor):
        return result
    if hasattr(first, "__array_namespace__"):
        library = first.__array_namespace__()
    else:
        library = sys.modules[type(first).__module__.partition(".")[0]]
    return library.from_dlpack(result)
