"""The encoders of a cycle: the query encoder, the key encoder (its moving average), and the frozen encoder of the
other view.

Letters: B clips per rank, R ranks, G groups, V views, D feature width.

BatchNorm computes its statistics over one of G groups of B*R/G clips at a time. The published runs have one group per
GPU. G groups on one GPU give the same result as G GPUs with one group each.
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

from cpr_fast.models import Encoder, FactoryEncoder, named_blocks, running_statistics, statistics_layers
from cpr_fast.pretrain.state import sharding
from cpr_fast.pretrain.state.schedule import generator, on_device
from cpr_fast.runtime import distributed
from cpr_fast.runtime.distributed import World

SHUFFLE_STREAM = 1  # argument `stream` of `schedule.generator`


class GroupedEncoder(nn.Module):
    """Runs an encoder over `groups` equal parts of the batch: [B, 3, T, H, W] -> [B, D].

    Called with None it returns the sum of all weights that learn, 0-d; see `_fix_buckets`.

    In training mode the running statistics become the mean of the statistics that each group alone would have produced.
    They are linear in the statistics of the batch, so ranks with one group each get the same by averaging theirs.
    """

    def __init__(self, encoder: Encoder, groups: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.groups = groups

    def forward(self, clips: Tensor | None) -> Tensor:
        if clips is None:
            return sum(weight.sum() for weight in self.parameters() if weight.requires_grad)
        if self.groups == 1:
            return self.encoder(clips)
        parts = _statistics_apart(self.encoder, clips.chunk(self.groups))
        return torch.cat([self.encoder(part) for part in parts])


def _statistics_apart(encoder: nn.Module, parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yields each of `parts`; the caller runs one forward pass on it.

    Every pass starts from the same running statistics; at the end they are set to the mean over the passes.
    """
    running = running_statistics(encoder)
    if not running:
        yield from parts
        return
    before = [tensor.clone() for tensor in running]
    total = [torch.zeros_like(tensor) for tensor in running]
    for part in parts:
        torch._foreach_copy_(running, before)
        yield part
        torch._foreach_add_(total, running)
    torch._foreach_mul_(total, 1 / len(parts))
    torch._foreach_copy_(running, total)


