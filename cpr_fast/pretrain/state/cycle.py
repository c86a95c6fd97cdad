"""The state of one co-training cycle: created when the cycle starts, and saved in checkpoints so that it can be
resumed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpr_fast.config import Config, Cycle, View
from cpr_fast.config.checks import batch_norm_groups
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError
from cpr_fast.mining.auto import Choice, choose
from cpr_fast.mining.quality import MiningQuality
from cpr_fast.mining.stages import STAGES
from cpr_fast.models import Encoder, build_encoder
from cpr_fast.ops import Shard
from cpr_fast.pretrain.state import sharding
from cpr_fast.pretrain.state.cascade import Cascade, rate_names
from cpr_fast.pretrain.state.encoders import Encoders
from cpr_fast.pretrain.state.health import Health
from cpr_fast.pretrain.state.memory import Bank, Memory
from cpr_fast.pretrain.state.optimizer import build_optimizer, set_rates, take_step
from cpr_fast.pretrain.state.schedule import Rates
from cpr_fast.runtime import distributed
from cpr_fast.runtime.distributed import World
from cpr_fast.runtime.precision import autocast
from cpr_fast.wording import counted

_VIEWS: tuple[View, ...] = ("rgb", "flow", "residual")


class CycleState:
    """Encoders, a memory without keys, a new optimiser, and running sums of the current epoch.

    Args:
        config: the config of the run.
        cycle: the cycle that starts.
        weights: {view: state_dict} of the encoders trained so far; other views start from random weights.
        index: the training videos.
    Raises:
        InputError: settings of the cycle do not fit the videos or the number of processes.
    """

    def __init__(
        self, config: Config, cycle: Cycle, weights: dict[str, dict[str, Tensor]], index: Index, world: World
    ) -> None:
        self.config, self.cycle, self.world = config, cycle, world
        self.top_k = config.mining.top_k if cycle.top_k is None else cycle.top_k
        self.anchor = config.mining.anchor or ("query" if config.loss.protocol == "coclr" else "key")
        self.views = cycle.views(shared=config.model.shared)
        if cycle.mining == "label" and (index.labels < 0).any():
            raise InputError("schedule.cycles: mining = 'label' expects every video of the index to have a label")
        clips = config.data.batch_size * world.size  # keys per step
        if config.memory.kind == "queue" and config.memory.size < clips:
            raise InputError(
                f"memory.size: expected at least the {counted(clips, 'key')} of a step, "
                f"data.batch_size x {counted(world.size, 'process', 'processes')}, "
                f"got {config.memory.size}"
            )
        self.encoders = _build_encoders(config, cycle, self.views, weights, clips, world)
        self.memory = _build_memory(config, cycle, self.views, len(index), clips, world)
        self.chooses = cycle.mining == "cascade" and config.mining.stages == "auto"
        # For queries of view 0 and 1; none before `choose_cascade`.
        self.cascades = [] if self.chooses or cycle.mining != "cascade" else [self._cascade(own) for own in (0, 1)]
        self.optimizer = build_optimizer(self.encoders.query, cycle.applied_to(config.optim))
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.optim.precision == "fp16")
        self.quality = MiningQuality(
            index.labels,
            index.source_ids,
            top_k=self.top_k,
            extra=rate_names(max(STAGES) if config.mining.stages == "auto" else config.mining.stages),
            device=world.device,
        )
        self.health = Health(
            self.views if config.model.shared else self.views[:1],
            self.memory,
            len(index),
            drifts=config.memory.kind == "queue",
        )
        self.grad_norm: Tensor | None = None  # of the newest optimiser step, 0-d; only with optim.clip_norm
        self.loss_sum = torch.zeros(2, dtype=torch.float64, device=world.device)  # epoch sums: loss, optimiser steps
        self.best: dict[str, Any] | None = None  # best online measurement: its epoch and its "r@1" or "score"
        self.weight_norms = self._weight_norms()  # at the start of the epoch

    @property
    def learning(self) -> bool:
        """Whether a step trains the encoder: always, unless the cycle waits for its queue."""
        return self.memory.full or not self.cycle.waits_for_queue(self.config.memory)

    @property
    def mined_count(self) -> int:
        """The number of entries that the cascade mines for a query; before it is chosen, the largest number."""
        return self.cascades[0].keep[-1] if self.cascades else self.top_k

    def must_choose(self, step_in_epoch: int) -> bool:
        """Returns whether `choose_cascade` is due before a step: with mining.stages = "auto" before the first step that
        mines and before the first step of every later epoch."""
        return self.chooses and self.memory.full and (not self.cascades or step_in_epoch == 0)

    def choose_cascade(self) -> Choice:
        """Chooses the cascade for the present memory, which is the same on every rank. Waits for the device."""
        choice = distributed.from_main(lambda: choose(self.memory.features[:2], self.memory.source, self.top_k))
        self.cascades = [Cascade(choice.views, choice.keep)] * 2
        return choice

    def autocast(self) -> torch.autocast:
        """Returns the autocast context of the forward passes."""
        return autocast(self.world.device, self.config.optim.precision)

    def _cascade(self, own: int) -> Cascade:
        """Returns the stages for queries of view `own`."""
        if self.top_k > self.memory.size:
            raise InputError(
                f"top_k: expected at most the {counted(self.memory.size, 'entry', 'entries')} of a "
                f"{self.config.memory.kind}, "
                f"got {self.top_k}"
            )
        return Cascade.of(self.config, self.memory.size, self.top_k, own)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to the gradients of the query encoder."""
        self.scaler.scale(loss).backward()

    def optimise(self) -> None:
        """Takes one optimiser step on the query encoder with the gradients accumulated so far, and clears them."""
        self.grad_norm = take_step(self.optimizer, self.scaler, self.config.optim.clip_norm)

    def trained(self) -> dict[str, dict[str, Tensor]]:
        """Returns {view: state_dict} of the encoder that the cycle trains; a shared one is listed once per view. All
        processes call it together."""
        views = self.views if self.config.model.shared else self.views[:1]
        return dict.fromkeys(views, sharding.whole(self.encoders.query.state_dict()))

    def _weight_norms(self) -> Tensor:
        """Returns the norm of each weight tensor of the query encoder, [W] float64."""
        weights = [weight.detach() for weight in self.encoders.query.parameters()]
        norms = torch.stack(torch._foreach_norm(sharding.local(weights))).double()
        return sharding.sum_of_shards(norms.square(), weights).sqrt() if self.encoders.sharded else norms

    def weights_change(self) -> float:
        """Returns the relative change of the norms of the weights in the epoch; 0 if no weight changed.

        Waits for the device.
        """
        return ((self._weight_norms() - self.weight_norms).norm() / self.weight_norms.norm()).item()

    def set_rates(self, rates: Rates) -> None:
        """Sets the learning rate, the weight decay and the momentum of the key encoder for the next step."""
        set_rates(self.optimizer, rates.lr, rates.weight_decay)
        if self.encoders.momentum is not None:
            self.encoders.momentum = rates.ema_momentum

    def start_epoch(self) -> None:
        """Resets the running sums."""
        self.loss_sum.zero_()
        self.quality.reset()
        self.health.start_epoch()
        self.weight_norms = self._weight_norms()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state without the query encoder, which a checkpoint holds among the weights of the views. All
        processes call it together."""
        return {
            "key": sharding.whole(self.encoders.key.state_dict()),
            "memory": self.memory.state_dict(),
            "optimizer": sharding.whole(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "loss_sum": self.loss_sum,
            "quality": self.quality.state_dict(),
            "health": self.health.state_dict(),
            "best": self.best,
            "weight_norms": self.weight_norms,
            **({"cascade": self.cascades and vars(self.cascades[0])} if self.chooses else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a `state_dict`."""
        sharding.load_network(self.encoders.key, state["key"])
        self.memory.load_state_dict(state["memory"])
        sharding.load_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.loss_sum.copy_(state["loss_sum"])
        self.quality.load_state_dict(state["quality"])
        if "health" in state:  # older checkpoints have none
            self.health.load_state_dict(state["health"])
        self.best = state.get("best")
        if "weight_norms" in state:
            self.weight_norms.copy_(state["weight_norms"])
        if self.chooses and state["cascade"]:
            self.cascades = [Cascade(tuple(state["cascade"]["views"]), tuple(state["cascade"]["keep"]))] * 2


