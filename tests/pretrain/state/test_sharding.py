"""Sharded encoders (FSDP2): equal to a single process, resumed bit for bit, and read without sharding."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.processes.two_processes import VIDEOS, torchrun
from support.small_runs import assert_same, everything, rows, settings
from support.stand_in_loader import RandomLoader, make_index
from torch import nn
from torch.distributed.fsdp import FSDPModule

from cpr_fast.config import Config, ConfigError, DataConfig, ModelConfig
from cpr_fast.errors import InputError
from cpr_fast.models import build_encoder
from cpr_fast.pretrain.ledger.chain import FILE, read_ledger
from cpr_fast.pretrain.ledger.rows import checksum
from cpr_fast.pretrain.run.loop import pretrain
from cpr_fast.pretrain.state import sharding
from cpr_fast.runtime.distributed import World
from cpr_fast.weights.checkpoint import load_encoders

pytestmark = pytest.mark.usefixtures("one_thread")

ALONE = World(0, 1, torch.device("cpu"))
# 5 x 24 and other odd numbers of rows, which two processes cannot divide evenly.
ARGS = {"tubelet": [2, 8, 8], "depth": 2, "width": 30, "heads": 2, "positions": "learned", "class_token": True}
CLIPS = {"frames": 8, "size": 16}


@pytest.fixture
def group():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def encoder() -> nn.Module:
    torch.manual_seed(5)
    return build_encoder(ModelConfig(arch="vit", args=ARGS, feature_dim=7), DataConfig(**CLIPS))


def step(network: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    clips = torch.randn(3, 3, 8, 16, 16, generator=torch.Generator().manual_seed(number))
    network(clips)[:, :3].sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    "make",
    [
        lambda weights, fused: torch.optim.AdamW(weights, 1e-2, fused=True),
        lambda weights, fused: torch.optim.SGD(weights, 1e-2, momentum=0.9, fused=fused),
    ],
    ids=["adamw", "sgd"],
)
def test_states_are_whole_and_go_on_with_and_without_sharding(group, make):
    """After two steps the state of a sharded network and its optimiser continues in a network that is not, and back."""
    plain, parted = encoder(), sharding.shard(encoder(), ALONE)
    networks = {True: parted, False: plain}
    optimizers = {sharded: make(network.parameters(), not sharded) for sharded, network in networks.items()}
    for number in (0, 1):
        for sharded, network in networks.items():
            step(network, optimizers[sharded], number)
    held = sharding.whole(parted.state_dict()), sharding.whole(optimizers[True].state_dict())
    assert not any(map(sharding.is_sharded, held[0].values()))
    assert_close(held[0], plain.state_dict())
    for name in held[1]["state"][0]:
        assert_close({n: of[name] for n, of in held[1]["state"].items()},
                     {n: of[name] for n, of in optimizers[False].state_dict()["state"].items()})  # fmt: skip
    ends = []
    for sharded in (True, False):
        other = sharding.shard(encoder(), ALONE) if sharded else encoder()
        continued = make(other.parameters(), not sharded)
        sharding.load_network(other, copy.deepcopy(held[0]))
        sharding.load_optimizer(continued, copy.deepcopy(held[1]))
        step(other, continued, 2)
        ends.append(sharding.whole(other.state_dict()))
        assert continued.param_groups[0]["fused"] == optimizers[sharded].param_groups[0]["fused"]
    step(parted, optimizers[True], 2)
    assert_same(ends[0], sharding.whole(parted.state_dict()))
    assert_close(ends[1], ends[0])


def assert_close(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-7)


def test_checksums_of_parts_are_those_of_the_whole(group):
    weights = list(sharding.shard(encoder(), ALONE).parameters())
    sums = torch.stack([checksum(weight) for weight in sharding.local(weights)])
    assert sharding.sum_of_shards(sums, weights).tolist() == [checksum(w).item() for w in encoder().parameters()]


def test_forward_passes_of_a_frozen_encoder_leave_nothing_behind(group):
    """torch records every forward pass until a backward pass. In a network that learns, that is as it was."""
    networks = {frozen: sharding.shard(encoder().requires_grad_(not frozen), ALONE) for frozen in (True, False)}
    clips = torch.randn(2, 3, 8, 16, 16)

    def recorded(network):
        groups = [group for module in network.modules() if isinstance(module, FSDPModule)
                  for group in module._get_fsdp_state()._fsdp_param_groups]  # fmt: skip
        return len(groups[0].comm_ctx.post_forward_order) + sum(len(group._post_forward_indices) for group in groups)

    for _ in range(3):
        with torch.no_grad():
            features = networks[True](clips)
    assert recorded(networks[True]) == 0
    assert torch.equal(networks[False](clips), features) and recorded(networks[False]) > 2
    networks[False](clips).sum().backward()
    assert recorded(networks[False]) == 0


def test_what_is_not_sharded_stays_the_same_object():
    network = encoder()
    state, weights = network.state_dict(), list(network.parameters())
    assert sharding.whole(state) is state and sharding.whole({"a": [1]})["a"] == [1]
    assert all(a is b for a, b in zip(sharding.local(weights), weights, strict=True))
    values = torch.arange(3)
    assert sharding.sum_of_shards(values, weights[:3]) is values
    assert sharding.part_of(values, weights[0]) is values


@pytest.mark.parametrize("arch", ["s3d", "r3d"])
def test_networks_with_batch_norm_are_refused(arch):
    network = build_encoder(ModelConfig(arch=arch, width=0.125), DataConfig(**CLIPS))
    with pytest.raises(InputError, match=r"run.shard: expected a network without BatchNorm, .* with \d+ layers"):
        sharding.shard(network, ALONE)


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        (
            "optim",
            {"precision": "fp16"},
            "optim.precision: expected 'fp32' or 'bf16' with run.shard = true, got 'fp16'",
        ),
        ("optim", {"name": "apex_lamb"}, "optim.name: expected 'adam' or 'adamw' or 'sgd' with run.shard"),
        ("health", {"online_every": 2}, "health.online_every: expected 0 with run.shard = true, got 2"),
        ("run", {"compile": "default", "shard": True}, "run.compile: expected 'none' with run.shard"),
    ],
)
def test_settings_that_cannot_be_combined_are_refused(section, values, said):
    with pytest.raises(ConfigError, match=said):
        Config.from_dict({"run": {"shard": True}, **{section: values}})


# eps: at 1e-8 AdamW makes a full step of a gradient that is only rounding.
ADAMW = {"name": "adamw", "lr": 1e-3, "eps": 1e-3, "decay_norms_and_biases": False, "clip_norm": 0.5}


def config_of(out: Path, batch_size: int, *, shard: bool, **run) -> Config:
    """An InfoNCE cycle and a CPR cycle of three steps per epoch, of a small transformer."""
    sections = {
        "data": {"batch_size": batch_size, **CLIPS},
        "model": {"arch": "vit", "args": ARGS, "width": 1.0, "feature_dim": 8},
        "memory": {"size": 50, "shuffle_bn_groups": 2},
        "optim": ADAMW,
        "schedule": {"cycles": [{"view": "rgb", "epochs": 1, "mining": "none"}, {"view": "flow", "epochs": 2}]},
        "run": {"out": str(out), "shard": shard, **run},
    }
    return settings(out, **sections)


def run_on_two(folder: Path, config: Config, plan: dict | None = None) -> Path:
    process = torchrun(folder, config, plan or {})
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 0, errors
    return Path(config.run.out)


def run_on_one(config: Config, **options) -> Path:
    return pretrain(config, index=make_index(VIDEOS), make_loader=RandomLoader, progress=False, **options)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A sharded run on 2 processes of 16 videos each."""
    folder = tmp_path_factory.mktemp("sharded")
    return run_on_two(folder, config_of(folder / "two", 16, shard=True, keep_checkpoints=9))