class Encoders:
    """Query encoder (trained), key encoder (its moving average), and frozen encoder of the other view (if mining).

    Args:
        query: the encoder of the view that learns; trained in place.
        other: the encoder of the other view, frozen and in eval mode; None if the cycle does not use that view.
        momentum: weight of the old key weights in an update, which a schedule may change before every step; with None,
            the query encoder also computes the keys.
        groups: G, see the docstring of the module; from `batch_norm_groups`.
        parts: number of equal parts in which a rank encodes its clips and accumulates gradients.
        views: number of views of one shared encoder; clips of different views share no batch statistics.
        recompute: recompute the activations of the query encoder in the backward pass instead of keeping them.
        compile: "none", or the mode in which torch.compile compiles the query and the key encoder.
        shard: divide the weights among the processes, if there are several; see `sharding`.
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
        shard: bool = False,
    ) -> None:
        self.momentum, self.groups, self.seed, self.world, self.num_parts = momentum, groups, seed, world, parts
        self.sharded = shard and world.size > 1
        if not self.sharded:  # `sharding.shard` moves each block after it was divided: the whole need not fit
            query, other = query.to(world.device), None if other is None else other.to(world.device)
        self.query = query.train()
        self.key = self.query if momentum is None else _frozen(copy.deepcopy(self.query))
        self.other = None if other is None else _frozen(other).eval()
        if recompute:  # after the copy: the copy would call the patched methods of the query encoder
            _recompute_activations(self.query)
        local_groups = groups // world.size
        query_groups = local_groups * views // parts
        if self.sharded:
            query_groups = 1  # one forward pass per backward pass: the groups are those of BatchNorm, which is refused
            for encoder in dict.fromkeys(filter(None, (self.query, self.key, self.other))):
                sharding.shard(encoder, world)
        self._key_groups = GroupedEncoder(_compiled(self.key, compile), local_groups)
        self._query_groups: nn.Module = GroupedEncoder(_compiled(self.query, compile), query_groups)
        if world.size > 1 and not self.sharded:
            # Each rank keeps its own running statistics until `sync_running_statistics`.
            self._query_groups = DistributedDataParallel(
                self._query_groups, broadcast_buffers=False, gradient_as_bucket_view=True
            )
            _fix_buckets(self._query_groups)

    def encode_query(self, clips: Tensor) -> Tensor:
        """Computes f_q of this rank's clips: [B, 3, T, H, W] -> [B, D], with gradient."""
        return self._query_groups(clips)

    def parts(self, clips: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yields `num_parts` parts of this rank's clips, each with its rows.

        Encode a part and compute its gradient before asking for the next one: the processes exchange gradients only
        once, after the last part.
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
        """Updates the weights: key <- momentum * key + (1 - momentum) * query. The key encoder has its own BatchNorm
        statistics."""
        if self.key is self.query:
            return
        keys, queries = (sharding.local(list(encoder.parameters())) for encoder in (self.key, self.query))
        torch._foreach_lerp_(keys, queries, 1 - self.momentum)

    @torch.no_grad()
    def encode_keys(self, clips: Tensor, step: int) -> Tensor:
        """Computes f_q+ of the clips of all ranks: [B, 3, T, H, W] -> [R*B, D].

        With several groups the clips are assigned to groups in a random order, which changes in every step
        ("shuffle-BN" [MoCo]). A key and its query then share batch statistics with different clips, so that the
        statistics cannot reveal which key belongs to which query.
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
        """Computes f_q+ in the other view of the clips of all ranks: [B, 3, T, H, W] -> [R*B, D]."""
        return distributed.all_gather(self.other(clips))

    def sync_running_statistics(self) -> None:
        """Averages the BatchNorm statistics over the ranks, after every step, whether or not a checkpoint is saved."""
        keys = [] if self.key is self.query else running_statistics(self.key)
        distributed.mean_(running_statistics(self.query) + keys)


def _fix_buckets(network: DistributedDataParallel) -> None:
    """Runs the backward pass after which DistributedDataParallel rebuilds its buckets, before the first step.

    The order in which an all-reduce of three or more processes adds the gradients of a weight depends on the place of
    the weight in its bucket. DistributedDataParallel begins with one bucket, in the order in which weights were
    registered, and rebuilds the buckets once, in the order in which the gradients of the first backward pass arrived.
    If that pass were a step, the first step after a resumption would differ in the last bits from the same step of an
    uninterrupted run. Here the gradients are those of the sum of all weights, which arrive in the reverse order of
    registration; the buckets are then the same in every step of every process.
    """
    network(None).backward()
    network.zero_grad(set_to_none=True)


def _frozen(encoder: Encoder) -> Encoder:
    return encoder.requires_grad_(False)


def _compiled(encoder: Encoder, mode: Literal["none", "default", "cuda_graphs"]) -> nn.Module:
    """Returns the compiled encoder, which shares its weights. With CUDA graphs all of its kernels are started by one
    launch."""
    if mode == "none":
        return encoder
    return torch.compile(encoder, mode="reduce-overhead" if mode == "cuda_graphs" else "default")


def _recompute_activations(encoder: Encoder) -> None:
    """Keeps only the inputs of the backbone's blocks; the backward pass recomputes the other activations."""
    draws = isinstance(encoder, FactoryEncoder)  # such as dropout, which must be the same in both forward passes
    for _, block in named_blocks(encoder.backbone):
        block.forward = partial(
            checkpoint, block.forward, use_reentrant=False, preserve_rng_state=draws,
            context_fn=partial(_statistics_once, statistics_layers(block)),
        )  # fmt: skip


def _statistics_once(norms: list[nn.Module]) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Returns contexts for a block's two forward passes; the second does not update BatchNorm's running statistics."""

    @contextmanager
    def again():
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 0.0  # not `track_running_stats = False`, which would save fewer tensors than the first pass
        try:
            yield
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
                norm.num_batches_tracked.sub_(1)

    return nullcontext(), again()
