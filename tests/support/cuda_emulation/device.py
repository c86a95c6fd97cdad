"""Calls the CUDA kernels, compiled for the host by `compile.build`, through the C interface.

No GPU is needed: `cuda_runtime.h` and `scheduler.cpp` in this folder emulate the device.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
SAME_ID = {"positive": 0, "ignore": 1, "negative": 2}
SELF_POSITIVE = {"keep": 0, "denominator": 1, "drop_both": 2}
ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}  # orders of the threads of a block and the blocks of a grid

_GUARD = 4096  # bytes behind a workspace that must not change
_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64


class CascadeArgs(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("queries", "memory", "query_ids", "memory_ids", "indices", "scores")),
        *((name, _POINTER) for name in ("views", "keep")),
        *((name, _INT64) for name in "VBKDn"),
        ("dtype", ctypes.c_int),
        ("precision", ctypes.c_int),
    ]


class MilNceArgs(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("query", "own_key", "memory", "positives")),
        *((name, _POINTER) for name in ("query_ids", "memory_ids", "self_mode")),
        *((name, _INT64) for name in "BKDP"),
        *((name, ctypes.c_int) for name in ("dtype", "same_id", "self_positive")),
        ("temperature", ctypes.c_double),
    ]


class Tvl1Args(ctypes.Structure):
    _fields_ = [
        *((name, _POINTER) for name in ("frames", "flow", "pixel_iterations")),
        *((name, _INT64) for name in "NTHW"),
        ("frames_are_uint8", ctypes.c_int),
        *((name, ctypes.c_double) for name in ("tau", "lambda_", "theta", "scale_step", "epsilon")),
        *((name, ctypes.c_int) for name in ("scales", "warps", "inner_iterations", "outer_iterations", "median")),
    ]


class MilNceOutputs(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("loss", "grad_query", "own_coefficient", "lse_all", "lse_positive")]


class Device:
    """The emulated device. Workspaces and outputs start as NaN, so that a read of unwritten memory is noticed."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        for name in ("emulation_products", "emulation_launches"):
            getattr(self._library, name).restype = ctypes.c_ulong

    def set_order(self, order: str) -> None:
        self._library.emulation_set_order(ORDERS[order])

    def resize(self, shared_limit: int = 227 << 10, cache_size: int = 50 << 20, processors: int = 132) -> None:
        """Sets the bytes of shared memory that a multiprocessor has for one block, those of the L2 cache, and how many
        multiprocessors there are, and so blocks of a cooperative launch: they decide the route."""
        self._library.emulation_set_device(shared_limit, cache_size, processors)

    def products(self) -> int:
        """Returns the number of matrix products on tensor cores since the library was loaded."""
        return self._library.emulation_products()

    def launches(self) -> int:
        """Returns the number of kernels that have run since the library was loaded."""
        return self._library.emulation_launches()

    def set_tensor_core(self, model: str) -> None:
        """Sums products as the tensor cores of an `A100` or `H100`, or less exactly than any: `worst`."""
        self._library.emulation_set_tensor_core(["worst", "A100", "H100"].index(model))

    def use(self, device: int) -> None:
        """Makes device 0 or 1 the current one."""
        self._library.emulation_use_device(device)

    def refuse(self, capability: int = 90, error: int = 0) -> None:
        """Makes the device one of this compute capability (80: 8.0) that refuses every kernel with this cudaError_t."""
        self._library.emulation_refuse(capability, error)

    def set_capability(self, capability: int = 90) -> None:
        """Makes the device one of this compute capability, which decides whether products are those of warpgroups."""
        self.refuse(capability)

    stream = None  # the handle that calls pass as their stream

    def _input(self, name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
        """Returns the tensor where the device reads it; `_output` and `_workspace` return new ones."""
        assert tensor is None or tensor.is_contiguous(), name
        return tensor

    def _output(self, name: str, shape: tuple[int, ...], value: float, dtype=torch.float32) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype)

    def _workspace(self, bytes_: int) -> torch.Tensor:
        return torch.full((bytes_ + _GUARD,), 0xFF, dtype=torch.uint8)  # NaN in every float

    def _finish(self, workspace: torch.Tensor | None, *outputs: torch.Tensor) -> None:
        """Is called after every kernel of a call has run."""
        if workspace is not None:
            assert (workspace[-_GUARD:] == 0xFF).all(), "a write past the workspace"

    def _run(self, function: str, args: ctypes.Structure, pointers=(), outputs=(), with_workspace=True) -> None:
        workspace = None
        if with_workspace:
            size = getattr(self._library, f"cpr_{function}_cuda_workspace")
            size.restype = ctypes.c_size_t
            workspace = self._workspace(size(ctypes.byref(args)))
            pointers = [*pointers, _address(workspace)]
        call = getattr(self._library, f"cpr_{function}_cuda")
        call.restype = ctypes.c_char_p
        error = call(ctypes.byref(args), *pointers, _POINTER(self.stream))
        if error is not None:
            raise RuntimeError(error.decode())
        self._finish(workspace, *outputs)

    def cascade_select(self, queries, memory, views, keep, query_ids=None, memory_ids=None, precision=0):
        """Returns indices and scores, both [B, keep[-1]]; arguments as for cpr_fast.ops.cascade_select."""
        (V, B, D), K, n = queries.shape, memory.shape[1], len(views)
        given = {"queries": queries, "memory": memory, "query_ids": query_ids, "memory_ids": memory_ids}
        inputs = [self._input(name, tensor) for name, tensor in given.items()]
        indices = self._output("indices", (B, keep[-1]), -7, torch.int64)
        scores = self._output("scores", (B, keep[-1]), torch.nan)
        stages = torch.tensor(views), torch.tensor(keep)
        pointers = [_address(t) for t in (*inputs, indices, scores, *stages)]
        args = CascadeArgs(*pointers, V, B, K, D, n, DTYPES[queries.dtype], precision)
        self._run("cascade_select", args, outputs=(indices, scores))
        return indices, scores

    def mil_nce(
        self, query, own_key, memory, positives=None, query_ids=None, memory_ids=None,
        same_id="positive", self_positive="keep", temperature=0.07, forward=True, backward=True,
    ):  # fmt: skip
        """Returns the forward's outputs by name, and `grad_memory` [K, D] of loss.sum(); arguments as for mil_nce.
        Without `forward`, the gradient is that for lse_all and lse_positive as `_output` makes them."""
        (B, D), K = query.shape, memory.shape[0]
        modes = self_positive if isinstance(self_positive, torch.Tensor) else None
        given = {"query": query, "own_key": own_key, "memory": memory, "positives": positives}
        given |= {"query_ids": query_ids, "memory_ids": memory_ids, "self_mode": modes}
        inputs = [self._input(name, tensor) for name, tensor in given.items()]
        names = [name for name, _ in MilNceOutputs._fields_]
        outputs = {name: self._output(name, (B, D) if name == "grad_query" else (B,), torch.nan) for name in names}
        args = MilNceArgs(
            *map(_address, inputs), B, K, D, 0 if positives is None else positives.shape[1], DTYPES[query.dtype],
            SAME_ID[same_id], 0 if modes is not None else SELF_POSITIVE[self_positive], temperature,
        )  # fmt: skip
        out = MilNceOutputs(*(_address(outputs[name]) for name in names))
        if forward:
            self._run("mil_nce_forward", args, [ctypes.byref(out)], outputs.values())
        if not backward:
            return outputs
        grad_loss = self._input("grad_loss", torch.ones(B))
        outputs["grad_memory"] = self._output("grad_memory", (K, D), torch.nan)
        tensors = (grad_loss, outputs["lse_all"], outputs["lse_positive"], outputs["grad_memory"])
        self._run("mil_nce_grad_memory", args, map(_address, tensors), [outputs["grad_memory"]], with_workspace=False)
        return outputs

    def tvl1_flow(self, frames: torch.Tensor, settings: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns flow [N, T-1, 2, H, W], pixel-iterations [N, T-1] of frames [N, T, H, W]; every setting of the op by
        name."""
        N, T, H, W = frames.shape
        flow = self._output("flow", (N, T - 1, 2, H, W), torch.nan)
        counted = self._output("pixel_iterations", (N, T - 1), -7, torch.int64)
        pointers = map(_address, (self._input("frames", frames), flow, counted))
        args = Tvl1Args(*pointers, N, T, H, W, frames.dtype == torch.uint8, **settings)
        self._run("tvl1_flow", args, outputs=(flow, counted))
        return flow, counted


def _address(tensor: torch.Tensor | None) -> _POINTER:
    return _POINTER(None if tensor is None else tensor.data_ptr())
