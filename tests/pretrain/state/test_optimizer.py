"""The optimiser of a cycle against those of torch: groups, settings, gradients that are limited, scaled gradients."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from support.small_steps import ALONE, INDEX, settings
from support.stand_in_loader import RandomLoader
from torch import nn

from cpr_fast.config import Cycle, ModelConfig, OptimConfig
from cpr_fast.models import build_encoder
from cpr_fast.pretrain.state.cycle import CycleState
from cpr_fast.pretrain.state.optimizer import build_optimizer, set_rates, take_step
from cpr_fast.pretrain.state.schedule import Rates
from cpr_fast.pretrain.step.step import train_step

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = torch.amp.GradScaler("cpu", enabled=False)


class Odd(nn.Module):
    """Parameters that a rule by the number of dimensions alone would decay."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm((3, 4))
        self.linear = nn.Linear(4, 4)
        self.rows_bias = nn.Parameter(torch.randn(3, 4))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.same = self.linear  # shared weights are listed once

    def forward(self, x):
        return self.linear(self.norm(x) + self.rows_bias) * self.scale


def with_gradients(network: nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():  # fused optimisers expect the memory format of the weights, as from autograd
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=draw))


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return build_encoder(ModelConfig(arch="r3d", width=0.0625, feature_dim=8))


@pytest.mark.parametrize("decay_all", [True, False])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_steps_are_those_of_torch_on_two_groups(name, decay_all):
    ours, theirs = encoder(), encoder()
    config = OptimConfig(name=name, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1,
                         decay_norms_and_biases=decay_all)  # fmt: skip
    optimizer = build_optimizer(ours, config)
    named = dict(theirs.named_parameters())
    kept = [p for n, p in named.items() if n.endswith(".bias") or p.ndim == 1]
    assert 0 < len(kept) < len(named)
    groups = [{"params": [p for p in named.values() if not any(p is q for q in kept)]},
              {"params": kept, "weight_decay": 0.1 if decay_all else 0.0}]  # fmt: skip
    kind = torch.optim.AdamW if name == "adamw" else torch.optim.Adam
    reference = kind(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, foreach=False)
    for step, (lr, decay) in enumerate([(0.01, 0.1), (0.02, 0.3), (0.005, 0.0)]):
        set_rates(optimizer, lr, decay)
        for group in reference.param_groups:
            group["lr"] = lr
        reference.param_groups[0]["weight_decay"] = decay
        reference.param_groups[1]["weight_decay"] = decay if decay_all else 0.0
        with_gradients(ours, step)
        with_gradients(theirs, step)
        assert take_step(optimizer, PLAIN, 0.0) is None
        reference.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_norms_biases_and_single_numbers_are_not_decayed():
    network = Odd()
    before = copy.deepcopy(network)
    optimizer = build_optimizer(network, OptimConfig(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.5,
                                                     decay_norms_and_biases=False))  # fmt: skip
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    take_step(optimizer, PLAIN, 0.0)
    for (name, old), new in zip(before.named_parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(new, old * (0.5 if name == "linear.weight" else 1.0), rtol=0, atol=0)


def test_the_default_is_one_group_with_all_parameters():
    network = encoder()
    (group,) = build_optimizer(network, OptimConfig()).param_groups
    assert all(a is b for a, b in zip(group["params"], network.parameters(), strict=True))
    reference = torch.optim.Adam(network.parameters(), 1e-3, weight_decay=1e-5, fused=True)
    (expected,) = reference.param_groups
    assert {key: value for key, value in group.items() if key != "params"} == {
        key: value for key, value in expected.items() if key != "params"
    }


@pytest.mark.parametrize("scale", [None, 2.0**10])
@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_a_long_gradient_is_scaled_to_the_limit(scale, limit):
    """A scaler for fp16 multiplies the gradients; they are compared with the limit after they were divided again."""
    network = encoder()
    before = copy.deepcopy(network)
    optimizer = build_optimizer(network, OptimConfig(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    with_gradients(network, 0)
    gradients = [parameter.grad.double() for parameter in network.parameters()]
    for parameter in network.parameters():
        parameter.grad *= scale or 1.0
    scaler.scale(torch.zeros(()))  # as the backward pass does
    norm = take_step(optimizer, scaler, limit)
    expected = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
    factor = min(1.0, limit / expected.item())
    for old, new, gradient in zip(before.parameters(), network.parameters(), gradients, strict=True):
        torch.testing.assert_close(new.double(), old.double() - factor * gradient, rtol=1e-4, atol=1e-5)
        assert new.grad is None


def test_infinite_gradients_of_fp16_skip_the_step():
    network = encoder()
    before = copy.deepcopy(network)
    optimizer = build_optimizer(network, OptimConfig(name="adamw", weight_decay=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    with_gradients(network, 0)
    next(network.parameters()).grad[0] = torch.inf
    take_step(optimizer, scaler, 1.0)
    assert scaler.get_scale() == 4.0
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), network.parameters(), strict=True))


def test_the_rates_of_a_step_reach_the_optimiser_and_the_key_encoder():
    config = settings(optim={"name": "sgd", "lr": 0.01, "clip_norm": 1e-3, "momentum": 0.9})
    state = CycleState(config, Cycle("rgb", 1, "none", momentum=0.0), {}, INDEX, ALONE)
    batch = next(iter(RandomLoader(INDEX, config.data, state.views, seed=0).epoch(0)))
    state.set_rates(Rates(lr=2.0, weight_decay=0.0, ema_momentum=0.25))
    for parameter in state.encoders.query.parameters():
        parameter.data += 0.1
    query, key = ([p.detach().clone() for p in e.parameters()] for e in (state.encoders.query, state.encoders.key))
    result = train_step(state, batch, 0)
    for old, start, new in zip(key, query, state.encoders.key.parameters(), strict=True):
        torch.testing.assert_close(new, 0.25 * old + 0.75 * start)
    moved = torch.cat([(a - b.detach()).flatten() for a, b in zip(query, state.encoders.query.parameters(),
                                                                 strict=True)])  # fmt: skip
    assert result.grad_norm.item() > 1e-3 and moved.norm().item() == pytest.approx(2e-3, rel=1e-3)


def test_a_key_encoder_that_is_the_query_encoder_has_no_momentum():
    config = settings(memory={"kind": "batch", "final_ema_momentum": 1.0})
    state = CycleState(config, dataclasses.replace(config.schedule.cycles[0], mining="none"), {}, INDEX, ALONE)
    state.set_rates(Rates(lr=0.1, weight_decay=0.0, ema_momentum=0.5))
    assert state.encoders.momentum is None
