"""Compiles the sources of the CUDA kernels for the host and calls them through the C interface.

No GPU is needed: `cuda_runtime.h` and `scheduler.cpp` in this folder emulate the device.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[3]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
SAME_ID = {"positive": 0, "ignore": 1, "negative": 2}
SELF_POSITIVE = {"keep": 0, "denominator": 1, "drop_both": 2}
ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}  # orders of the threads of a block and the blocks of a grid

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


def build() -> Path:
    """Returns the path of the library, after compiling it if its sources have changed."""
    csrc = REPOSITORY / "csrc"
    emulation = Path(__file__).parent
    sources = [*sorted(csrc.glob("cuda/*/*.cu")), emulation / "scheduler.cpp"]
    headers = [*csrc.rglob("*.cuh"), *csrc.rglob("*.h"), *emulation.glob("*.h"), Path(__file__)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in [*sources, *sorted(headers)])).hexdigest()[:16]
    library = REPOSITORY / "build" / "cuda_emulation" / f"{digest}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}")
    flags = [
        "-std=c++17",
        "-O2",
        "-g",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
        "-fno-tree-slp-vectorize",  # with it GCC 12 omits the rounding of a pair of doubles to float
    ]
    warnings = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror", "-U_FORTIFY_SOURCE"]  # longjmp between stacks
    includes = [f"-I{emulation}", f"-I{csrc}"]
    command = [os.environ.get("CXX", "g++"), *flags, *warnings, *includes, "-x", "c++", *map(str, sources)]
    subprocess.run([*command, "-o", str(partial)], check=True)
    os.replace(partial, library)
    return library


class Device:
    """The emulated device. Workspaces and outputs start as NaN, so that a read of unwritten memory is noticed."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        for name in ("cascade_select", "mil_nce_forward", "mil_nce_grad_memory", "tvl1_flow"):
            getattr(self._library, f"cpr_{name}_cuda").restype = ctypes.c_char_p
        for name in ("cascade_select", "mil_nce_forward", "tvl1_flow"):
            getattr(self._library, f"cpr_{name}_cuda_workspace").restype = ctypes.c_size_t
        for name in ("emulation_products", "emulation_launches"):
            getattr(self._library, name).restype = ctypes.c_ulong

    def set_order(self, order: str) -> None:
        self._library.emulation_set_order(ORDERS[order])

    def resize(self, shared_limit: int = 227 << 10, cache_size: int = 50 << 20, processors: int = 132) -> None:
        """The bytes of shared memory that a block can opt in to and of the L2 cache, and how many blocks of a
        cooperative launch are resident: they decide the route."""
        self._library.emulation_set_device(shared_limit, cache_size, processors)

    def products(self) -> int:
        """Returns the number of matrix products on tensor cores since the library was loaded."""
        return self._library.emulation_products()

    def launches(self) -> int:
        """Returns the number of kernels that have run since the library was loaded."""
        return self._library.emulation_launches()

    def _workspace(self, size_function: str, args: ctypes.Structure) -> torch.Tensor:
        size = getattr(self._library, size_function)(ctypes.byref(args))
        guarded = torch.full((size + 4096,), 0xFF, dtype=torch.uint8)  # NaN in every float
        return guarded

    def cascade_select(self, queries, memory, views, keep, query_ids=None, memory_ids=None, precision=0):
        """Returns indices and scores, both [B, keep[-1]]; arguments as for cpr_fast.ops.cascade_select."""
        (V, B, D), K, n = queries.shape, memory.shape[1], len(views)
        indices = torch.full((B, keep[-1]), -7, dtype=torch.int64)
        scores = torch.full((B, keep[-1]), torch.nan)
        stages = torch.tensor(views), torch.tensor(keep)
        pointers = [_address(t) for t in (queries, memory, query_ids, memory_ids, indices, scores, *stages)]
        args = CascadeArgs(*pointers, V, B, K, D, n, DTYPES[queries.dtype], precision)
        workspace = self._workspace("cpr_cascade_select_cuda_workspace", args)
        _check(self._library.cpr_cascade_select_cuda(ctypes.byref(args), _POINTER(workspace.data_ptr()), None))
        assert (workspace[-4096:] == 0xFF).all(), "a write past the workspace"
        return indices, scores

    def mil_nce(
        self, query, own_key, memory, positives=None, query_ids=None, memory_ids=None,
        same_id="positive", self_positive="keep", temperature=0.07,
    ):  # fmt: skip
        """The forward's outputs by name, and `grad_memory` [K, D] of loss.sum(); arguments as for mil_nce."""
        (B, D), K = query.shape, memory.shape[0]
        outputs = {name: torch.full((B,), torch.nan) for name, _ in MilNceOutputs._fields_}
        outputs["grad_query"] = torch.full((B, D), torch.nan)
        modes = self_positive if isinstance(self_positive, torch.Tensor) else None
        args = MilNceArgs(
            *map(_address, (query, own_key, memory, positives, query_ids, memory_ids, modes)),
            B, K, D, 0 if positives is None else positives.shape[1], DTYPES[query.dtype],
            SAME_ID[same_id], 0 if modes is not None else SELF_POSITIVE[self_positive], temperature,
        )  # fmt: skip
        out = MilNceOutputs(*(_address(outputs[name]) for name, _ in MilNceOutputs._fields_))
        workspace = self._workspace("cpr_mil_nce_forward_cuda_workspace", args)
        forward = self._library.cpr_mil_nce_forward_cuda
        _check(forward(ctypes.byref(args), ctypes.byref(out), _POINTER(workspace.data_ptr()), None))
        assert (workspace[-4096:] == 0xFF).all(), "a write past the workspace"
        outputs["grad_memory"] = torch.full((K, D), torch.nan)
        ones = torch.ones(B)
        tensors = (ones, outputs["lse_all"], outputs["lse_positive"], outputs["grad_memory"])
        _check(self._library.cpr_mil_nce_grad_memory_cuda(ctypes.byref(args), *map(_address, tensors), None))
        return outputs

    def tvl1_flow(self, frames: torch.Tensor, settings: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """flow [N, T-1, 2, H, W], pixel-iterations [N, T-1] of frames [N, T, H, W]; every setting of the op by name."""
        N, T, H, W = frames.shape
        flow, counted = torch.full((N, T - 1, 2, H, W), torch.nan), torch.full((N, T - 1), -7)
        pointers = map(_address, (frames, flow, counted))
        args = Tvl1Args(*pointers, N, T, H, W, frames.dtype == torch.uint8, **settings)
        workspace = self._workspace("cpr_tvl1_flow_cuda_workspace", args)
        _check(self._library.cpr_tvl1_flow_cuda(ctypes.byref(args), _POINTER(workspace.data_ptr()), None))
        assert (workspace[-4096:] == 0xFF).all(), "a write past the workspace"
        return flow, counted


def _address(tensor: torch.Tensor | None) -> _POINTER:
    assert tensor is None or tensor.is_contiguous()
    return _POINTER(None if tensor is None else tensor.data_ptr())


def _check(error: bytes | None) -> None:
    if error is not None:
        raise RuntimeError(error.decode())
