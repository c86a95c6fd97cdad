"""The state of one co-training cycle: what starts anew with it, and what a checkpoint must hold to go on within it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config, Cycle, OptimConfig, View
from ..data.index import Index
from ..distributed import World
from ..errors import InputError
from ..evaluate.mining_quality import MiningQuality
from ..models import Encoder, build_encoder
from .encoders import Encoders, batch_norm_groups
from .memory import Memory
from .mining import rate_names

_VIEWS: tuple[View, ...] = ("rgb", "flow")
_AUTOCAST_DTYPE = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class CycleState:
    """Encoders, an empty memory, a new optimiser, and the sums of the epoch under way.

    Args:
        config: of the run.
        cycle: the cycle that starts.
        weights: {view: state_dict} of the encoders trained so far; a view that is missing starts at random.
        index: the training videos.
    """

    def __init__(
        self, config: Config, cycle: Cycle, weights: dict[str, dict[str, Tensor]], index: Index, world: World
    ) -> None:
        self.config, self.cycle, self.world = config, cycle, world
        self.top_k = config.mining.top_k if cycle.top_k is None else cycle.top_k
        self.views = views_of(cycle)
        if cycle.mining == "label" and (index.labels < 0).any():
            raise InputError("schedule.cycles: mining = 'label' expects every video of the index to have a label")
        clips = config.data.batch_size * world.size  # keys of a step
        if config.memory.size < clips:
            raise InputError(
                f"memory.size: expected at least the {clips} keys of a step, data.batch_size x {world.size} processes, "
                f"got {config.memory.size}"
            )
        encoders = [initial_encoder(config, view, weights) for view in self.views]
        self.encoders = Encoders(
            encoders[0],
            encoders[1] if len(encoders) > 1 else None,
            momentum=config.memory.ema_momentum,
            groups=batch_norm_groups(config.memory.shuffle_bn_groups, clips, world.size),
            seed=config.run.seed,
            world=world,
        )
        self.memory = Memory(len(self.views), config.memory.size, config.model.feature_dim, device=world.device)
        self.optimizer = build_optimizer(self.encoders.query.parameters(), config.optim)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.optim.precision == "fp16")
        self.quality = MiningQuality(
            index.labels,
            index.source_ids,
            top_k=self.top_k,
            extra=rate_names(config.mining.stages),
            device=world.device,
        )
        self.loss_sum = torch.zeros(2, dtype=torch.float64, device=world.device)  # of the epoch: loss, optimiser steps

    def autocast(self) -> torch.autocast:
        """The precision of the forward passes."""
        dtype = _AUTOCAST_DTYPE[self.config.optim.precision]
        return torch.autocast(self.world.device.type, dtype, enabled=dtype is not None)

    def optimise(self, loss: Tensor) -> None:
        """One optimiser step on the query encoder."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def set_learning_rate(self, lr: float) -> None:
        """Takes effect with the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def start_epoch(self) -> None:
        """Forgets the sums of the last epoch."""
        self.loss_sum.zero_()
        self.quality.reset()

    def state_dict(self) -> dict[str, Any]:
        """Everything but the query encoder, which a checkpoint holds among the weights of the views."""
        return {
            "key": self.encoders.key.state_dict(),
            "memory": self.memory.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "loss_sum": self.loss_sum,
            "quality": self.quality.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`."""
        self.encoders.key.load_state_dict(state["key"])
        self.memory.load_state_dict(state["memory"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.loss_sum.copy_(state["loss_sum"])
        self.quality.load_state_dict(state["quality"])


def views_of(cycle: Cycle) -> tuple[View, ...]:
    """The views a cycle decodes, its own first: only mining by the cascade looks at the other one."""
    if cycle.mining != "cascade":
        return (cycle.view,)
    return (cycle.view, *(view for view in _VIEWS if view != cycle.view))


def initial_encoder(config: Config, view: View, weights: dict[str, dict[str, Tensor]]) -> Encoder:
    """The encoder a cycle starts `view` from: its latest weights, else random ones that depend on seed and view."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed * len(_VIEWS) + _VIEWS.index(view))
        encoder = build_encoder(config.model)
    if view in weights:
        encoder.load_state_dict(weights[view])
    return encoder


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser of a cycle, in its fused form: one kernel over all weights, on the CPU too."""
    if config.name == "sgd":
        return torch.optim.SGD(
            parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
        )
    return torch.optim.Adam(parameters, config.lr, weight_decay=config.weight_decay, fused=True)