def assert_close_runs(first: Path, second: Path) -> None:
    """Asserts that runs are equal up to the order of sums: losses within 1e-5, weights, which move by 1e-3 per step,
    within 1e-6, and the same sample plan and mined slots."""
    curves = [[row["loss"] for row in rows(folder, "step")] for folder in (first, second)]
    waits = [False] * 3 + [True] * 2 + [False] * 4  # the cascade
    assert all([loss is None for loss in curve] == waits for curve in curves)
    learnt = [[loss for loss in curve if loss is not None] for curve in curves]
    assert learnt[0] == pytest.approx(learnt[1], rel=1e-5)
    for name in ("plan", "mined"):
        assert [row.get(name) for row in read_ledger(first)] == [row.get(name) for row in read_ledger(second)]
    a, b = everything(first), everything(second)
    for view, network in a["encoders"].items():
        for name, tensor in network.items():
            torch.testing.assert_close(b["encoders"][view][name], tensor, rtol=1e-5, atol=1e-6)
    states = [payload["cycle_state"]["optimizer"]["state"] for payload in (a, b)]
    for number, values in states[0].items():
        torch.testing.assert_close(states[1][number]["exp_avg"], values["exp_avg"], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_two_sharded_processes_have_the_curve_of_one(two, tmp_path):
    """The checkpoint of two is also continued by one process, after the third and the sixth of nine steps."""
    one = run_on_one(config_of(tmp_path / "one", 32, shard=False))
    assert_close_runs(one, two)
    held = everything(two)
    sums = [checksum(tensor).item() for state in (held["encoders"]["flow"], held["cycle_state"]["key"])
            for tensor in state.values()]  # fmt: skip
    digest = hashlib.blake2b(struct.pack(f"<{len(sums)}q", *sums), digest_size=8).hexdigest()
    assert read_ledger(two)[-1]["weights"] == digest  # put together from shards, it is that of the whole
    config, encoders = load_encoders(two / "checkpoints" / "last.pt")  # as the commands read it
    assert config.run.shard and set(encoders) == {"rgb", "flow"}
    for step in (3, 6):
        out = tmp_path / f"from-{step}"
        shutil.copytree(two, out, ignore=shutil.ignore_patterns("*.pt"))
        shutil.copy(two / "checkpoints" / f"step-{step:08d}.pt", out / "checkpoints" / "last.pt")
        run_on_one(config_of(out, 32, shard=True), resume=True)
        assert_close_runs(one, out)


@pytest.mark.slow
def test_a_sharded_run_goes_on_bit_for_bit_and_is_replayed(two, tmp_path):
    """A worker is killed at the eighth step; afterwards the run of both is verified by two processes."""
    config = config_of(tmp_path / "run", 16, shard=True, checkpoint_every=1, keep_checkpoints=9)
    out = run_on_two(tmp_path, config, {"die": 7})
    assert rows(out, "note")[-1]["text"] == "resumed at step 7"
    assert_same(everything(two), everything(out))
    assert (out / FILE).read_bytes() == (two / FILE).read_bytes()
    run_on_two(tmp_path, config, {"verify": 6})
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["equal"] and (result["first_step"], result["last_step"]) == (6, 9)
