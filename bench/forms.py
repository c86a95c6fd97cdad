"""What both benchmarks compare: a form is one way to compute the same thing, prepared for one set of inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

CPU_SHAPES = [(32, 2048), (32, 16384), (256, 16384), (256, 65536)]  # B, K: those of the record
ALL_SHAPES = [(16, 2048), *CPU_SHAPES, (1024, 65536), (1024, 1_000_000), (4096, 1_000_000)]


class Unavailable(Exception):
    """Why a form cannot run here."""


def peer(module: str, package: str) -> ModuleType:
    """Another library, imported."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a peer may fail in any way where its own requirements are absent
        raise Unavailable(f"`pip install {package}`: {type(error).__name__}: {error}".splitlines()[0]) from error


def need_cuda(device: torch.device, what: str) -> None:
    if device.type != "cuda":
        raise Unavailable(f"{what} runs on CUDA alone")


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()  # each shape is a graph of its own, and the tenth would no longer be compiled
    return torch.compile(function, dynamic=False)


def graphed(call: Callable, device: torch.device) -> Callable:
    """The call as the replay of a CUDA graph, which returns the outputs of its capture."""
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
