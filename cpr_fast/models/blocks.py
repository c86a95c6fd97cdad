"""The parts of a backbone in order, which activation checkpointing and learning rates by layer treat one by one, and
the layers with running statistics."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def named_blocks(backbone: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yields the blocks of a backbone with their names, in order.

    They are its children. A child is replaced by its own blocks if it only holds others: if it is an only child, or has
    no number in its name and is a list of modules or the frame of a single one. A sequence of plain layers, such as a
    convolution and its BatchNorm, is one block.
    """
    children = list(backbone.named_children())
    for name, child in children:
        alone = len(children) == 1 and any(True for _ in child.children())
        if alone or (not re.search(r"\d", name) and _only_holds_others(child)):
            yield from named_blocks(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def _only_holds_others(module: nn.Module) -> bool:
    children = list(module.children())
    if isinstance(module, nn.Sequential):
        return any(True for child in children for _ in child.children())
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return True
    return len(children) == 1 and not list(module.parameters(recurse=False))


def backbone_layers(backbone: nn.Module) -> list[list[nn.Parameter]]:
    """Returns the parameters of a backbone that are trained, by layer, in order from the input to the output.

    Children with the same number in their names, such as `conv3a` and `bn3a`, form one layer. Parameters that belong to
    no block, such as a class token, are in the first layer; shared ones are in the first of their layers.
    """
    layers: dict[str, list[nn.Parameter]] = {}
    for name, block in named_blocks(backbone):
        number = re.search(r"\d\w*$", name) if "." not in name else None
        layers.setdefault(number[0] if number else name, []).extend(block.parameters())
    held = [parameters for parameters in layers.values() if parameters] or [[]]
    within = {id(parameter) for parameters in held for parameter in parameters}
    held[0] = [p for p in backbone.parameters() if id(p) not in within] + held[0]
    seen: set[int] = set()
    for i, parameters in enumerate(held):
        held[i] = [p for p in dict.fromkeys(parameters) if p.requires_grad and id(p) not in seen]
        seen.update(map(id, held[i]))
    return [parameters for parameters in held if parameters]


def statistics_layers(network: nn.Module) -> list[_NormBase]:
    """Returns the layers of a network that keep a running mean and variance: BatchNorm, and InstanceNorm if it is told
    to."""
    return [m for m in network.modules() if isinstance(m, _NormBase) and m.running_mean is not None]


def running_statistics(network: nn.Module) -> list[Tensor]:
    """Returns the running means and variances of a network, without their batch counters."""
    # .data: autograd saves these buffers, although the backward pass does not read them in training mode. Without it,
    # a write to them between two forward passes would raise an error.
    return [buffer.data for layer in statistics_layers(network) for buffer in (layer.running_mean, layer.running_var)]
