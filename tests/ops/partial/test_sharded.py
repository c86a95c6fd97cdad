"""A memory divided among processes of a gloo group: selection, loss and gradients are those of one process."""

from __future__ import annotations

import pytest
import torch
from support.processes.gloo import on_processes

from cpr_fast.ops import (
    Shard,
    cascade_select,
    mil_nce,
    mil_nce_merge,
    mil_nce_partial,
    sharded_cascade_select,
    sharded_mil_nce,
)
from cpr_fast.ops.partial import sharded

K, N, D = 5003, 12, 16  # entries, queries of all processes, width: 5 parts, the last of them shorter
VIEWS, KEEP = [1, 0, 1], [2500, 600, 7]
CASES = {  # how many slots are filled, and how many entries each stage keeps
    "full": (K, KEEP),
    "filling": (900, KEEP),
    "three entries": (3, KEEP),
    "empty": (0, KEEP),
    "keeps almost all": (K, [K + 5, K, 4000]),
}


def example(filled: int = K) -> dict[str, torch.Tensor]:
    """Features with many equal scores, over the bounds of every shard, in a memory whose first slots are filled."""
    draw = torch.Generator().manual_seed(0)
    features = torch.randint(-2, 3, (2, K + 2 * N, D), generator=draw).float() / 4
    features[0, : K // 2] = features[0, :1].clone()  # half of the memory has equal scores
    sources = torch.randint(0, 300, (K + N,), generator=draw)
    sources[filled:K] = -1
    features[:, filled:K] = torch.nan
    return {"memory": features[:, :K], "queries": features[:, K : K + N], "own_key": features[0, K + N :],
            "memory_ids": sources[:K], "query_ids": sources[K:]}  # fmt: skip


def loss_of(function, inputs, rows, positives, temperature, *arguments, memory, memory_ids):
    """Returns the loss of `rows` and its gradients to the queries, their keys and the temperature."""
    leaves = [inputs["queries"][0, rows].clone(), inputs["own_key"][rows].clone(), torch.tensor(temperature)]
    for leaf in leaves:
        leaf.requires_grad_()
    loss = function(leaves[0], leaves[1], memory, positives, *arguments, query_ids=inputs["query_ids"][rows],
                    memory_ids=memory_ids, same_id="ignore", self_positive="denominator", temperature=leaves[2],
                    reduction="none")  # fmt: skip
    loss.sum().backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves[:2])], leaves[2].grad


def of_rank(rank: int, processes: int) -> list[dict]:
    return [of_case(rank, processes, *case) for case in CASES.values()]


