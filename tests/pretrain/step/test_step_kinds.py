"""Compares steps with every kind of memory, in parts and with recomputed activations, with plain torch and each
other.
"""

from __future__ import annotations

import copy

import pytest
import torch
from support.small_steps import ALONE, INDEX, settings
from support.stand_in_loader import RandomLoader
from torch.nn import functional as F

from cpr_fast.config import Config, Cycle
from cpr_fast.pretrain.state.cycle import CycleState
from cpr_fast.pretrain.step.step import train_step


def epoch(config: Config, mining: str = "cascade") -> tuple[CycleState, list]:
    """Returns the state after three steps, and their results."""
    state = CycleState(config, Cycle("rgb", 1, mining), {}, INDEX, ALONE)
    batches = RandomLoader(INDEX, config.data, state.views, seed=0).epoch(0)
    return state, [train_step(state, batch, step) for step, batch in enumerate(batches)]


def test_the_batch_as_memory_is_nt_xent():
    """Compares loss and gradient step without mining with SimCLR's loss in float64."""
    config = settings(memory={"kind": "batch"}, optim={"name": "sgd", "lr": 0.01, "weight_decay": 0.0})
    state = CycleState(config, Cycle("rgb", 1, "none"), {}, INDEX, ALONE)
    batch = next(iter(RandomLoader(INDEX, config.data, state.views, seed=0).epoch(0)))
    encoder = copy.deepcopy(state.encoders.query)
    result = train_step(state, batch, 0)
    features = encoder(batch.clips["rgb"].flatten(0, 1)).double()
    scores = (features @ features.T / 0.07).fill_diagonal_(-torch.inf)
    loss = F.cross_entropy(scores, torch.arange(12) ^ 1)
    torch.testing.assert_close(result.loss.double(), loss.detach(), rtol=1e-6, atol=0)
    loss.backward()
    for got, start in zip(state.encoders.query.parameters(), encoder.parameters(), strict=True):
        moved = 0.01 * start.grad
        assert (got - (start - moved)).abs().max() <= 2e-3 * moved.abs().max() + 1e-6


@pytest.mark.parametrize("kind", ["queue", "bank", "batch"])
@pytest.mark.parametrize("protocol", ["paper", "coclr"])
def test_every_memory_is_mined_without_siblings(kind, protocol):
    state, results = epoch(settings(memory={"kind": kind}, loss={"protocol": protocol}))
    if kind == "bank":  # only now is the memory full: mining starts in the second epoch
        batches = RandomLoader(INDEX, state.config.data, state.views, seed=0).epoch(1)
        results = [train_step(state, next(batches), 3)]
    last = results[-1]
    assert last.loss.isfinite() and last.mined_video.shape[1] == 2
    sources = torch.from_numpy(INDEX.source_ids)
    query = last.video[:, None].expand_as(last.mined_video)
    found = last.mined_video >= 0
    assert found.any() and (sources[last.mined_video[found]] != sources[query[found]]).all()


def test_parts_of_a_batch_give_the_gradients_of_the_whole():
    memory = {"size": 10, "shuffle_bn_groups": 3}
    whole, parts = (epoch(settings(memory=memory, optim={"accumulate": n}))[0] for n in (1, 3))
    for a, b in zip(whole.encoders.query.parameters(), parts.encoders.query.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(whole.encoders.query.buffers(), parts.encoders.query.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["queue", "batch"])
def test_recomputed_activations_change_nothing(kind):
    kept, recomputed = (epoch(settings(memory={"kind": kind}, model={"recompute": on}))[0] for on in (False, True))
    for name, value in kept.encoders.query.state_dict().items():
        assert torch.equal(value, recomputed.encoders.query.state_dict()[name]), name
