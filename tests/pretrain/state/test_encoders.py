"""BatchNorm groups and shuffled keys: one process with G groups computes what G processes do."""

from __future__ import annotations

import copy

import pytest
import torch
from support.processes.gloo import on_processes
from support.small_runs import ALONE, INDEX, run, settings

from cpr_fast.config import Cycle, MemoryConfig, ModelConfig
from cpr_fast.config.checks import batch_norm_groups
from cpr_fast.errors import InputError
from cpr_fast.models import build_encoder, running_statistics
from cpr_fast.pretrain.state.cycle import CycleState
from cpr_fast.pretrain.state.encoders import Encoders, GroupedEncoder
from cpr_fast.runtime.distributed import World

pytestmark = pytest.mark.usefixtures("one_thread")


def test_groups_share_no_batch_statistics():
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(width=0.125, feature_dim=8))
    alone = copy.deepcopy(encoder)
    clips = torch.randn(6, 3, 5, 20, 20)
    grouped = GroupedEncoder(encoder, 3)(clips)
    parts = []
    before = [s.clone() for s in running_statistics(alone)]
    statistics = [torch.zeros_like(s) for s in before]
    for part in clips.split(2):
        for tensor, old in zip(running_statistics(alone), before, strict=True):
            tensor.copy_(old)
        parts.append(alone(part))
        for total, tensor in zip(statistics, running_statistics(alone), strict=True):
            total += tensor / 3
    torch.testing.assert_close(grouped, torch.cat(parts))
    torch.testing.assert_close(running_statistics(encoder), statistics)
    grouped.sum().backward()  # copying the statistics does not change tensors saved by autograd
    assert all(p.grad is not None for p in encoder.parameters())


def gradients(rank: int, processes: int, parts: int) -> list[dict[str, torch.Tensor]]:
    """Returns the gradients of three steps with the same clips and weights."""
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(arch="r3d", width=0.0625, feature_dim=8))
    world = World(rank, processes, torch.device("cpu"))
    encoders = Encoders(encoder, None, momentum=0.9, groups=processes * parts, seed=0, world=world, parts=parts)
    clips = torch.randn(4, 3, 8, 16, 16, generator=torch.Generator().manual_seed(rank))
    steps = []
    for _ in range(3):
        for _, part in encoders.parts(clips):
            encoders.encode_query(part)[:, :3].sum().backward()
        steps.append({name: weight.grad.clone() for name, weight in encoder.named_parameters()})
        encoder.zero_grad(set_to_none=True)
    return steps


@pytest.mark.parametrize("parts", [1, 2])
def test_four_processes_add_gradients_in_the_same_order_in_every_step(tmp_path, parts):
    """So that the first step of a resumed run, with new buckets of gradients, is that of an uninterrupted one."""
    of_ranks = on_processes(gradients, 4, tmp_path, parts)
    for name, gradient in of_ranks[0][0].items():
        for steps in of_ranks:
            assert all(torch.equal(step[name], gradient) for step in steps), name
    apart = [gradients_alone(rank, parts) for rank in range(4)]
    for name, gradient in of_ranks[0][0].items():
        expected = torch.stack([alone[name] for alone in apart]).double().mean(0)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)


def gradients_alone(rank: int, parts: int) -> dict[str, torch.Tensor]:
    """Returns the gradients of one of the four processes before they are averaged."""
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(arch="r3d", width=0.0625, feature_dim=8))
    clips = torch.randn(4, 3, 8, 16, 16, generator=torch.Generator().manual_seed(rank))
    for part in clips.chunk(parts):
        encoder(part)[:, :3].sum().backward()
    return {name: weight.grad for name, weight in encoder.named_parameters()}


def test_shuffled_keys_stay_with_their_queries():
    """In eval mode BatchNorm does not depend on the batch: with and without shuffling, keys and their order are
    equal.
    """
    torch.manual_seed(0)
    encoder = build_encoder(ModelConfig(width=0.125, feature_dim=8))
    encoders = Encoders(encoder, None, momentum=0.9, groups=4, seed=0, world=ALONE)
    encoders.key.eval()
    clips = torch.randn(8, 3, 5, 20, 20)
    for step in (0, 1):
        torch.testing.assert_close(encoders.encode_keys(clips, step), encoders.key(clips))
    encoders.key.train()
    orders = [encoders.encode_keys(clips, step) for step in (0, 1, 0)]
    assert torch.equal(orders[0], orders[2])
    assert not torch.allclose(orders[0], orders[1])  # different groups have different statistics


def test_groups_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"memory.shuffle_bn_groups: expected a divisor of the 6 clips of a step"):
        run(settings(tmp_path, memory={"size": 10, "shuffle_bn_groups": 4}))
    with pytest.raises(InputError, match=r"memory.shuffle_bn_groups: expected a multiple of the 2 processes, got 3"):
        batch_norm_groups(3, clips=6, processes=2)


def test_without_a_setting_there_is_one_group_per_process():
    assert MemoryConfig().shuffle_bn_groups is None
    assert [batch_norm_groups(None, clips=6, processes=processes) for processes in (1, 2, 3)] == [1, 2, 3]
    assert batch_norm_groups(6, clips=12, processes=3) == 6


def test_a_memory_shorter_than_the_keys_of_all_processes_is_refused(tmp_path):
    config = settings(tmp_path)  # 10 slots, 6 videos per process
    with pytest.raises(InputError, match=r"memory.size: expected at least the 12 keys of a step, .* got 10"):
        CycleState(config, Cycle("rgb", 1, "none"), {}, INDEX, World(0, 2, torch.device("cpu")))
