"""The encoders of a cycle: the query's, its moving average for the keys, and the frozen one of the other view.

Letters: B clips per rank, R ranks, G groups, V views, D feature width.

BatchNorm sees one of G groups of B*R/G clips at a time: the published runs use one group per GPU, and G groups on one
GPU compute the same.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import distributed
from ..distributed import World
from ..errors import InputError
from ..models import Encoder
from .schedule import generator

SHUFFLE_STREAM = 1  # of `schedule.generator`


def batch_norm_groups(groups: int | None, clips: int, processes: int) -> int:
    """G for steps of `clips` clips (all processes together): `groups`, or one per process where it is None.

    Raises InputError if the groups would not be equal parts of every process's clips.
    """
    if groups is None:
        return processes
    if groups % processes:
        raise InputError(f"memory.shuffle_bn_groups: expected a multiple of the {processes} processes, got {groups}")
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
        running = running_statistics(self.encoder)
        before = [tensor.clone() for tensor in running]
        total = [torch.zeros_like(tensor) for tensor in running]
        features = []
        for part in clips.chunk(self.groups):
            torch._foreach_copy_(running, before)
            features.append(self.encoder(part))
            torch._foreach_add_(total, running)
        torch._foreach_mul_(total, 1 / self.groups)
        torch._foreach_copy_(running, total)
        return torch.cat(features)


class Encoders:
    """Query encoder (learns), key encoder (moving average of it), frozen encoder of the other view (if mining).

    Args:
        query: encoder of the view that learns; trained in place.
        other: encoder of the other view, frozen in eval mode; None where the cycle does not look at it.
        momentum: share of the old key weights kept by an update.
        groups: G, see the module's docstring, from `batch_norm_groups`.
    """

    def __init__(
        self, query: Encoder, other: Encoder | None, *, momentum: float, groups: int, seed: int, world: World
    ) -> None:
        self.momentum, self.groups, self.seed, self.world = momentum, groups, seed, world
        self.query = query.to(world.device).train()
        self.key = _frozen(copy.deepcopy(self.query))
        self.other = None if other is None else _frozen(other.to(world.device)).eval()
        local_groups = groups // world.size
        self._key_groups = GroupedEncoder(self.key, local_groups)
        self._query_groups: nn.Module = GroupedEncoder(self.query, local_groups)
        if world.size > 1:
            # BatchNorm's running statistics are each rank's own until `sync_running_statistics`.
            self._query_groups = DistributedDataParallel(
                self._query_groups, broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def encode_query(self, clips: Tensor) -> Tensor:
        """f_q of this rank's clips: [B, 3, T, H, W] -> [B, D] with gradient."""
        return self._query_groups(clips)

    @torch.no_grad()
    def update_key(self) -> None:
        """key <- momentum * key + (1 - momentum) * query, for weights; BatchNorm's statistics are the key's own."""
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
        order = torch.from_numpy(generator(self.seed, SHUFFLE_STREAM, step).permutation(len(everyone))).to(clips.device)
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
        distributed.mean_(running_statistics(self.query) + running_statistics(self.key))


def running_statistics(encoder: nn.Module) -> list[Tensor]:
    """The running means and variances of an encoder's BatchNorm layers (not their batch counters)."""
    # .data: autograd keeps these buffers for a backward that does not read them in training mode, and would take a
    # write between two forwards for a mistake.
    return [buffer.data for buffer in encoder.buffers() if buffer.is_floating_point()]


def _frozen(encoder: Encoder) -> Encoder:
    return encoder.requires_grad_(False)
