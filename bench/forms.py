"""Forms: the different ways to compute the same result that the benchmarks of the kernels compare.

A form is prepared for one set of inputs and returns a function without arguments, which is timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from measure import force_variant

from cpr_fast import _host

CPU_SHAPES = [(32, 2048), (32, 16384), (256, 16384), (256, 65536)]  # (B, K) of the recorded results
ALL_SHAPES = [(16, 2048), *CPU_SHAPES, (1024, 65536), (1024, 1_000_000), (4096, 1_000_000)]


class Unavailable(Exception):
    """A form cannot run here; the message says why."""


def peer(module: str, package: str) -> ModuleType:
    """Imports another library. Raises Unavailable with the command that installs it."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # an import can fail in any way if requirements of the library are missing
        raise Unavailable(f"`pip install {package}`: {type(error).__name__}: {error}".splitlines()[0]) from error


def need_cuda(device: torch.device, what: str) -> None:
    if device.type != "cuda":
        raise Unavailable(f"{what} runs on CUDA only")


def in_variant(name: str, call: Callable, device: torch.device, pairs: int) -> Callable:
    """Returns a function that computes `call` with a variant of the CPU kernels, for `pairs` pairs of a query and an
    entry. Raises Unavailable on CUDA, and for what would not be worth its time."""
    if device.type == "cuda":
        raise Unavailable(f"{name} is a CPU variant")
    if name == _host.build_info()["cpu_variant"]:
        raise Unavailable(f"cpr_fast uses {name} here")
    if name == "portable" and pairs > 2**17:
        raise Unavailable("the portable variant is timed at the smallest shape only")

    def forced():
        force_variant(name)
        try:
            return call()
        finally:
            force_variant(None)

    return forced


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()  # each shape compiles a graph, and torch.compile gives up after a number of them
    return torch.compile(function, dynamic=False)


def graphed(call: Callable, device: torch.device) -> Callable:
    """Captures the call in a CUDA graph. Returns a function that replays it and returns its outputs."""
    need_cuda(device, "a CUDA graph")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay():
        graph.replay()
        return outputs

    return replay
