"""Encoders whose weights, gradients and optimiser states are divided among the processes (FSDP2), for networks that do
not fit on one device [ZeRO, Rajbhandari et al. 2020, stage 3; torch.distributed.fsdp.fully_shard].

Every process holds a part, a *shard*, of each tensor: a DTensor divided along its first dimension. The tensors of a
block are gathered before the block computes and freed afterwards. Checkpoints hold whole tensors, so that they can be
read without sharding and by any number of processes. Of tensors that are not sharded the functions here return what the
same code did without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cpr_fast.errors import InputError
from cpr_fast.models import Encoder, named_blocks, statistics_layers
from cpr_fast.runtime.distributed import World
from cpr_fast.wording import counted


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether a tensor is a DTensor, without importing torch.distributed.tensor, which takes .7 s."""
    return hasattr(tensor, "to_local")


def shard(encoder: Encoder, world: World) -> Encoder:
    """Divides the weights of every block of an encoder, and of what is outside the blocks, among all processes, and
    moves them to the device of each.

    Args:
        encoder: has all of its weights, the same in every process, on the CPU. It is changed in place.
    Raises:
        InputError: the encoder has BatchNorm, whose groups run a network several times per backward pass.
    """
    if layers := statistics_layers(encoder):
        raise InputError(
            "run.shard: expected a network without BatchNorm, such as model.arch = 'vit', got one with "
            f"{counted(len(layers), 'layer')} with running statistics"
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    blocks = [block for _, block in named_blocks(encoder.backbone) if any(True for _ in block.parameters())]
    # reshard_after_forward: without it the root stays whole after a forward pass that no backward pass follows, and the
    # next pass would use these weights instead of the updated ones.
    for module in [*blocks, encoder]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    if not any(weight.requires_grad for weight in encoder.parameters()):
        encoder.register_forward_hook(_forget_passes)
    return encoder.to(world.device)


def _forget_passes(encoder: nn.Module, args: Any, features: Any) -> None:
    """Clears the order of forward passes that torch records for prefetching in the backward pass, and clears only after
    one: in a frozen encoder it would grow with every step."""
    from torch.distributed.fsdp import FSDPModule

    for module in encoder.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # the latter in torch 2.10
            for group in groups:
                group._post_forward_indices.clear()
                group.comm_ctx.post_forward_order.clear()


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns this process's part of each tensor, which shares its memory."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]


def whole(value: Any) -> Any:
    """Returns nested dicts with the whole of each sharded tensor, on the CPU; the same object if there is none. All
    processes call it together."""
    if isinstance(value, dict):
        items = {name: whole(item) for name, item in value.items()}
        return value if all(items[name] is item for name, item in value.items()) else items
    return value.full_tensor().cpu() if isinstance(value, Tensor) and is_sharded(value) else value


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns a whole tensor as a sharded one, divided like `like` and on its device; without communication. If `like`
    is not sharded, returns the tensor unchanged."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def load_network(network: nn.Module, state: dict[str, Tensor]) -> None:
    """Restores a state dict of whole tensors."""
    own = network.state_dict()
    network.load_state_dict({name: part_of(tensor, own[name]) if name in own else tensor
                             for name, tensor in state.items()})  # fmt: skip


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restores the state dict of an optimiser, with whole tensors. How it is computed (`fused`) stays as it is."""
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    weights = dict(
        zip(numbers, (weight for group in optimizer.param_groups for weight in group["params"]), strict=False)
    )

    def part(value: Any, weight: Tensor) -> Any:
        return part_of(value, weight) if isinstance(value, Tensor) and value.shape == weight.shape else value

    parts = {
        number: {name: part(value, weights[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    groups = [
        {**saved, **{name: own[name] for name in ("fused", "foreach") if name in own}}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({"state": parts, "param_groups": groups})


def sum_of_shards(values: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Returns the values [W] of W tensors, where each process has computed that of its part of the sharded ones and the
    values of parts add up. All processes call it together if there are any."""
    divided = [is_sharded(tensor) for tensor in tensors]
    if not any(divided):
        return values
    total = values.clone()
    dist.all_reduce(total)
    return torch.where(torch.tensor(divided, device=values.device), total, values)
