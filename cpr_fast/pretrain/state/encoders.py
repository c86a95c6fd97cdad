"""The encoders of a cycle: the query's, its moving average for the keys, and the frozen one of the other view.

Letters: B clips per rank, R ranks, G groups, V views, D feature width.

BatchNorm sees one of G groups of B*R/G clips at a time: the published runs use one group per GPU, and G groups on one
GPU compute the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from cpr_fast.errors import InputError
from cpr_fast.models import Encoder, running_statistics
from cpr_fast.pretrain.state.schedule import generator, on_device
from cpr_fast.runtime import distributed
from cpr_fast.runtime.distributed import World

SHUFFLE_STREAM = 1  # of `schedule.generator`


def batch_norm_groups(groups: int | None, clips: int, processes: int, parts: int = 1) -> int:
    """G for steps of `clips` clips (all processes together), which each process takes in `parts`: `groups`, or one for
    each of those parts where it is None.

    Raises InputError if the groups would not be equal divisions of every part.
    """
    if groups is None:
        groups = processes * parts
    if groups % (processes * parts):
        of_each = f" x {parts} parts of a step (optim.accumulate)" if parts > 1 else ""
        raise InputError(
            f"memory.shuffle_bn_groups: expected a multiple of the {processes} processes{of_each}, got {groups}"
        )
    if clips % groups:
        raise InputError(f"memory.shuffle_bn_groups: expected a divisor of the {clips} clips of a step, got {groups}")
    return groups


class GroupedEncoder(nn.Module):
    """Runs an encoder over `groups` equal parts of the batch: [B, 3, T, H, W] -> [B, D].

    In training mode the running statistics become the mean of what each group alone would have left: they are linear
    in the batches', so the mean over ranks holding one group each gives the same.
    """

    def __init__(self, encoder: Encoder, groups: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.groups = groups

    def forward(self, clips: Tensor) -> Tensor:
        if self.groups == 1:
            return self.encoder(clips)
        parts = _statistics_apart(self.encoder, clips.chunk(self.groups))
        return torch.cat([self.encoder(part) for part in parts])


def _statistics_apart(encoder: nn.Module, parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """`parts`, for one forward each: all start from the same running statistics, whose mean is left at the end."""
    running = running_statistics(encoder)
    before = [tensor.clone() for tensor in running]
    total = [torch.zeros_like(tensor) for tensor in running]
    for part in parts:
        torch._foreach_copy_(running, before)
        yield part
        torch._foreach_add_(total, running)
    torch._foreach_mul_(total, 1 / len(parts))
    torch._foreach_copy_(running, total)


class Encoders:
    """Query encoder (learns), key encoder (moving average of it), frozen encoder of the other view (if mining).

    Args:
        query: encoder of the view that learns; trained in place.
        other: encoder of the other view, frozen in eval mode; None where the cycle does not look at it.
        momentum: share of the old key weights kept by an update; None: the query encoder makes the keys.
        groups: G, see the module's docstring, from `batch_norm_groups`.
        parts: a rank's clips are encoded, and their gradients summed, in so many equal parts.
        views: of one shared encoder: clips of different views share no batch statistics.
        recompute: the query's activations are not kept but computed again for the gradient.
        compile: "none", or how torch.compile treats the query and the key encoder.
    """

    def __init__(
        self,
        query: Encoder,
        other: Encoder | None,
        *,
        momentum: float | None,
        groups: int,
        seed: int,
        world: World,
        parts: int = 1,
        views: int = 1,
        recompute: bool = False,
        compile: Literal["none", "default", "cuda_graphs"] = "none",
    ) -> None:
        self.momentum, self.groups, self.seed, self.world, self.num_parts = momentum, groups, seed, world, parts
        self.query = query.to(world.device).train()
        self.key = self.query if momentum is None else _frozen(copy.deepcopy(self.query))
        self.other = None if other is None else _frozen(other.to(world.device)).eval()
        if recompute:  # after the copy, whose methods would be the query's
            _recompute_activations(self.query)
        local_groups = groups // world.size
        self._key_groups = GroupedEncoder(_compiled(self.key, compile), local_groups)
        self._query_groups: nn.Module = GroupedEncoder(_compiled(self.query, compile), local_groups * views // parts)
        if world.size > 1:
            # BatchNorm's running statistics are each rank's own until `sync_running_statistics`.
            self._query_groups = DistributedDataParallel(
                self._query_groups, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def encode_query(self, clips: Tensor) -> Tensor:
        """f_q of this rank's clips: [B, 3, T, H, W] -> [B, D] with gradient."""
        return self._query_groups(clips)

    def parts(self, clips: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """This rank's clips in `num_parts` parts, and the rows of each.

        A part is to be encoded, and its gradient taken, before the next one is asked for: processes exchange only the
        sum of all.
        """
        size = len(clips) // self.num_parts
        parts = clips.split(size)
        apart = _statistics_apart(self.query, parts) if len(parts) > 1 else parts
        for i, part in enumerate(apart):
            quiet = i + 1 < len(parts) and isinstance(self._query_groups, DistributedDataParallel)
            with self._query_groups.no_sync() if quiet else nullcontext():
                yield slice(i * size, (i + 1) * size), part

    @torch.no_grad()
    def update_key(self) -> None:
        """key <- momentum * key + (1 - momentum) * query, for weights; BatchNorm's statistics are the key's own."""
        if self.key is self.query:
            return
        torch._foreach_lerp_(list(self.key.parameters()), list(self.query.parameters()), 1 - self.momentum)

    @torch.no_grad()
    def encode_keys(self, clips: Tensor, step: int) -> Tensor:
        """f_q+ of every rank's clips: [B, 3, T, H, W] -> [R*B, D].

        With several groups the clips are dealt to them in a random order of the step ("shuffle-BN"): a query's key
        shares its batch statistics with other clips than the query, so the statistics cannot give the match away.
        """
        if self.groups == 1:
            return self._key_groups(clips)
        everyone = distributed.all_gather(clips)  # [R*B, 3, T, H, W]
        order = on_device(generator(self.seed, SHUFFLE_STREAM, step).permutation(len(everyone)), clips.device)
        mine = order.chunk(self.world.size)[self.world.rank]
        shuffled = distributed.all_gather(self._key_groups(everyone[mine]))  # [R*B, D]
        keys = torch.empty_like(shuffled)
        keys[order] = shuffled
        return keys

    @torch.no_grad()
    def encode_other(self, clips: Tensor) -> Tensor:
        """f_q+ in the other view of every rank's clips: [B, 3, T, H, W] -> [R*B, D]."""
        return distributed.all_gather(self.other(clips))

    def sync_running_statistics(self) -> None:
        """Averages the BatchNorm statistics over the ranks: after every step, so that saving or not changes nothing."""
        keys = [] if self.key is self.query else running_statistics(self.key)
        distributed.mean_(running_statistics(self.query) + keys)


def _frozen(encoder: Encoder) -> Encoder:
    return encoder.requires_grad_(False)


def _compiled(encoder: Encoder, mode: Literal["none", "default", "cuda_graphs"]) -> nn.Module:
    """The encoder, sharing its weights, as torch.compile makes it; with CUDA graphs its kernels are one launch."""
    if mode == "none":
        return encoder
    return torch.compile(encoder, mode="reduce-overhead" if mode == "cuda_graphs" else "default")


def _recompute_activations(encoder: Encoder) -> None:
    """Keeps only what goes into each block of the backbone; the rest is computed again on the way back."""
    for block in encoder.backbone.children():
        norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False,
            context_fn=partial(_statistics_once, norms),
        )  # fmt: skip


def _statistics_once(norms: list[nn.Module]) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of a block's two forwards: the second one leaves BatchNorm's running statistics as they are."""

    @contextmanager
    def again():
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 0.0  # not `track_running_stats`: without the statistics fewer tensors would be saved
        try:
            yield
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
                norm.num_batches_tracked.sub_(1)

    return nullcontext(), again()
