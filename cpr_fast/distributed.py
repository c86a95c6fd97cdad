"""One process or many: what a step needs to know about its peers, started by `torchrun`.

Letters: R ranks, B clips per rank. Every function is the identity on one process.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import InputError


@dataclass(frozen=True)
class World:
    """This process among the processes of a run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and draws the bar."""
        return self.rank == 0


def init(device: str) -> World:
    """Joins the processes that `torchrun` started (gloo on the CPU, NCCL on CUDA), or stands alone.

    Args:
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
    """
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"run.device: got {device!r}, but torch finds no CUDA device here; expected 'cpu' or 'auto'")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, torch.device(name))
    target = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if name.startswith("cuda") else torch.device("cpu")
    if target.type == "cuda":
        torch.cuda.set_device(target)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if target.type == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size(), target)


def finish() -> None:
    """Leaves the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_main() -> bool:
    """Whether this is the first process of the run."""
    return not dist.is_initialized() or dist.get_rank() == 0


def all_gather(local: Tensor) -> Tensor:
    """[B, ...] of every rank -> [R*B, ...] in rank order, without gradient."""
    if not dist.is_initialized():
        return local
    local = local.contiguous()
    everyone = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, local)
    return torch.cat(everyone)


def union(local: Iterable[Hashable]) -> set[Hashable]:
    """The distinct items of all ranks."""
    if not dist.is_initialized():
        return set(local)
    everyone: list[set[Hashable]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everyone, set(local))
    return set().union(*everyone)


def mean_(tensors: list[Tensor]) -> None:
    """Replaces each float tensor by its mean over the ranks."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()
