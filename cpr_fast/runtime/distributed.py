"""One process or many: what a step needs to know about its peers, started by `torchrun`.

Letters: R ranks, B clips per rank. Every function is the identity on one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cpr_fast.errors import InputError

T = TypeVar("T")

_store: dist.Store | None = None  # of the group that `init` joined


@dataclass(frozen=True)
class World:
    """This process among the processes of a run."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store | None = None  # what the processes told each other their addresses by; None on one process

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and draws the bar."""
        return self.rank == 0


def init(device: str) -> World:
    """Joins the processes that `torchrun` started, on one machine or several, or stands alone.

    Tensors on the CPU travel by gloo, those on CUDA by NCCL.

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
    global _store
    if not dist.is_initialized():
        store, rank, size = next(dist.rendezvous("env://"))
        # torchrun keeps its store over restarts: without a prefix a process may find the address of one that is dead.
        _store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore("group", _store), rank=rank, world_size=size)
    return World(dist.get_rank(), dist.get_world_size(), target, _store)


def finish() -> None:
    """Leaves the process group, if one was joined."""
    global _store
    if dist.is_initialized():
        dist.destroy_process_group()
        _store = None


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


class _AllGather(torch.autograd.Function):
    """`all_gather` whose gradient is the sum of what every rank's loss says of this rank's part."""

    @staticmethod
    def forward(context, local: Tensor) -> Tensor:
        context.rows = len(local)
        return all_gather(local)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.split(context.rows)[dist.get_rank()]


def all_gather_with_gradient(local: Tensor) -> Tensor:
    """[B, ...] of every rank -> [R*B, ...] in rank order; the gradient comes back from every rank's loss, summed."""
    return _AllGather.apply(local) if dist.is_initialized() else local


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's share of what all ranks hold: every R-th item."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def gather_objects(local: T) -> list[T]:
    """Every rank's object, in rank order; it travels pickled, so its tensors should be on the CPU."""
    if not dist.is_initialized():
        return [local]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, local)
    return everyone


def from_main(compute: Callable[[], T]) -> T:
    """What the first process computes, on every rank; it travels as in `gather_objects`."""
    if not dist.is_initialized():
        return compute()
    objects = [compute() if is_main() else None]
    dist.broadcast_object_list(objects)
    return objects[0]


def union(local: Iterable[Hashable]) -> set[Hashable]:
    """The distinct items of all ranks."""
    return set().union(*gather_objects(set(local)))


def largest(local: int) -> int:
    """The largest of all ranks' numbers: a decision that all take at the same step. Waits for the ranks' host programs,
    not for their devices."""
    if not dist.is_initialized():
        return local
    number = torch.tensor(int(local))
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def sum_(tensor: Tensor) -> None:
    """Replaces a tensor by its sum over the ranks."""
    if dist.is_initialized():
        dist.all_reduce(tensor)


def mean_(tensors: list[Tensor]) -> None:
    """Replaces each tensor, all of one float dtype and device, by its mean over the ranks: one message for all."""
    if not dist.is_initialized():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """torch's generators of every rank, [R, bytes] uint8 for the CPU and, where it is one, for the CUDA device."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: all_gather(state[None]) for name, state in states.items()}


def set_rng_states(device: torch.device, states: dict[str, Tensor] | None) -> None:
    """Goes on from `rng_states`, unless it is None or of another number of processes."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if states is None or len(states["cpu"]) != size:
        return
    # Copies: torch 2.13 reads a view's storage from its start, whatever its offset (and crashes).
    torch.set_rng_state(states["cpu"][rank].cpu().clone())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"][rank].cpu().clone(), device)
