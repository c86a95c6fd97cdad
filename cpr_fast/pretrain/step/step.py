"""One step of pretraining. `_queue_step` follows Algorithm 1 of the paper line by line.

Letters: B clips per rank, R ranks, V views, K memory slots, D feature width, P positives, T frames.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from cpr_fast.errors import enough_values
from cpr_fast.mining.quality import gather_slots, hubness, mined_counts
from cpr_fast.pretrain.state.cascade import mine, mining_rates
from cpr_fast.pretrain.state.cycle import CycleState
from cpr_fast.pretrain.state.memory import EMPTY
from cpr_fast.pretrain.step.contrast import Ids, contrast
from cpr_fast.pretrain.step.ids import id_meaning
from cpr_fast.pretrain.step.intra import without_motion
from cpr_fast.pretrain.step.result import StepResult
from cpr_fast.runtime import distributed

if TYPE_CHECKING:
    from cpr_fast.data.clips.stream import Batch


@dataclass(frozen=True)
class Learnt:
    """Loss and mined positives of some queries. B queries, P positives.

    Attributes:
        loss: 0-d, with gradient until the backward pass.
        mined: [B, P] int64 slots, or None.
        rates: {name: [B]}, mining rates; empty if nothing was mined.
    """

    loss: Tensor
    mined: Tensor | None = None
    rates: dict[str, Tensor] | None = None


def train_step(state: CycleState, batch: Batch, step: int) -> StepResult:
    """Trains on one batch [paper, Algorithm 1]. Does not wait for the device."""
    if state.config.run.compile == "cuda_graphs":
        torch.compiler.cudagraph_mark_step_begin()
    with enough_values("data.batch_size"):
        if state.config.model.shared:
            result = _shared_step(state, batch, step)
        elif state.config.memory.kind == "batch":
            result = _batch_step(state, batch, step)
        else:
            result = _queue_step(state, batch, step)
    state.encoders.sync_running_statistics()
    return result


def _queue_step(state: CycleState, batch: Batch, step: int) -> StepResult:
    """Trains with a queue of keys from a moving average of the query encoder [MoCo], or with a bank of such keys.

    A cascade takes no optimiser step until its queue is full: only the BatchNorm statistics, the key encoder and the
    queue are updated [CoCLR]. InfoNCE and UberNCE learn from the first step on; their queue starts with random vectors
    [MoCo]. With a bank the encoder learns from the first step on, too [IIC], and mining starts once the bank is full.
    """
    encoders, memory = state.encoders, state.memory
    own_clips = batch.clips[state.cycle.view]  # [B, 2, 3, T, H, W]
    learning = state.learning
    encoders.update_key()
    with torch.no_grad(), state.autocast():
        keys = [encoders.encode_keys(own_clips[:, 1], step)]  # f_q+ of all ranks, [R*B, D] per view
        keys += [encoders.encode_other(batch.clips[view][:, 1]) for view in state.views[1:]]
    keys = torch.stack(keys)  # [V, R*B, D]
    ids = Ids.of(batch, 1)
    own_keys = keys[:, _here(state, len(ids.video))]

    features, learnt = [], []
    for rows, clips in encoders.parts(own_clips[:, 0]):
        with torch.set_grad_enabled(learning), state.autocast():
            f_q = encoders.encode_query(clips)  # [B / parts, D]
        features.append(f_q.detach())
        if not learning:
            continue
        part = _contrast(state, f_q, own_keys[0, rows], own_keys[:, rows], ids[rows], step, memory.features[0])
        state.backward(part.loss / encoders.num_parts)
        learnt.append(part)
    if learning:
        state.optimise()
    everyone = ids.of_all_ranks()
    queries = distributed.all_gather(torch.cat(features))[None]
    result = _measure(state, queries, keys, _joined(learnt), everyone)
    _enqueue(state, keys, everyone, step)
    return result


def _batch_step(state: CycleState, batch: Batch, step: int) -> StepResult:
    """Trains with the batch as memory [SimCLR].

    Each clip is the q+ of the other clip of its video, and is compared with the clips of the other videos.
    """
    clips = batch.clips[state.cycle.view].flatten(0, 1)  # [2B, 3, T, H, W]
    with state.autocast():
        f_q = state.encoders.encode_query(clips)  # [2B, D], the two clips of a video next to each other
    everything = distributed.all_gather_with_gradient(f_q)  # [R*2B, D]
    keys = [everything.detach()]
    with torch.no_grad(), state.autocast():
        keys += [state.encoders.encode_other(batch.clips[other].flatten(0, 1)) for other in state.views[1:]]
    keys = torch.stack(keys)  # [V, R*2B, D]
    ids = Ids.of(batch, 0, 1)
    everyone = ids.of_all_ranks()
    _enqueue(state, keys, everyone, step)  # replaces the whole memory

    partners, own_key = _partner(keys[:, _here(state, len(f_q))]), _partner(f_q[None])[0]
    learnt = _contrast(state, f_q, own_key, partners, ids, step, everything)
    state.backward(learnt.loss)
    state.optimise()
    return _measure(state, keys[:1], keys, learnt, everyone)


def _shared_step(state: CycleState, batch: Batch, step: int) -> StepResult:
    """Trains one encoder for two views of a clip, each compared with the bank's entries in the other view [IIC].

    q+ is the entry of the video in the other view, or the feature of the clip in that view while there is no entry.
    With intra-negatives, clips without their motion are encoded too; the bank of these clips contains only negatives.
    The published code draws 1,024 entries of each bank as negatives; here all entries are used, which removes that
    noise.
    """
    memory, encoders = state.memory, state.encoders
    clips = [batch.clips[view][:, 0] for view in state.views]  # [B, 3, T, H, W] each
    ids = Ids.of(batch, 0)
    with state.autocast():
        features = torch.stack(encoders.encode_query(torch.cat(clips)).chunk(2))  # [2, B, D]
    keys = distributed.all_gather(features.detach().transpose(0, 1)).transpose(0, 1)  # [2, R*B, D]
    entries, intra = memory.features, state.config.loss.intra_negatives
    if intra != "none":
        with torch.no_grad(), state.autocast():
            still = without_motion(clips[0], intra, seed=state.config.run.seed, step=step, world=state.world)
            keys = torch.cat([keys, encoders.encode_keys(still, step)[None]])  # [3, R*B, D]
        entries = torch.cat([entries[:2], entries[2:].expand(2, -1, -1)], dim=1)  # [2, 2K, D]

    visited = (memory.source[ids.video] != EMPTY)[:, None]  # [B, 1]
    stored = torch.where(visited, entries[:2, ids.video], F.normalize(features.detach(), dim=2))  # [2, B, D]
    learnt = [
        _contrast(state, features[own], stored[other], stored, ids, step, entries[other], own)
        for own, other in ((0, 1), (1, 0))
    ]
    loss = learnt[0].loss + learnt[1].loss
    state.backward(loss)
    state.optimise()
    everyone = ids.of_all_ranks()
    result = _measure(state, keys[:2], keys, Learnt(loss, learnt[0].mined, learnt[0].rates), everyone)
    _enqueue(state, keys, everyone, step)
    return result


def _contrast(
    state: CycleState,
    query: Tensor,
    own_key: Tensor,
    keys: Tensor,
    ids: Ids,
    step: int,
    entries: Tensor,
    own: int = 0,
) -> Learnt:
    """Mines positives for queries of view `own`, and computes their loss against `entries` [E >= K, D].

    Args:
        keys: [V, B, D], f_q+ in every view, which the cascade compares. If the anchor is the query, f_q replaces f_q+
            in its own view.
        entries: the features of the memory in one view, and further negatives.
    """
    config, memory, mining = state.config, state.memory, state.cycle.mining
    mined, rates = None, {}
    if mining == "cascade" and memory.full:
        cascade = state.cascades[own]
        anchors = keys
        if state.anchor == "query":
            anchors = torch.stack([query.detach() if view == own else keys[view] for view in (0, 1)])
        mined = mine(anchors, memory, ids.source, cascade)  # [B, P]
        if own == 0:  # mining rates are reported for the first view only
            measured = config.health.mining_queries
            rates = mining_rates(anchors, memory, ids.source, cascade, mined, ids.label, step, measured)
    meaning = id_meaning(mining, config.loss, seed=config.run.seed, step=step)
    loss = contrast(
        query, own_key, entries, mined, ids, memory, meaning, temperature=config.loss.temperature,
        holds_own=config.memory.kind != "queue",
    )  # fmt: skip
    return Learnt(loss, mined, rates)


def _here(state: CycleState, count: int) -> slice:
    """Returns the rows of this rank in a gathered tensor that has `count` rows of each rank."""
    return slice(state.world.rank * count, (state.world.rank + 1) * count)


def _partner(features: Tensor) -> Tensor:
    """Exchanges the two clips of every video in [V, 2B, D]."""
    return features.unflatten(1, (-1, 2)).flip(2).flatten(1, 2)


def _enqueue(state: CycleState, keys: Tensor, ids: Ids, step: int) -> None:
    state.memory.enqueue(keys, source=ids.source, video=ids.video, label=ids.label, start=ids.start, step=step)


def _joined(parts: list[Learnt]) -> Learnt | None:
    """Joins the results of equal parts of a batch; None if there are none."""
    if not parts:
        return None
    loss = torch.stack([part.loss.detach() for part in parts]).mean()
    if parts[0].mined is None:
        return Learnt(loss)
    rates = {name: torch.cat([part.rates[name] for part in parts]) for name in parts[0].rates}
    return Learnt(loss, torch.cat([part.mined for part in parts]), rates)


@torch.no_grad()
def _measure(state: CycleState, queries: Tensor, keys: Tensor, learnt: Learnt | None, ids: Ids) -> StepResult:
    """Updates the statistics of the epoch and returns the result of a step, the same on every rank and on the device.

    Args:
        queries, keys, ids: of all ranks; [L, R*B, D] of the L views that learn, and [V, R*B, D].
    """
    state.health.update(queries, keys[0], ids.video)
    finite = queries.isfinite().all() & keys.isfinite().all()
    loss = torch.full((), float("nan"), device=keys.device) if learnt is None else learnt.loss.detach().clone()
    distributed.mean_([loss])
    seen = StepResult(loss, {}, finite, ids.video, ids.start, ids.plan, queries, keys)
    if learnt is None:
        return seen
    state.loss_sum += torch.stack([loss, torch.ones_like(loss)])
    seen = replace(seen, finite=finite & loss.isfinite(), grad_norm=state.grad_norm)
    if learnt.mined is None:
        return seen
    mined = distributed.all_gather(learnt.mined)  # [R*B, P]
    mined_video = gather_slots(state.memory.video, mined)
    everyone = distributed.all_gather(torch.stack(list(learnt.rates.values()), dim=1))  # [R*B, rates]
    means = state.quality.update(mined_video, ids.video, dict(zip(learnt.rates, everyone.unbind(1), strict=True)))
    means["hubness"] = hubness(mined_counts(mined, state.memory.size))
    mined_start = gather_slots(state.memory.start, mined)
    return replace(seen, rates=means, mined=mined, mined_video=mined_video, mined_start=mined_start)
