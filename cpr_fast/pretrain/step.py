"""One step of pretraining: read `train_step` beside Algorithm 1 of the paper.

Letters: B clips per rank, R ranks, V views, K memory slots, D feature width, P positives, T frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import distributed
from ..evaluate.mining_quality import gather_slots, hubness, mined_counts
from ..ops import mil_nce
from .cycle import CycleState
from .log import StepResult
from .mining import id_meaning, mine, mining_rates

if TYPE_CHECKING:
    from ..data.pipeline import Batch


def train_step(state: CycleState, batch: Batch, step: int) -> StepResult:
    """One batch of Algorithm 1 [paper]; nothing in it waits for the device.

    Until the memory is full the encoder's weights stay as they are: only BatchNorm's statistics, the moving average
    and the memory move [published code].
    """
    config, encoders, memory, cycle = state.config, state.encoders, state.memory, state.cycle
    own_clips = batch.clips[cycle.view]  # [B, 2, 3, T, H, W]
    learning = memory.full
    with torch.set_grad_enabled(learning), state.autocast():
        f_q = encoders.encode_query(own_clips[:, 0])  # [B, D]
    encoders.update_key()
    with torch.no_grad(), state.autocast():
        keys = [encoders.encode_keys(own_clips[:, 1], step)]  # f_q+ of all ranks, [R*B, D] per view
        keys += [encoders.encode_other(batch.clips[view][:, 1]) for view in state.views[1:]]
    keys = torch.stack(keys)  # [V, R*B, D]
    rows = torch.stack([batch.source, batch.video, batch.label, batch.start[:, 1]], dim=1)  # [B, 4]
    source, video, label, start = distributed.all_gather(rows).unbind(1)  # [R*B] each
    here = slice(state.world.rank * len(f_q), (state.world.rank + 1) * len(f_q))  # this rank's part of them

    loss, mined, rates = torch.full_like(f_q[0, 0], float("nan")).detach(), None, {}
    if learning:
        if cycle.mining == "cascade":
            anchors = keys[:, here]
            if config.mining.anchor == "query":
                anchors = torch.stack([f_q.detach(), keys[1, here]])
            mined = mine(anchors, memory, batch.source, config.mining, state.top_k)  # [B, P]
            rates = mining_rates(anchors, memory, batch.source, config.mining, mined, batch.label, step)
        meaning = id_meaning(cycle.mining, config.loss, seed=config.run.seed, step=step)
        loss = mil_nce(
            f_q, keys[0, here], memory.features[0], mined,
            query_ids=getattr(batch, meaning.ids), memory_ids=getattr(memory, meaning.ids),
            same_id=meaning.same_id, self_positive=meaning.self_positive, temperature=config.loss.temperature,
        )  # fmt: skip
        state.optimise(loss)
    result = _measure(state, f_q, keys, loss, mined, rates, video, start)
    memory.enqueue(keys, source=source, video=video, label=label, start=start, step=step)
    encoders.sync_running_statistics()
    return result


@torch.no_grad()
def _measure(
    state: CycleState,
    f_q: Tensor,
    keys: Tensor,
    loss: Tensor,
    mined: Tensor | None,
    rates: dict[str, Tensor],
    video: Tensor,
    start: Tensor,
) -> StepResult:
    """What the log wants to know of a step, the same on every rank; stays on the device."""
    loss = loss.detach().clone()
    distributed.mean_([loss])
    finite = f_q.isfinite().all() & keys.isfinite().all()
    if not state.memory.full:
        return StepResult(torch.full_like(loss, float("nan")), {}, finite, video, start, None, None)
    state.loss_sum += torch.stack([loss, torch.ones_like(loss)])
    finite = finite & loss.isfinite()
    if mined is None:
        return StepResult(loss, {}, finite, video, start, None, None)
    mined = distributed.all_gather(mined)  # [R*B, P]
    mined_video = gather_slots(state.memory.video, mined)
    everyone = distributed.all_gather(torch.stack(list(rates.values()), dim=1))  # [R*B, rates]
    means = state.quality.update(mined_video, video, dict(zip(rates, everyone.unbind(1), strict=True)))
    means["hubness"] = hubness(mined_counts(mined, state.memory.size))
    mined_start = gather_slots(state.memory.start, mined)
    return StepResult(loss, means, finite, video, start, mined_video, mined_start)
