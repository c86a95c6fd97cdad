"""Communication between the processes of a run, which `torchrun` starts.

Shapes: R is the number of processes (ranks), B the number of clips per process. In a run of one process, every function
returns its input unchanged.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cpr_fast.errors import InputError
from cpr_fast.wording import counted

T = TypeVar("T")

_store: dist.Store | None = None  # the store of the process group that `init` joined


@dataclass(frozen=True)
class World:
    """This process among the processes of a run."""

    rank: int
    size: int
    device: torch.device
    store: dist.Store | None = None  # through which the processes found each other; None in a run of one process

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and reports the progress."""
        return self.rank == 0


def init(device: str) -> World:
    """Joins the process group that `torchrun` started, on one machine or several; without torchrun, there is none.

    Tensors on the CPU are communicated with gloo, tensors on CUDA with NCCL.

    Args:
        device: "auto" (CUDA if it is available), "cpu", "cuda" or "cuda:N".

    Raises InputError if torch finds no such device.
    """
    where = device_of(device, "run.device")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, where)
    target = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if where.type == "cuda" else where
    if target.type == "cuda":
        torch.cuda.set_device(target)
    global _store
    if not dist.is_initialized():
        store, rank, size = next(dist.rendezvous("env://"))
        # torchrun keeps its store when it restarts workers. Without a prefix, a process may read the address of a
        # worker that has ended.
        _store = dist.PrefixStore(f"attempt{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        backend = "cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.PrefixStore("group", _store), rank=rank, world_size=size)
    return World(dist.get_rank(), dist.get_world_size(), target, _store)


def device_of(name: str, option: str = "device") -> torch.device:
    """Returns the device of a name: "auto" (CUDA if it is available), "cpu", "cuda" or "cuda:N".

    Raises InputError that names the option if torch finds no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"{option}: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"{option}: got {name!r}, but torch finds no CUDA device here; expected 'cpu' or 'auto'")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise InputError(f"{option}: got {name!r}, but torch finds {counted(count, 'CUDA device')} here")
    return device


def finish() -> None:
    """Destroys the process group if there is one, and what a run left behind in reference cycles.

    Sharded tensors in such cycles keep the group alive, and the process may then abort while the interpreter shuts
    down.
    """
    global _store
    if dist.is_initialized():
        gc.collect()
        dist.destroy_process_group()
        _store = None
        gc.collect()


def size() -> int:
    """Returns the number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Returns the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Returns whether this is the first process of the run."""
    return rank() == 0


def all_gather(local: Tensor) -> Tensor:
    """Gathers a tensor [B, ...] from every rank into [R*B, ...], in rank order, without gradients."""
    if not dist.is_initialized():
        return local
    local = local.contiguous()
    everyone = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, local)
    return torch.cat(everyone)


class _AllGather(torch.autograd.Function):
    """`all_gather` with gradients: each rank receives the sum of all ranks' gradients for its part."""

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
    """Gathers like `all_gather`; the gradient of `local` is the sum of the gradients of all ranks' losses."""
    return _AllGather.apply(local) if dist.is_initialized() else local


def share(items: Sequence[T]) -> Sequence[T]:
    """Returns this rank's share of a sequence that all ranks hold: every R-th item, starting at the index of this
    rank."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def gather_objects(local: T) -> list[T]:
    """Gathers an object from every rank, in rank order. Objects are pickled, so their tensors should be on the CPU."""
    if not dist.is_initialized():
        return [local]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, local)
    return everyone


def from_main(compute: Callable[[], T]) -> T:
    """Calls `compute` in the first process and returns its result on every rank; see `gather_objects`."""
    if not dist.is_initialized():
        return compute()
    objects = [compute() if is_main() else None]
    dist.broadcast_object_list(objects)
    return objects[0]


def union(local: Iterable[Hashable]) -> set[Hashable]:
    """Returns the set of the items of all ranks."""
    return set().union(*gather_objects(set(local)))


def largest(local: int) -> int:
    """Returns the largest of all ranks' numbers, so that all ranks make the same decision at the same step.

    The number is communicated on the CPU: the call waits for the other ranks, but not for the work that is queued on
    the devices.
    """
    if not dist.is_initialized():
        return local
    number = torch.tensor(int(local))
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def mean_(tensors: list[Tensor]) -> None:
    """Replaces each tensor by its mean over all ranks, in place and with a single all-reduce.

    All tensors have the same floating-point dtype and device.
    """
    if not dist.is_initialized() or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([tensor.numel() for tensor in tensors])
    torch._foreach_copy_(tensors, [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def sum_(tensor: Tensor) -> Tensor:
    """Replaces a tensor by its sum over all ranks, in place, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def largest_(tensor: Tensor) -> Tensor:
    """Replaces a tensor by the elementwise maximum over all ranks, in place, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def joined_on_main(local: Tensor, dim: int) -> Tensor | None:
    """Returns the tensors of all ranks, joined along `dim` in rank order, on the CPU of the first process; None on the
    others. Their sizes along `dim` may differ. At most two of them are in the memory of the first process, besides the
    result."""
    if not dist.is_initialized():
        return local.cpu()
    lengths = gather_objects(local.shape[dim])
    if not is_main():
        dist.send(local.cpu().contiguous(), 0)
        return None
    shape = list(local.shape)
    shape[dim] = sum(lengths)
    joined = torch.empty(shape, dtype=local.dtype)
    for sender, part in enumerate(joined.split(lengths, dim)):
        if sender == 0:
            part.copy_(local)
            continue
        received = torch.empty_like(part, memory_format=torch.contiguous_format)
        dist.recv(received, sender)
        part.copy_(received)
    return joined


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """Returns the states of torch's random generators of every rank, [R, bytes] uint8.

    The keys are "cpu" and, if `device` is a CUDA device, "cuda".
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: all_gather(state[None]) for name, state in states.items()}


def set_rng_states(device: torch.device, states: dict[str, Tensor] | None) -> None:
    """Sets the random generators to `rng_states`, unless it is None or comes from another number of processes."""
    if states is None or len(states["cpu"]) != size():
        return
    own = rank()
    # clone(), because torch 2.13 ignores the storage offset of a view here, and crashes.
    torch.set_rng_state(states["cpu"][own].cpu().clone())
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"][own].cpu().clone(), device)