def of_case(rank: int, processes: int, filled: int, keep: list[int]) -> dict:
    inputs, shard = example(filled), Shard(K, rank, processes)
    slots = slice(shard.begin, shard.end)
    memory, memory_ids = inputs["memory"][:, slots].clone(), inputs["memory_ids"][slots].clone()
    survivors: dict[int, torch.Tensor] = {}
    indices, scores = sharded_cascade_select(
        inputs["queries"], memory, VIEWS, keep, shard, query_ids=inputs["query_ids"], memory_ids=memory_ids,
        on_survivors=lambda stage, rows, kept: survivors.__setitem__(stage, kept),
    )  # fmt: skip
    rows = slice(rank * N // processes, (rank + 1) * N // processes)
    loss, temperature = loss_of(
        sharded_mil_nce, inputs, rows, indices[rows], 0.3, shard, memory=memory[0], memory_ids=memory_ids
    )
    fixed = sharded_mil_nce(
        inputs["queries"][0, rows], inputs["own_key"][rows], memory[0], None, shard, temperature=0.3,
        query_ids=inputs["query_ids"][rows], memory_ids=memory_ids, reduction="none",
    )  # fmt: skip
    return {"indices": indices, "scores": scores, "survivors": [survivors[0], survivors[1]], "loss": loss,
            "temperature": temperature, "fixed": fixed}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_selection_and_loss_of_several_processes_are_those_of_one(processes, tmp_path):
    results = on_processes(of_rank, processes, tmp_path)
    for i, (filled, keep) in enumerate(CASES.values()):
        assert_as_one([result[i] for result in results], example(filled), keep)


def assert_as_one(found: list[dict], inputs: dict[str, torch.Tensor], keep: list[int]) -> None:
    ids = {name: inputs[name] for name in ("query_ids", "memory_ids")}
    indices, scores = cascade_select(inputs["queries"], inputs["memory"], VIEWS, keep, **ids)
    for result in found:
        assert torch.equal(result["indices"], indices) and torch.equal(result["scores"], scores)
    for stage in (0, 1):
        survivors = torch.cat([result["survivors"][stage] for result in found], dim=1)
        cut, _ = cascade_select(inputs["queries"], inputs["memory"], VIEWS[: stage + 1], keep[: stage + 1], **ids)
        assert [row.nonzero().flatten().tolist() for row in survivors] == [
            sorted(slot for slot in row if slot >= 0) for row in cut.tolist()
        ]
    memory = {"memory": inputs["memory"][0], "memory_ids": inputs["memory_ids"]}
    loss, temperature = loss_of(mil_nce, inputs, slice(N), indices, 0.3, **memory)
    for i, expected in enumerate(loss):
        assert torch.equal(torch.cat([result["loss"][i] for result in found]), expected)
    torch.testing.assert_close(sum(result["temperature"] for result in found), temperature, rtol=1e-5, atol=1e-6)
    fixed = mil_nce(inputs["queries"][0], inputs["own_key"], memory["memory"], **ids, temperature=0.3, reduction="none")
    assert torch.equal(torch.cat([result["fixed"] for result in found]), fixed)


@pytest.mark.parametrize(
    ("size", "processes"),
    [(1024, 1), (1025, 2), (5003, 5), (2**20, 16), (99_999, 7), (2**24, 64), (17_409, 18), (65_601, 64), (2**20, 1000)],
)
def test_shards_are_whole_parts_that_cover_the_memory(size, processes):
    shards = [Shard(size, rank, processes) for rank in range(processes)]
    assert [shard.begin for shard in shards] == [0] + [shard.end for shard in shards[:-1]]
    assert shards[-1].end == size and all(shard.begin < shard.end for shard in shards)
    held = [shard.end - shard.begin for shard in shards]
    assert all(shard.begin % (shard.entries if processes <= 16 else 64) == 0 for shard in shards)
    assert [-(-count // shards[0].entries) for count in held] == [len(shards[0].parts_of(i)) for i in range(processes)]
    if processes > 16:
        assert shards[0].parts == processes and max(held) <= shards[0].entries < size / processes + 64
    slots = torch.arange(-1, size, 97)
    inside = torch.stack([shard.within(slots) for shard in shards])
    assert ((inside >= 0).sum(0) == (slots >= 0)).all()
    assert all(((row >= 0) <= (row + shard.begin == slots)).all() for row, shard in zip(inside, shards, strict=True))


def test_parts_of_more_than_16_processes_are_the_whole():
    """The sums of 18 processes, each with its part, give the loss of the whole within the rounding of their order."""
    draw = torch.Generator().manual_seed(0)
    query, own_key, memory = (torch.randn(n, 8, generator=draw) for n in (3, 3, 18_496))
    positives = torch.randint(-1, 18_496, (3, 9), generator=draw)
    partials = []
    for shard in (Shard(18_496, rank, 18) for rank in range(18)):
        part = memory[shard.begin : shard.end]
        partials.append(mil_nce_partial(query, part, shard.within(positives), entries=shard.entries))
    found = mil_nce_merge(torch.cat(partials), query, own_key)
    assert len(torch.cat(partials)) == shard.parts == 18
    torch.testing.assert_close(found, mil_nce(query, own_key, memory, positives), rtol=1e-5, atol=1e-6)


def test_one_process_computes_the_same_on_every_device(device):
    inputs, shard = example(), Shard(K, 0, 1)
    columns = ("query_ids", "memory_ids")
    ids = {name: inputs[name] for name in columns}
    indices, scores = cascade_select(inputs["queries"], inputs["memory"], VIEWS, KEEP, **ids)
    held = {"memory": inputs["memory"][0], "memory_ids": inputs["memory_ids"]}
    expected, _ = loss_of(mil_nce, inputs, slice(N), indices, 0.3, **held)
    there = {name: tensor.to(device) for name, tensor in inputs.items()}
    ids = {name: there[name] for name in columns}
    found = sharded_cascade_select(there["queries"], there["memory"], VIEWS, KEEP, shard, **ids)
    assert torch.equal(found[0].cpu(), indices) and torch.equal(found[1].cpu(), scores)
    held = {"memory": there["memory"][0], "memory_ids": there["memory_ids"]}
    loss, _ = loss_of(sharded_mil_nce, there, slice(N), found[0], 0.3, shard, **held)
    for value, reference in zip(loss, expected, strict=True):
        torch.testing.assert_close(value.cpu(), reference, rtol=1e-5, atol=1e-5)


def test_queries_that_are_compared_in_parts(monkeypatch):
    monkeypatch.setattr(sharded, "_KEYS_AT_ONCE", 1)
    monkeypatch.setattr(sharded, "_LEAST_QUERIES", 5)
    inputs, rows_of = example(), {0: [], 1: []}
    arguments = (inputs["queries"], inputs["memory"], VIEWS, KEEP)
    ids = {"query_ids": torch.arange(N) % 3, "memory_ids": torch.arange(K) % 3}  # each query excludes a third
    found = sharded_cascade_select(
        *arguments,
        Shard(K, 0, 1),
        **ids,
        on_survivors=lambda stage, rows, kept: rows_of[stage].append((rows, len(kept))),
    )
    assert all(map(torch.equal, found, cascade_select(*arguments, **ids)))
    for stages in rows_of.values():
        assert [(range(N)[rows], count) for rows, count in stages] == [
            (range(0, 5), 5), (range(5, 10), 5), (range(10, 12), 2)
        ]  # fmt: skip


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32, torch.float32), (torch.float32, torch.float16,
                                    torch.bfloat16), (torch.bfloat16,) * 3])  # fmt: skip