def has_key_encoder(config: Config) -> bool:
    """Returns whether a moving average of the query encoder computes the keys, instead of the query encoder itself."""
    return not config.model.shared and config.memory.kind != "batch"


def _build_encoders(
    config: Config,
    cycle: Cycle,
    views: tuple[View, ...],
    weights: dict[str, dict[str, Tensor]],
    clips: int,
    world: World,
) -> Encoders:
    """Builds the encoders of a cycle; `clips` is the number of videos per step, over all processes.

    Raises:
        InputError: see `build_encoder`; or the network has no parameters that can be trained.
    """
    model, memory, parts = config.model, config.memory, config.optim.accumulate
    query = initial_encoder(config, views[0], weights)
    if not any(weight.requires_grad for weight in query.backbone.parameters()):
        count = sum(1 for _ in query.backbone.parameters())
        raise InputError(
            f"model.arch {model.arch!r}: expected a network with parameters to train, got "
            f"{counted(count, 'parameter')}{', all with requires_grad = False' if count else ''}"
        )
    return Encoders(
        query,
        initial_encoder(config, views[1], weights) if len(views) > 1 and not model.shared else None,
        momentum=cycle.applied_to(memory).ema_momentum if has_key_encoder(config) else None,
        groups=batch_norm_groups(memory.shuffle_bn_groups, clips, world.size, parts),
        seed=config.run.seed,
        world=world,
        parts=parts,
        views=len(views) if model.shared else 1,
        recompute=model.recompute,
        compile=config.run.compile,
        shard=config.run.shard,
    )


def _build_memory(
    config: Config, cycle: Cycle, views: tuple[View, ...], videos: int, clips: int, world: World
) -> Memory:
    """Builds a memory without keys. A bank holds intra-negatives as a third "view"."""
    width, memory, device = config.model.feature_dim, config.memory, world.device
    if memory.kind == "bank":
        further = config.loss.intra_negatives != "none"
        return Bank(len(views) + further, videos, width, momentum=memory.bank_momentum, device=device)
    if memory.kind == "batch":
        return Memory(len(views), 2 * clips, width, device=device)
    seed = None if cycle.waits_for_queue(memory) else config.run.seed
    return Memory(len(views), memory.size, width, seed=seed, shard=_shard_of(config, world), device=device)


def _shard_of(config: Config, world: World) -> Shard | None:
    """Returns the slots whose features this process holds, None for all. Raises InputError for a queue that is too
    small to be divided."""
    if not config.memory.shard or world.size == 1:
        return None
    try:
        return Shard(config.memory.size, world.rank, world.size)
    except ValueError as error:
        raise InputError(f"memory.shard: {error}") from None


def initial_encoder(config: Config, view: View, weights: dict[str, dict[str, Tensor]]) -> Encoder:
    """Builds the encoder of `view` with its latest weights, or with random ones that depend on seed and view."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed * len(_VIEWS) + _VIEWS.index(view))
        encoder = build_encoder(config.model, config.data)
    if view in weights:
        encoder.load_state_dict(weights[view])
    return encoder
