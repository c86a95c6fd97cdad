"""Functions that run in several processes of a gloo group on this machine.

The processes are forked from a server that has loaded torch once.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_server = multiprocessing.get_context("forkserver")
# DistributedDataParallel imports torch._dynamo.
_server.set_forkserver_preload(["torch", "torch._dynamo", "cpr_fast.ops", "cpr_fast.pretrain.run.loop"])


def _run(target: Callable, rank: int, processes: int, folder: Path, arguments: tuple) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
    store = dist.FileStore(str(folder / f"store-{processes}"), processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    torch.save(target(rank, processes, *arguments), folder / f"{processes}-{rank}.pt")
    dist.destroy_process_group()


def on_processes(target: Callable, processes: int, folder: Path, *arguments: Any) -> list[Any]:
    """Returns what target(rank, processes, *arguments) returns in each process, tensors in containers; `target` is a
    function of a module."""
    started = [
        _server.Process(target=_run, args=(target, rank, processes, folder, arguments)) for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
    assert [process.exitcode for process in started] == [0] * processes
    return [torch.load(folder / f"{processes}-{rank}.pt") for rank in range(processes)]