@pytest.mark.parametrize("temperature", [0.3, torch.tensor(0.3)])
def test_under_autocast_features_may_have_different_dtypes(dtypes, temperature):
    inputs = example()
    features = [inputs["queries"][0], inputs["own_key"], inputs["memory"][0]]
    results = []
    for function, arguments in ((mil_nce, ()), (sharded_mil_nce, (Shard(K, 0, 1),))):
        query, own_key, memory = (tensor.to(dtype) for tensor, dtype in zip(features, dtypes, strict=True))
        leaves = [query.requires_grad_(), own_key.requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(*leaves, memory, torch.tensor([[3, K - 1]]).expand(N, 2), *arguments,
                            temperature=temperature)  # fmt: skip
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for expected, found in zip(*results, strict=True):
        assert expected.dtype == found.dtype and torch.equal(expected, found)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="processes: expected at most 2 for a memory of 2000 entries, .* got 3"):
        Shard(2000, 0, 3)
    with pytest.raises(ValueError, match="processes: expected at most 18 for a memory of 18432 entries, .* got 19"):
        Shard(18_432, 0, 19)
    with pytest.raises(ValueError, match="rank: expected 0..1, got 2"):
        Shard(5000, 2, 2)
    with pytest.raises(TypeError, match="size: expected an int"):
        Shard(5000.0, 0, 1)
    inputs, shard = example(), Shard(K, 0, 1)
    with pytest.raises(ValueError, match="memory: expected the 5003 entries of the shard, got 5002"):
        sharded_cascade_select(inputs["queries"], inputs["memory"][:, 1:], VIEWS, KEEP, shard)
    with pytest.raises(ValueError, match="shard: expected one of the 1 processes of the group, got one of 2"):
        half = Shard(K, 0, 2)
        sharded_cascade_select(inputs["queries"], inputs["memory"][:, : half.end], VIEWS, KEEP, half)
    features = (inputs["queries"][0], inputs["own_key"], inputs["memory"][0])
    for positives, error, message in (
        ([[1]], TypeError, "positives: expected an int64 torch.Tensor"),
        (torch.zeros(N, dtype=torch.int64), ValueError, r"positives: expected shape \[12, 'P'\], got \[12\]"),
        (torch.zeros(3, 2, dtype=torch.int64), ValueError, r"positives: expected shape \[12, 2\], got \[3, 2\]"),
    ):
        with pytest.raises(error, match=message):
            sharded_mil_nce(*features, positives, shard)
    for changed, message in (
        ({"temperature": -1.0}, "temperature: expected a positive"),
        ({"reduction": "sum"}, "reduction: expected one of"),
        ({"same_id": "other"}, "same_id: expected one of"),
        ({"query_ids": inputs["query_ids"]}, "query_ids: requires memory_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            sharded_mil_nce(*features, None, shard, **changed)
    with pytest.raises(TypeError, match="query: expected a torch.Tensor of shape"):
        sharded_mil_nce(features[0].numpy(), *features[1:], None, shard)
    with pytest.raises(IndexError, match="positives: expected memory slots 0..5002 or -1"):
        sharded_mil_nce(inputs["queries"][0], inputs["own_key"], inputs["memory"][0], torch.full((N, 1), K), shard)
