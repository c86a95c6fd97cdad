"""A queue whose features are divided among processes: content, mining, rates and checkpoints are those of one."""

from __future__ import annotations

import pytest
import torch
from support.processes.gloo import on_processes

from cpr_fast.ops import Shard
from cpr_fast.pretrain.state import shards
from cpr_fast.pretrain.state.cascade import Cascade, mine, mining_rates
from cpr_fast.pretrain.state.memory import Memory

SIZE, WIDTH, BATCH = 4099, 12, 700  # 5 parts; the ring wraps in the middle of a batch
CASCADE = Cascade((1, 0, 1), (2000, 300, 4))
COLUMNS = ("source", "video", "label", "start", "enqueued_at")


def fill(memories: list[Memory], steps: int) -> None:
    """Enqueues the same keys in every memory."""
    draw = torch.Generator().manual_seed(0)
    for step in range(steps):
        keys = torch.nn.functional.normalize(torch.randn(2, BATCH, WIDTH, generator=draw), dim=2)
        number = torch.arange(step * BATCH, (step + 1) * BATCH)
        ids = {"source": number // 3 % 500, "video": number, "label": number // 3 % 7 - 1, "start": number + 9}
        for memory in memories:
            memory.enqueue(keys, **ids, step=step)


def queries_of(rank: int, processes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns anchors, sources and labels of the queries of one process, of 8 in all."""
    draw = torch.Generator().manual_seed(1)
    anchors = torch.nn.functional.normalize(torch.randn(2, 8, WIDTH, generator=draw), dim=2)
    rows = slice(rank * 8 // processes, (rank + 1) * 8 // processes)
    return anchors[:, rows].contiguous(), torch.arange(8)[rows] * 50, torch.arange(8)[rows] % 4 - 1


def of_rank(rank: int, processes: int, state: dict | None) -> dict:
    """Checks one process's part of a memory, which continues from `state`; returns its new state."""
    shard = Shard(SIZE, rank, processes)
    part, whole = Memory(2, SIZE, WIDTH, seed=3, shard=shard), Memory(2, SIZE, WIDTH, seed=3)
    assert part.size == SIZE and part.features.shape == (2, shard.end - shard.begin, WIDTH)
    for steps in (0, 3, 9):  # random vectors alone, some keys, and more keys than slots
        if steps == 9 and state is not None:
            part.load_state_dict(state)
            fill([whole], steps)
        else:
            fill([part, whole], steps)
        assert torch.equal(part.features, whole.features[:, shard.begin : shard.end]), steps
        assert part.full == whole.full and torch.equal(part.ids("source"), whole.ids("source"))
    slots = torch.tensor([[0, SIZE - 1, 17], [2500, 2500, 1024]])
    assert torch.equal(part.entries(1, slots), whole.entries(1, slots))
    anchors, source, label = queries_of(rank, processes)
    mined = mine(anchors, part, source, CASCADE)
    assert torch.equal(mined, mine(anchors, whole, source, CASCADE))
    for most in (None, 1):
        arguments = (source, CASCADE, mined, label, 20, most)
        rates, expected = (mining_rates(anchors, memory, *arguments) for memory in (part, whole))
        assert rates.keys() == expected.keys()
        for name, rate in expected.items():
            torch.testing.assert_close(rates[name], rate, rtol=0, atol=1e-3 if name == "view_agreement" else 0,
                                       equal_nan=True)  # fmt: skip
    saved = part.state_dict()
    assert (saved["features"] is None) == (rank > 0)
    if rank == 0:
        assert torch.equal(saved["features"], whole.features) and saved["count"] == whole.count
    return saved


@pytest.mark.slow
def test_parts_of_two_and_four_processes_are_the_whole_and_continue_each_other(tmp_path):
    state = on_processes(of_rank, 2, tmp_path, None)[0]
    state = on_processes(of_rank, 4, tmp_path, state)[0]
    alone = Memory(2, SIZE, WIDTH)
    alone.load_state_dict(state)
    whole = Memory(2, SIZE, WIDTH, seed=3)
    for steps in (3, 9):
        fill([whole], steps)
    assert all(torch.equal(getattr(alone, name), getattr(whole, name)) for name in ("features", *COLUMNS))


def test_queries_are_compared_in_parts(monkeypatch):
    monkeypatch.setattr(shards, "_AT_ONCE", 1)
    part, whole = Memory(2, SIZE, WIDTH, seed=3, shard=Shard(SIZE, 0, 1)), Memory(2, SIZE, WIDTH, seed=3)
    fill([part, whole], 3)
    anchors, source, label = queries_of(0, 1)
    mined = mine(anchors, whole, source, CASCADE)
    found, expected = (mining_rates(anchors, memory, source, CASCADE, mined, label, 20) for memory in (part, whole))
    assert found.keys() == expected.keys()
    for name, rate in expected.items():
        torch.testing.assert_close(found[name], rate, rtol=0, atol=1e-6, equal_nan=True)


def test_a_state_of_another_size_is_refused():
    part = Memory(2, SIZE, WIDTH, shard=Shard(SIZE, 1, 2))
    with pytest.raises(ValueError, match=r"memory features: expected \[2, 4099, 12\], got \[2, 4100, 12\]"):
        part.load_state_dict(Memory(2, SIZE + 1, WIDTH).state_dict())
