"""Checks of arguments that all operators share.

Every message starts with the name of the argument and says what was expected and what was passed. A wrong type raises
TypeError, a wrong value ValueError, a device without a kernel NotImplementedError.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix

_FLOAT32 = torch.finfo(torch.float32)
_INT64 = 2**63


def describe(value: Any) -> str:
    """Returns the type of `value` and, where it is short, the value itself, for an error message."""
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, int) and value.bit_length() > 128:  # Python refuses to print the longest ones
        return f"an int of {value.bit_length()} bits"
    if isinstance(value, (bool, int, float, complex, str)) and len(repr(value)) <= 40:
        return f"{value!r} ({name})"
    return name


def check_tensor(name: str, value: Any, dtypes: Sequence[torch.dtype], shape: str, dim: int) -> None:
    """Raises unless `value` is a dense tensor of one of `dtypes` with `dim` dimensions, none of them of size 0.

    Args:
        shape: the shape in words, for the message, such as "[B, D]".
    """
    if not isinstance(value, Tensor):
        hint = " (torch.from_numpy converts an array)" if type(value).__module__ == "numpy" else ""
        raise TypeError(f"{name}: expected a torch.Tensor of shape {shape}, got {describe(value)}{hint}")
    check_dense(name, value)
    if value.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {value.dtype}")
    if value.dim() != dim or 0 in value.shape:
        raise ValueError(f"{name}: expected a non-empty shape {shape}, got {list(value.shape)}")


def check_dense(name: str, value: Tensor, expected: str = "a dense (strided) tensor") -> None:
    """Raises TypeError for a sparse tensor, and for a nested one, whose shape cannot even be asked for."""
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name}: expected {expected}, got {'a nested tensor' if value.is_nested else value.layout}")


def check_int64(name: str, value: Any, shape: Sequence[int], like: Tensor, owner: str) -> None:
    """Raises unless `value` is None or a dense int64 tensor of this shape on the device of `like`, the argument
    `owner`."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected an int64 torch.Tensor of shape {list(shape)} or None, got {describe(value)}")
    if value.dtype != torch.int64:
        raise TypeError(f"{name}: expected int64, got {value.dtype}")
    check_dense(name, value)
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")
    check_same_device(name, value, like, owner)


def check_same_device(name: str, value: Tensor, like: Tensor, owner: str) -> None:
    """Raises ValueError unless `value` is on the device of `like`, the argument `owner`."""
    if value.device != like.device:
        raise ValueError(f"{name}: expected the device of {owner}, {like.device}, got {value.device}")


def check_device(name: str, value: Tensor, operation: str) -> None:
    """Raises NotImplementedError if this build has no kernel of the operation for the device of `value`.

    The meta device is accepted: it gives the shapes of the results.
    """
    kind = value.device.type
    if kind not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(f"{name}: {operation} runs on the CPU and on CUDA, got a tensor on {value.device}")
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    if kind == "cuda" and not registered(add_op_namespace_prefix(operation), "CUDA"):
        raise NotImplementedError(
            f"{name}: got a tensor on {value.device}, but this build of cpr_fast has no CUDA kernels; "
            "build it with CPR_FAST_CUDA=ON"
        )


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises TypeError unless `value` is a string, and ValueError unless it is one of `choices`."""
    expected = ", ".join(map(repr, choices))
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected one of {expected}, got {describe(value)}")
    if value not in choices:
        raise ValueError(f"{name}: expected one of {expected}, got {value!r}")


def count(name: str, value: Any) -> int:
    """Returns `value`, a number of things, as an int. Raises as `integer`, and ValueError outside 1..2**31 - 1."""
    number = integer(name, value)
    if not 1 <= number < 2**31:
        raise ValueError(f"{name}: expected an int in 1..{2**31 - 1}, got {describe(number)}")
    return number


def integer(name: str, value: Any) -> int:
    """Returns `value` as an int. Raises TypeError for anything that is not an integer, such as bool, and ValueError for
    one beyond int64."""
    if not isinstance(value, bool) and getattr(value, "dtype", None) != torch.bool:
        try:
            found = operator.index(value)
        except TypeError:
            pass
        else:
            if not -_INT64 <= found < _INT64:
                raise ValueError(f"{name}: expected an int of 64 bits, got {describe(found)}")
            return found
    raise TypeError(f"{name}: expected an int, got {describe(value)}")


def integers(name: str, values: Any) -> list[int]:
    """Returns a sequence of integers as a list. Converts tensors and arrays; waits for the device if a tensor is on
    CUDA."""
    if type(values) in (list, tuple) and all(type(value) is int and abs(value) < _INT64 for value in values):
        return list(values)
    if isinstance(values, Tensor) and values.is_meta:
        raise TypeError(f"{name}: expected a sequence of ints, one for each stage, got a tensor without values (meta)")
    listed = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(listed, Sequence) or isinstance(listed, (str, bytes)):
        raise TypeError(f"{name}: expected a sequence of ints, one for each stage, got {describe(values)}")
    return [integer(name, value) for value in listed]


def number(name: str, value: Any) -> float:
    """Returns `value`, a real number. Raises TypeError for bool, str, None, tensors and all other types."""
    if isinstance(value, (float, torch.SymFloat)):
        return value
    if isinstance(value, (numbers.Real, torch.SymInt)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name}: expected a number that a float can hold, got {describe(value)}") from None
    raise TypeError(f"{name}: expected a number, got {describe(value)}")


def positive(name: str, value: Any) -> float:
    """Returns `value` as a float. Raises TypeError as `number`, and ValueError unless it is positive and finite, also
    in float32, in which the kernels compute."""
    value = number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive finite number, got {value}")
    if not _FLOAT32.tiny <= value <= _FLOAT32.max:  # the kernels would compute with 0 or infinity
        raise ValueError(f"{name}: expected {_FLOAT32.tiny:.2g} to {_FLOAT32.max:.2g} (float32), got {value}")
    return value


def raise_if_out_of_memory(operation: str, error: Exception, **sizes: Any) -> None:
    """Raises MemoryError with the `sizes` of the arguments if an operator could not allocate a tensor.

    An operator calls torch through its C interface, whose error names the line of C++ that failed and nothing else.
    """
    if "API call failed" in str(error) and any(call in str(error) for call in ("empty_strided", "contiguous")):
        named = ", ".join(f"{name} {list(v.shape) if isinstance(v, Tensor) else v}" for name, v in sizes.items())
        raise MemoryError(f"{operation}: out of memory for the results, or for dense copies of the arguments: {named}")


def readable(value: Tensor) -> bool:
    """Returns whether values can be read without waiting for a device: not on CUDA, not traced, not under
    torch.func."""
    return (
        not torch.compiler.is_compiling()
        and value.device.type == "cpu"
        and type(value) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
    )
