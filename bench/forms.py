"""Forms: the different ways to compute the same result that the benchmarks of the kernels compare.

A form is prepared for one set of inputs and returns a function without arguments, which is timed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

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
