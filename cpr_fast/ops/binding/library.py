"""Functions of the operator library that are not operators, and rules for `torch.vmap`.

Where possible, a rule merges the mapped dimension into an existing dimension of the operator and makes a single call.
Otherwise it calls the operator once for each slice.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops

NAMESPACE = add_op_namespace_prefix("").rstrip(":")  # "cpr_fast", or the unique one of a build of a kernel package


def _path() -> Path:
    """Returns the file of the library: the extension module of a kernel package, which has the name of the namespace,
    or `_C.so`."""
    package = Path(__file__).resolve().parents[1]
    return next(package.glob(f"{NAMESPACE}*.so"), package.parent / "_C.so")


PATH = _path()
_library = ctypes.CDLL(str(PATH))


def _error(function: str) -> str | None:
    """Returns the message of a function of csrc/cpr_fast.h that returns one, or None."""
    call = getattr(_library, function)
    call.restype = ctypes.c_char_p
    message = call()
    return None if message is None else message.decode()


def call(function: str, *numbers: int) -> None:
    """Calls a function of the library that takes whole numbers (int) and returns nothing."""
    getattr(_library, function)(*numbers)


def part_entries(size: int) -> int:
    """Returns the number of entries in a part of a memory of `size` entries in `mil_nce` on the CPU."""
    function = _library.cpr_mil_nce_part_entries
    function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_int64
    return function(size)


def driver_error() -> str | None:
    """Returns why the NVIDIA driver of this machine cannot run the CUDA kernels, or None. CUDA is not initialised."""
    return _error("cpr_cuda_driver_error")


if message := _error("cpr_cpu_variant_error"):
    raise ImportError(message, name="cpr_fast._C")
# The operators still run on the CPU. A CPU build of torch cannot use the GPU, so its driver does not matter.
if torch.version.cuda is not None and (message := driver_error()):
    warnings.warn(f"cpr_fast: no CUDA kernels: {message}", stacklevel=2)

_LIBRARY = torch.library.Library(NAMESPACE, "IMPL")  # a registration lasts as long as its library object


def register_vmap(name: str, rule: Callable) -> None:
    """Registers `rule(info, in_dims, *arguments) -> (outputs, out_dims)` for the operator `name`.

    Does the same as `torch.library.register_vmap`, but imports functorch only on the first use: it takes longer to
    import than the rest of `cpr_fast.ops`.
    """

    def checked(info, in_dims, *arguments):
        if not info.batch_size:
            raise ValueError(f"{name}: expected one slice or more to map over (torch.vmap), got a dimension of size 0")
        return rule(info, in_dims, *arguments)

    def batched(keyset, *arguments):
        from torch._functorch.autograd_function import custom_function_call_vmap_helper
        from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

        return custom_function_call_vmap_helper(
            retrieve_current_functorch_interpreter(), checked, getattr(ops, name).default, *arguments
        )

    _LIBRARY.impl(name, batched, "FuncTorchBatched", with_keyset=True)


def fold(tensor: Tensor | None, mapped: int | None, size: int, axis: int) -> Tensor | None:
    """Returns `tensor` with its mapped dimension, of `size` slices, merged into dimension `axis` of a slice.

    A tensor that is not mapped (mapped=None) is repeated. Slice n of a result of B rows is rows n B to (n + 1) B.
    """
    if tensor is None:
        return None
    if mapped is None:
        shape = list(tensor.shape)
        tensor = tensor.unsqueeze(axis).expand(*shape[:axis], size, *shape[axis:])
    else:
        tensor = tensor.movedim(mapped, axis)
    return tensor.flatten(axis, axis + 1)


def one_by_one(operation: Callable, in_dims: tuple, arguments: tuple[Any, ...], size: int) -> tuple:
    """Calls the operator for each slice and stacks each of its outputs: (outputs, out_dims)."""
    calls = [
        operation(*(a.select(d, n) if isinstance(d, int) else a for a, d in zip(arguments, in_dims)))
        for n in range(size)
    ]
    outputs = tuple(torch.stack(output) for output in zip(*calls))
    return outputs, (0,) * len(outputs)
