"""The optimiser of a cycle: which weights it decays, and its steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cpr_fast.config import OptimConfig
from cpr_fast.errors import InputError
from cpr_fast.pretrain.state.sharding import is_sharded

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def build_optimizer(encoder: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Builds the optimiser of a cycle. Its fused implementation updates all weights in one kernel, also on the CPU.

    Its first group of parameters is decayed by `weight_decay`; a second one, if there is one, is not decayed.

    Raises:
        InputError: `optim.name` is one of apex, which is not installed.
    """
    groups: Any = encoder.parameters() if config.decay_norms_and_biases else _groups(encoder)
    if config.name.startswith("apex_"):
        try:
            from apex.optimizers import FusedLAMB, FusedNovoGrad
        except ImportError as error:
            raise InputError(
                f"optim.name: {config.name!r} expects NVIDIA apex built with its CUDA extensions, got {error}"
            ) from None
        kind = FusedLAMB if config.name == "apex_lamb" else FusedNovoGrad
        return kind(groups, lr=config.lr, weight_decay=config.weight_decay)
    if config.name == "sgd":
        fused = not any(map(is_sharded, encoder.parameters()))  # which torch 2.13 has for Adam only
        return torch.optim.SGD(
            groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=fused
        )
    adam = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return adam(groups, config.lr, config.betas, config.eps, weight_decay=config.weight_decay, fused=True)


def _groups(encoder: nn.Module) -> list[dict[str, Any]]:
    """Returns the parameters that are decayed, and those that are not: of normalisations, biases, and all others of one
    dimension or none."""
    kept: set[int] = set()
    for module in encoder.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim <= 1 or name.endswith("bias") or isinstance(module, _NORMS):
                kept.add(id(parameter))
    parameters = list(encoder.parameters())
    return [
        {"params": [parameter for parameter in parameters if id(parameter) not in kept]},
        {"params": [parameter for parameter in parameters if id(parameter) in kept], "weight_decay": 0.0},
    ]


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Sets the learning rate of the next step, and the weight decay of the weights that are decayed."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.param_groups[0]["weight_decay"] = weight_decay


def take_step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_norm: float) -> Tensor | None:
    """Takes a step with the gradients accumulated so far, and clears them.

    Args:
        clip_norm: the largest norm of all gradients together; 0 for no limit.
    Returns:
        The norm before it was limited, 0-d on the device; None without a limit.
    """
    norm = None
    if clip_norm:
        scaler.unscale_(optimizer)
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = nn.utils.clip_grad_norm_(weights, clip_norm)
        norm = norm.full_tensor() if is_sharded(norm) else norm
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm
