"""Ways to mine that the paper does not have, to be compared with its cascade, and one that looks at the labels, to find
out why a way fails. bench/results/study.md registers them.

Each is in force within a `with` block, in which it replaces one function of the training step; the trainer itself knows
none of them. They need one process and optim.accumulate = 1, and all but "only_right" a queue. Letters: B queries,
K slots of the memory, P positives, D feature width, C width of the backbone, N videos.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from cpr_fast.data.clips.loader import TrainLoader
from cpr_fast.data.index.index import Index
from cpr_fast.ops import cascade_select
from cpr_fast.pretrain.state.cascade import Cascade
from cpr_fast.pretrain.state.cycle import CycleState
from cpr_fast.pretrain.state.encoders import SHUFFLE_STREAM
from cpr_fast.pretrain.state.memory import Memory
from cpr_fast.pretrain.state.schedule import generator
from cpr_fast.pretrain.step import step as training_step
from cpr_fast.pretrain.step.contrast import contrast

WARM_EPOCH = 1_000_000  # the first epoch of the clips that fill a memory before training; no training has so many


class Way:
    """The paper's cascade; subclasses replace parts of it. `start` is called at the start of each cycle that mines."""

    state: CycleState
    original: Any  # the trainer's own step
    video: Tensor  # [B], of the current queries
    label: Tensor  # [B], of the current queries
    step: int

    def start(self) -> None:
        pass

    def mine(self, anchors: Tensor, memory: Memory, source: Tensor, cascade: Cascade) -> Tensor:
        return self.select(anchors, memory.features[:2], memory, source, cascade.views, cascade.keep)

    @staticmethod
    def select(
        anchors: Tensor, entries: Tensor, memory: Memory, source: Tensor, views: tuple[int, ...], keep: tuple[int, ...]
    ) -> Tensor:
        """Returns the slots [B, P] that a cascade over other features of the same entries selects."""
        return cascade_select(anchors, entries, views, keep, query_ids=source, memory_ids=memory.source)[0]

    def train_step(self, original: Any, state: CycleState, batch: Any, step: int) -> Any:
        self.original, self.video, self.label, self.step = original, batch.video, batch.label, step
        if state.cascades and state is not getattr(self, "state", None):
            self.state = state
            self.start()
        return original(state, batch, step)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Replaces what the way changes."""
        with ExitStack() as stack:
            replace = partial(patch.object, training_step)
            for name in ("_queue_step", "_shared_step"):
                stack.enter_context(replace(name, partial(self.train_step, getattr(training_step, name))))
            stack.enter_context(replace("mine", self.mine))
            if hasattr(self, "contrast"):
                stack.enter_context(replace("contrast", self.contrast))
            yield


class _Beside(Way):
    """Keeps further features of the entries, and writes them whenever keys are enqueued."""

    def start(self) -> None:
        memory = self.state.memory
        original = memory.enqueue

        def enqueue(keys: Tensor, **columns: Any) -> None:
            slots = (memory.count + torch.arange(keys.shape[1])) % memory.size
            original(keys, **columns)
            self.write(slots, keys, columns["video"])

        memory.enqueue = enqueue

    def write(self, slots: Tensor, keys: Tensor, video: Tensor) -> None:
        raise NotImplementedError


class BackboneFeatures(_Beside):
    """Compares the pooled features of the backbones, L2-normalised, in place of the heads'; the loss stays."""

    def start(self) -> None:
        super().start()
        encoders = self.state.encoders
        self.pooled: list[Tensor] = [torch.empty(0)] * 2
        self.parts: list[Tensor] = []  # of one call, one for each BatchNorm group
        for encoder in (encoders.key, encoders.other):
            encoder.head.register_forward_pre_hook(self._keep)
        encoders.encode_keys = partial(self._encode_keys, encoders.encode_keys)
        encoders.encode_other = partial(self._encode_other, encoders.encode_other)
        self.entries = torch.zeros(2, self.state.memory.size, encoders.key.backbone.out_channels)

    def _keep(self, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.parts.append(F.normalize(inputs[0].detach().float(), dim=1))

    def _encode_keys(self, original: Any, clips: Tensor, step: int) -> Tensor:
        self.parts = []
        keys, encoders = original(clips, step), self.state.encoders
        shuffled = torch.cat(self.parts)
        if encoders.groups > 1:  # `Encoders.encode_keys` assigns the clips to the groups in this order
            order = torch.from_numpy(generator(encoders.seed, SHUFFLE_STREAM, step).permutation(len(shuffled)))
            shuffled = torch.empty_like(shuffled).index_copy_(0, order, shuffled)
        self.pooled[0] = shuffled
        return keys

    def _encode_other(self, original: Any, clips: Tensor) -> Tensor:
        self.parts = []
        keys = original(clips)
        self.pooled[1] = torch.cat(self.parts)
        return keys

    def write(self, slots: Tensor, keys: Tensor, video: Tensor) -> None:
        self.entries[:, slots] = torch.stack(self.pooled)

    def mine(self, anchors: Tensor, memory: Memory, source: Tensor, cascade: Cascade) -> Tensor:
        return self.select(torch.stack(self.pooled), self.entries, memory, source, cascade.views, cascade.keep)


class PastViews(_Beside):
    """Compares, in place of keys, a moving average of all keys of a video in the cycle, with momentum .5, as a bank's.

    An entry of the memory has the average of its video as it is now, and a query that which includes its new key.
    """

    def start(self) -> None:
        super().start()
        videos, width = len(_videos(self.state)), self.state.memory.features.shape[2]
        self.average, self.seen = torch.zeros(2, videos, width), torch.zeros(videos, dtype=torch.bool)

    def mixed(self, keys: Tensor, video: Tensor) -> Tensor:
        """Returns the averages [2, B, D] of some videos with new keys in them."""
        mixed = torch.lerp(keys, self.average[:, video], 0.5)
        return F.normalize(torch.where(self.seen[video][:, None], mixed, keys), dim=2)

    def write(self, slots: Tensor, keys: Tensor, video: Tensor) -> None:
        self.average[:, video] = self.mixed(keys[:2], video)
        self.seen[video] = True

    def mine(self, anchors: Tensor, memory: Memory, source: Tensor, cascade: Cascade) -> Tensor:
        entries = self.average[:, memory.video]
        return self.select(self.mixed(anchors, self.video), entries, memory, source, cascade.views, cascade.keep)


class Mutual(Way):
    """Keeps the mined entries among whose own 4 P nearest entries the query is, in the view of the last stage.

    A query of which nothing is left has its own key as the only positive.
    """

    def mine(self, anchors: Tensor, memory: Memory, source: Tensor, cascade: Cascade) -> Tensor:
        mined = super().mine(anchors, memory, source, cascade)
        return mutual(mined, anchors, memory.features[:2], source, memory.source, cascade.views[-1])


def mutual(
    mined: Tensor, anchors: Tensor, features: Tensor, source: Tensor, sources: Tensor, view: int, factor: int = 4
) -> Tensor:
    """Returns the mined slots [B, P] whose entries find the query as near as their factor * P nearest entries of other
    sources; the others are -1, at the end.

    Args:
        anchors, features: [2, B, D] and [2, K, D].
        source, sources: [B] and [K], of the queries and of the entries.
    """
    keys = features[view]
    allowed = (sources[:, None] != sources) & (sources >= 0)
    near = (keys @ keys.T).masked_fill(~allowed, -torch.inf).topk(factor * mined.shape[1], dim=1).values[:, -1]  # [K]
    there = mined.clamp(min=0)
    scores = (anchors[view][:, None] * keys[there]).sum(2)  # [B, P]
    return kept(mined, (mined >= 0) & (scores >= near[there]))


def kept(mined: Tensor, chosen: Tensor) -> Tensor:
    """Returns the chosen slots of [B, P] in their order, followed by -1."""
    slots = torch.where(chosen, mined, -1)
    return slots.gather(1, (~chosen).int().argsort(dim=1, stable=True))


class OnlyRight(Way):
    """Keeps the mined entries that have the query's class: what mining would be worth if its mistakes were left out.

    It needs labels and is no method. The other mined entries are negatives, as for a query that did not mine them.
    """

    def mine(self, anchors: Tensor, memory: Memory, source: Tensor, cascade: Cascade) -> Tensor:
        mined = super().mine(anchors, memory, source, cascade)
        return kept(mined, (mined >= 0) & (memory.label[mined.clamp(min=0)] == self.label[:, None]))


class SiblingsAgree(Way):
    """Mines 4 P entries for the query and for each sibling in the memory, and keeps the first P entries of the query's
    that at least half of the siblings mine too; all of them count for a query without siblings."""

    def mine(self, anchors: Tensor, memory: Memory, source: Tensor, cascade: Cascade) -> Tensor:
        positives = cascade.keep[-1]
        keep = (*(max(4 * positives, number) for number in cascade.keep[:-1]), 4 * positives)
        mined = self.select(anchors, memory.features[:2], memory, source, cascade.views, keep)
        of_entries = self.select(
            memory.features[:2], memory.features[:2], memory, memory.source, cascade.views, keep
        )  # [K, 4P]
        return agreed(mined, of_entries, source, memory.source, positives)


def agreed(mined: Tensor, of_entries: Tensor, source: Tensor, sources: Tensor, positives: int) -> Tensor:
    """Returns the first `positives` slots of each row of `mined` [B, M] that at least half of the query's siblings in
    the memory have in their row of `of_entries` [K, M]."""
    has = torch.zeros(len(sources), len(sources) + 1)  # [K, K + 1], the last column takes padding
    has.scatter_(1, torch.where(of_entries >= 0, of_entries, len(sources)), 1.0)
    siblings = (source[:, None] == sources).float()  # [B, K]
    votes = (siblings @ has).gather(1, torch.where(mined >= 0, mined, len(sources)))  # [B, M]
    return kept(mined, (mined >= 0) & (2 * votes >= siblings.sum(1, keepdim=True)))[:, :positives]


class Confidence(Way):
    """Weights each mined positive in the sum over the positives: P times the softmax over the query's positives of the
    mean cosine of both views, with the temperature of the loss. q+ keeps the weight 1."""

    def mine(self, anchors: Tensor, memory: Memory, source: Tensor, cascade: Cascade) -> Tensor:
        mined = super().mine(anchors, memory, source, cascade)
        cosines = (anchors[:, :, None] * memory.features[:2][:, mined.clamp(min=0)]).sum(3).mean(0)  # [B, P]
        cosines = cosines.masked_fill(mined < 0, -torch.inf) / self.state.config.loss.temperature
        self.log_weights = cosines.log_softmax(1) + torch.log((mined >= 0).sum(1, keepdim=True).float())
        return mined

    def contrast(
        self, query: Tensor, own_key: Tensor, entries: Tensor, mined: Tensor | None, ids: Any, memory: Memory,
        meaning: Any, *, temperature: float, holds_own: bool,
    ) -> Tensor:  # fmt: skip
        if mined is None:
            return contrast(
                query, own_key, entries, mined, ids, memory, meaning, temperature=temperature, holds_own=holds_own
            )
        return weighted_mil_nce(query, own_key, entries, mined, self.log_weights, temperature)


def weighted_mil_nce(
    query: Tensor, own_key: Tensor, entries: Tensor, mined: Tensor, log_weights: Tensor, temperature: float
) -> Tensor:
    """Returns MIL-NCE with the logarithm of a weight for each of the mined positives [B, P], and siblings as negatives.

    It is `cpr_fast.ops.mil_nce` if all weights are 1.
    """
    own = (query * own_key).sum(1, keepdim=True) / temperature
    logits = torch.cat([own, query @ entries.T / temperature], dim=1)  # [B, 1 + K]
    of_mined = logits[:, 1:].gather(1, mined.clamp(min=0)) + log_weights
    positive = torch.cat([own, of_mined.masked_fill(mined < 0, -torch.inf)], dim=1)
    return (logits.logsumexp(1) - positive.logsumexp(1)).mean()


class WarmStart(Way):
    """Fills the memory of each cycle before its first step, by a pass over the videos in which nothing is learnt. All
    steps of the cycle learn."""

    def start(self) -> None:
        state = self.state
        data, seed = state.config.data, state.config.run.seed
        with closing(TrainLoader(_videos(state), data, state.views, seed=seed)) as loader:
            batches = itertools.chain.from_iterable(map(loader.epoch, itertools.count(WARM_EPOCH)))
            while not state.memory.full:
                self.original(state, next(batches), self.step)
        state.start_epoch()


def _videos(state: CycleState) -> Index:
    """Returns the training videos of a cycle."""
    return Index.load(Path(state.config.data.index)).select(state.config.data.split)


WAYS = {
    "backbone": BackboneFeatures, "past_views": PastViews, "mutual": Mutual, "siblings": SiblingsAgree,
    "confidence": Confidence, "warm_start": WarmStart, "only_right": OnlyRight,
}  # fmt: skip
