"""Compares InfoNCE and UberNCE on a queue, from the first step on, with MoCo's queue and losses in plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
from support.small_steps import ALONE, INDEX, settings
from support.stand_in_loader import RandomLoader
from torch.nn import functional as F

from cpr_fast.config import Config, Cycle
from cpr_fast.models import running_statistics
from cpr_fast.pretrain.state.cycle import CycleState
from cpr_fast.pretrain.step.step import train_step

TAU, MOMENTUM = 0.07, 0.6

pytestmark = pytest.mark.usefixtures("one_thread")


def small(**sections) -> Config:
    model = {"arch": "r3d", "width": 0.125, "feature_dim": 8}
    memory = {"size": 10, "ema_momentum": MOMENTUM} | sections.pop("memory", {})
    return settings(data={"batch_size": 6, "frames": 8, "size": 16}, model=model, memory=memory, **sections)


@pytest.mark.parametrize("size", [7, 10, 40])  # full in the second step, and not within the five steps
@pytest.mark.parametrize(("mining", "protocol"), [("none", "paper"), ("none", "coclr"), ("label", "coclr")])
def test_every_step_has_the_loss_of_moco(mining, protocol, size):
    """MoCo: the queue starts with random unit vectors of label -1; a step contrasts, and then overwrites the oldest."""
    state = CycleState(small(loss={"protocol": protocol}, memory={"size": size}), Cycle("rgb", 2, mining), {}, INDEX,
                       ALONE)  # fmt: skip
    queue, labels, pointer = state.memory.features[0].double(), torch.full((size,), -1), 0
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(size).double())
    loader = RandomLoader(INDEX, state.config.data, state.views, seed=0)
    for step, batch in enumerate([*loader.epoch(0), *list(loader.epoch(1))[:2]]):
        query, key = copy.deepcopy(state.encoders.query), copy.deepcopy(state.encoders.key)
        with torch.no_grad():
            for k, q in zip(key.parameters(), query.parameters(), strict=True):
                k.lerp_(q, 1 - MOMENTUM)
            keys = key(batch.clips["rgb"][:, 1]).double()
        f_q = query(batch.clips["rgb"][:, 0]).double()
        logits = torch.cat([(f_q * keys).sum(1, keepdim=True), f_q @ queue.T], dim=1) / TAU
        positive = torch.zeros(6, 1 + size)
        positive[:, 0] = 1
        if mining == "label":
            positive[:, 1:] = batch.label[:, None] == labels
        loss = -((F.log_softmax(logits, 1) * positive).sum(1) / positive.sum(1)).mean()
        result = train_step(state, batch, step)
        torch.testing.assert_close(result.loss.double(), loss.detach(), rtol=1e-5, atol=1e-6)
        assert result.mined_video is None and result.rates == {}
        before = list(query.parameters())
        assert not all(map(torch.equal, before, state.encoders.query.parameters()))  # it learns from the first step on
        slots = (pointer + torch.arange(6)) % size
        queue[slots], labels[slots], pointer = keys, batch.label, pointer + 6
        torch.testing.assert_close(state.memory.features[0].double(), queue, rtol=0, atol=1e-5)
    assert state.memory.full == (size < 30)


def test_random_vectors_are_negatives_of_the_mil_form_too():
    """UberNCE in the paper's form, MIL-NCE over the keys of the same label, in the second step."""
    state = CycleState(small(), Cycle("rgb", 1, "label"), {}, INDEX, ALONE)
    batches = RandomLoader(INDEX, state.config.data, state.views, seed=0).epoch(0)
    train_step(state, next(batches), 0)
    batch, memory = next(batches), copy.deepcopy(state.memory)
    query, key = copy.deepcopy(state.encoders.query), copy.deepcopy(state.encoders.key)
    with torch.no_grad():
        for k, q in zip(key.parameters(), query.parameters(), strict=True):
            k.lerp_(q, 1 - MOMENTUM)
        f_q, keys = query(batch.clips["rgb"][:, 0]).double(), key(batch.clips["rgb"][:, 1]).double()
    losses = []
    for b in range(6):
        scores = [float(f_q[b] @ entry / TAU) for entry in (keys[b], *memory.features[0].double())]
        alike = [True] + [k < 6 and bool(memory.label[k] == batch.label[b]) for k in range(10)]  # four are random
        sums = [sum(torch.tensor(s).double().exp() for s, one in zip(scores, alike, strict=True) if one or every)
                for every in (False, True)]  # fmt: skip
        losses.append(-(sums[0] / sums[1]).log())
    assert train_step(state, batch, 1).loss.double() == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_a_cascade_waits_for_its_queue_and_starts_it_empty():
    """The BatchNorm statistics, the key encoder and the queue change meanwhile; the weights do not."""
    state = CycleState(small(), Cycle("rgb", 1, "cascade"), {}, INDEX, ALONE)
    assert not state.memory.features.any() and not state.learning
    start = copy.deepcopy(state.encoders.query)
    with torch.no_grad():
        for weight in state.encoders.key.parameters():
            weight.add_(0.1)
    batches = RandomLoader(INDEX, state.config.data, state.views, seed=0).epoch(0)
    key = [weight.clone() for weight in state.encoders.key.parameters()]
    assert train_step(state, next(batches), 0).loss.isnan() and state.memory.count == 6
    assert all(map(torch.equal, start.parameters(), state.encoders.query.parameters()))
    assert not any(map(torch.equal, key, state.encoders.key.parameters()))
    for encoder in (state.encoders.query, state.encoders.key):
        assert not torch.equal(running_statistics(start)[0], running_statistics(encoder)[0])


@pytest.mark.parametrize(("kind", "mining"), [("bank", "none"), ("bank", "cascade"), ("batch", "none")])
def test_other_memories_start_empty_and_learn_at_once(kind, mining):
    state = CycleState(small(memory={"kind": kind}), Cycle("rgb", 1, mining), {}, INDEX, ALONE)
    assert not state.memory.features.any() and not state.memory.compared.any()
    batch = next(RandomLoader(INDEX, state.config.data, state.views, seed=0).epoch(0))
    assert train_step(state, batch, 0).loss.isfinite()
