"""BatchNorm groups and shuffled keys: one process with G groups computes what G processes do."""

from __future__ import annotations

import copy

import pytest
import torch
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
