"""Compares a step of CPR with Algorithm 1 of the paper in plain torch: loss, gradient step, key encoder, memory."""

from __future__ import annotations

import copy

import pytest
import torch
from support.small_runs import ALONE, INDEX, assert_same, settings
from support.stand_in_loader import RandomLoader
from torch.nn import functional as F

from cpr_fast.config import Cycle
from cpr_fast.mining.stages import stage_keep, stage_views
from cpr_fast.models import running_statistics
from cpr_fast.pretrain.state.cycle import CycleState
from cpr_fast.pretrain.step.step import train_step

pytestmark = pytest.mark.usefixtures("one_thread")


def a_state(tmp_path, **sections) -> tuple[CycleState, RandomLoader]:
    """A CPR cycle for RGB whose memory is full."""
    config = settings(tmp_path, **sections)
    cycle = Cycle("rgb", 1, "cascade")
    state = CycleState(config, cycle, {}, INDEX, ALONE)
    loader = RandomLoader(INDEX, config.data, state.views, seed=0)
    for step, batch in enumerate(loader.epoch(0)):
        if not state.memory.full:
            train_step(state, batch, step)
    return state, loader


def reference_loss(f_q, own_key, memory, source, mined, protocol, dropped, tau=0.07):
    """Computes MIL-NCE [paper, Eq. 2] by its formula, one query at a time."""
    losses = []
    for b in range(len(f_q)):
        positives = {int(k) for k in mined[b] if k >= 0}
        if protocol == "coclr":
            positives |= {k for k in range(memory.size) if memory.source[k] == source[b]}
        scores = (memory.features[0] @ f_q[b] / tau).exp()
        own = (own_key[b] @ f_q[b] / tau).exp()
        top = sum((scores[k] for k in positives), torch.zeros(())) + (0 if dropped and positives else own)
        losses.append(-(top / (own + scores.sum())).log())
    return torch.stack(losses).mean()


def reference_mine(anchors, memory, source, config):
    scores = torch.einsum("vbd,vkd->vbk", anchors.double(), memory.features.double())
    keeps = stage_keep(config.stages, memory.size, config.ratio, config.top_k)
    mined = []
    for b in range(anchors.shape[1]):
        left = [k for k in range(memory.size) if memory.source[k] != source[b]]
        for view, keep in zip(stage_views(config.stages), keeps, strict=True):
            left = sorted(left, key=lambda k, view=view, b=b: (-scores[view, b, k].item(), k))[:keep]
        mined.append(left)
    return torch.tensor(mined)


@pytest.mark.parametrize("anchor", ["key", "query"])
@pytest.mark.parametrize(("protocol", "drop"), [("paper", 0.9), ("coclr", 1.0), ("coclr", 0.0)])
def test_a_step_is_algorithm_1(tmp_path, protocol, drop, anchor):
    """Compares loss, gradient step, key encoder and memory with the algorithm in plain torch."""
    state, loader = a_state(
        tmp_path,
        loss={"protocol": protocol, "self_positive_drop": drop},
        model={"width": 0.125, "feature_dim": 8, "conv_std": 0.15},  # with .01 all features would be nearly equal
        mining={"stages": 3, "top_k": 2, "anchor": anchor},
        memory={"size": 10, "ema_momentum": 0.6},
        # SGD: Adam's first step is the sign of the gradient, which rounding decides where the gradient is zero.
        optim={"name": "sgd", "lr": 0.01},
    )
    batch = list(loader.epoch(1))[0]
    query, key = copy.deepcopy(state.encoders.query), copy.deepcopy(state.encoders.key)
    other, memory = copy.deepcopy(state.encoders.other), copy.deepcopy(state.memory)
    # The encoders need different weights, or else the order of the update and the key's forward pass has no effect.
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in state.encoders.key.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    key.load_state_dict(state.encoders.key.state_dict())
    result = train_step(state, batch, step=2)

    with torch.no_grad():
        for k, q in zip(key.parameters(), query.parameters(), strict=True):
            k.copy_(0.6 * k + 0.4 * q)
        f_k, f_other = key(batch.clips["rgb"][:, 1]), other(batch.clips["flow"][:, 1])
    f_q = query(batch.clips["rgb"][:, 0])
    anchors = torch.stack([f_q.detach() if anchor == "query" else f_k, f_other])
    mined = reference_mine(anchors, memory, batch.source, state.config.mining)
    loss = reference_loss(f_q, f_k, memory, batch.source, mined, protocol, dropped=protocol == "coclr" and drop == 1)
    optimizer = torch.optim.SGD(query.parameters(), 0.01, weight_decay=1e-5)
    before = [parameter.detach().clone() for parameter in query.parameters()]
    loss.backward()
    optimizer.step()

    torch.testing.assert_close(result.loss, loss.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(result.mined_video, memory.video[mined])
    for got, expected, start in zip(state.encoders.query.parameters(), query.parameters(), before, strict=True):
        error, moved = (got - expected).detach().abs().max(), (expected - start).detach().abs().max()
        assert error <= 2e-3 * moved + 1e-6
    for got, expected in zip(state.encoders.key.parameters(), key.parameters(), strict=True):
        torch.testing.assert_close(got, expected)
    memory.enqueue(
        torch.stack([f_k, f_other]),
        source=batch.source,
        video=batch.video,
        label=batch.label,
        start=batch.start[:, 1],
        step=2,
    )
    torch.testing.assert_close(state.memory.features, memory.features, rtol=0, atol=2e-3)
    for name in ("source", "video", "label", "start", "enqueued_at"):
        assert torch.equal(getattr(state.memory, name), getattr(memory, name)), name


def test_nothing_learns_until_the_memory_is_full(tmp_path):
    config = settings(tmp_path)
    state = CycleState(config, Cycle("rgb", 1, "cascade"), {}, INDEX, ALONE)
    before = copy.deepcopy(state.encoders)
    batches = RandomLoader(INDEX, config.data, state.views, seed=0).epoch(0)
    for step in (0, 1):
        result = train_step(state, next(batches), step)
        assert result.loss.isnan()
        assert result.mined_video is None
    assert_same(list(before.query.parameters()), list(state.encoders.query.parameters()))
    assert_same(before.other.state_dict(), state.encoders.other.state_dict())
    for old, new in ((before.query, state.encoders.query), (before.key, state.encoders.key)):
        assert not torch.equal(running_statistics(old)[0], running_statistics(new)[0])
    assert not train_step(state, next(batches), 2).loss.isnan()
    assert_same(before.other.state_dict(), state.encoders.other.state_dict())
    assert all(p.grad is None for p in state.encoders.key.parameters())


def test_features_of_the_loop_are_normalised(tmp_path):
    state, _ = a_state(tmp_path)
    torch.testing.assert_close(state.memory.features.norm(dim=2), torch.ones(2, 10))
    torch.testing.assert_close(F.normalize(state.memory.features, dim=2), state.memory.features)
