"""A step never waits for the device: tested on tensors without data, whose values cannot be read, and on CUDA."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.small_steps import ALONE, INDEX, settings
from support.stand_in_loader import RandomLoader
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from cpr_fast.config import Cycle
from cpr_fast.pretrain.state.cycle import CycleState
from cpr_fast.pretrain.step.step import train_step
from cpr_fast.runtime.distributed import World

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPS = {"memory": {"size": 10, "shuffle_bn_groups": 3}}
BANK = {"memory": {"kind": "bank"}}
METHODS = {
    "infonce": ("none", {}),
    "ubernce": ("label", GROUPS),
    "coclr": ("cascade", {"mining": {"stages": 1}}),
    "cpr": ("cascade", GROUPS | {"optim": {"accumulate": 3}}),
    "cpr with limited gradients": ("cascade", {"optim": {"clip_norm": 1.0}}),
    "cpr recomputed": ("cascade", {"model": {"recompute": True}}),
    "bank": ("cascade", BANK),
    "batch": ("cascade", {"memory": {"kind": "batch"}}),
    "iic": ("none", BANK | {"model": {"shared": True}, "loss": {"intra_negatives": "repeat"}}),
    "iic+cpr": ("cascade", BANK | {"model": {"shared": True}, "loss": {"intra_negatives": "shuffle"}}),
}


class WaitError(AssertionError):
    """Raised where the host would have to wait for the device."""


class NoWaiting(TorchDispatchMode):
    """Raises WaitError for copies between devices without `non_blocking=True`."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if operator in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            given = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False))
            given |= kwargs or {}
            source = given["src"] if "src" in given else given["self"]
            if source.device != out.device and not given.get("non_blocking"):
                raise WaitError(f"{operator} from {source.device} to {out.device}")
        return out


def a_step(method: str, protocol: str, world: World, precision: str = "fp32") -> tuple[CycleState, RandomLoader]:
    mining, sections = METHODS[method]
    sections = sections | {
        "data": {"frames": 8, "size": 16},
        "model": {"arch": "r3d"} | sections.get("model", {}),
        "loss": {"protocol": protocol} | sections.get("loss", {}),
        "optim": {"precision": precision} | sections.get("optim", {}),
    }
    config = settings(**sections)
    cycle = Cycle("rgb", 1, mining, other="residual" if config.model.shared else None)
    state = CycleState(config, cycle, {}, INDEX, world)
    return state, RandomLoader(INDEX, config.data, state.views, seed=0)


def move(holder: object, device: str) -> None:
    """Moves all tensors among the attributes of an object to a device."""
    vars(holder).update(tree_map_only(Tensor, lambda tensor: tensor.to(device), vars(holder)))


def move_clips(batch: SimpleNamespace, device: str) -> None:
    """Moves the clips of a batch to a device. The ids stay on the host, as those of TrainLoader do."""
    batch.clips = {view: clips.to(device) for view, clips in batch.clips.items()}


@pytest.mark.parametrize("protocol", ["paper", "coclr"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_asks_nothing_of_the_device(method, protocol, monkeypatch):
    """On the meta device tensors have no values: every operation that reads one raises."""
    state, loader = a_step(method, protocol, ALONE)
    batch = next(iter(loader.epoch(0)))
    for holder in (state, state.memory, state.quality, state.health):
        move(holder, "meta")
    move_clips(batch, "meta")
    for encoder in (state.encoders.query, state.encoders.key, state.encoders.other):
        if encoder is not None:
            encoder.to("meta")
    state.optimizer = torch.optim.SGD(state.encoders.query.parameters(), 0.01)  # the fused optimiser has no meta kernel
    state.memory.count = state.memory.size
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # does not know the device
    with NoWaiting():
        result = train_step(state, batch, 3)
    assert result.loss.is_meta and result.queries.is_meta
    assert (result.mined_video is not None) == (state.cycle.mining == "cascade")


@pytest.mark.parametrize(
    "question",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.unique(),
        lambda x: x.cpu(),
        lambda x: torch.ones(3).to(x.device),
        lambda x: x.copy_(torch.ones(3)),
    ],
)
def test_such_questions_are_noticed(question):
    with NoWaiting(), pytest.raises((WaitError, RuntimeError)):  # torch raises NotImplementedError, a RuntimeError
        question(torch.zeros(3, device="meta"))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("protocol", ["paper", "coclr"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_on_cuda_does_not_synchronise(device, method, protocol, precision):
    state, loader = a_step(method, protocol, World(0, 1, device), precision)
    batches = [*loader.epoch(0), *loader.epoch(1)][:4]
    for batch in batches:
        move_clips(batch, "cuda")
    for step, batch in enumerate(batches[:3]):  # fill the memory, and let libraries initialise themselves
        train_step(state, batch, step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = train_step(state, batches[3], 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.loss.isfinite()
    assert (result.mined_video is not None) == (state.cycle.mining == "cascade")
