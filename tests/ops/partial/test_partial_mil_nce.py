"""The sums of the loss over parts of a memory, and their merge: `mil_nce` bit for bit."""

from __future__ import annotations

import pytest
import torch

from cpr_fast.ops import (
    mil_nce,
    mil_nce_merge,
    mil_nce_merge_ref,
    mil_nce_part_entries,
    mil_nce_partial,
    mil_nce_partial_ref,
)
from cpr_fast.ops.partial import mil_nce as partial

SIZES = [(1, 1, 1), (5, 64, 3), (33, 1025, 7), (17, 5000, 20)]  # B, K, D


def example(B: int, K: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Returns the arguments of both functions, own_key, and a mode of own_key for each row."""
    draw = torch.Generator().manual_seed(B + K + D)
    query, own_key, memory = (torch.nn.functional.normalize(torch.randn(n, D, generator=draw), dim=1)
                              for n in (B, B, K))  # fmt: skip
    ids = [torch.randint(-1, max(2, K // 8), (n,), generator=draw) for n in (B, K)]
    memory[ids[1] == -1] = torch.nan  # what an empty slot holds is not read
    positives = torch.randint(-1, K, (B, 4), generator=draw)
    inputs = {"query": query.to(dtype), "memory": memory.to(dtype), "positives": positives, "query_ids": ids[0],
              "memory_ids": ids[1], "temperature": 0.1}  # fmt: skip
    return inputs, own_key.to(dtype), torch.randint(3, (B,), generator=draw)


def in_parts(inputs: dict, own_key: torch.Tensor, processes: int, **settings) -> torch.Tensor:
    """Computes the loss as `processes` processes that hold whole parts would."""
    K = len(inputs["memory"])
    entries = mil_nce_part_entries(K)
    parts = -(-K // entries)
    bounds = [rank * parts // processes * entries for rank in range(processes)] + [K]
    shared = {name: inputs[name] for name in ("query", "query_ids", "temperature")}
    partials = []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        slots = inputs["positives"]
        inside = None if slots is None else torch.where((slots >= begin) & (slots < end), slots - begin, -1)
        partials.append(mil_nce_partial(
            memory=inputs["memory"][begin:end], positives=inside, memory_ids=inputs["memory_ids"][begin:end],
            entries=entries, same_id=settings.get("same_id", "positive"), **shared,
        ))  # fmt: skip
    merge = {name: value for name, value in settings.items() if name != "same_id"}
    return mil_nce_merge(torch.cat(partials), inputs["query"], own_key, temperature=inputs["temperature"], **merge)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_merge_of_parts_is_the_loss_bit_for_bit(sizes, dtype, cpu_variants):
    inputs, own_key, modes = example(*sizes, dtype)
    names, force = cpu_variants
    for name in names[-2:] if dtype == torch.float32 else names[:1]:
        force(name)
        for same_id, self_positive in [("positive", modes), ("ignore", "denominator"), ("negative", "drop_both")]:
            settings = {"same_id": same_id, "self_positive": self_positive, "reduction": "none"}
            results = []
            for processes in (0, 1, 2, 3):
                if processes > -(-sizes[1] // mil_nce_part_entries(sizes[1])):
                    continue
                leaves = [inputs["query"].clone().requires_grad_(), own_key.clone().requires_grad_()]
                changed = inputs | {"query": leaves[0]}
                loss = (in_parts(changed, leaves[1], processes, **settings) if processes
                        else mil_nce(own_key=leaves[1], **changed, **settings))  # fmt: skip
                loss.sum().backward()
                results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
            for result in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("same_id", ["positive", "ignore", "negative"])
def test_sums_are_those_of_the_reference(same_id):
    inputs, own_key, modes = example(17, 2000, 20)
    arguments = inputs | {"same_id": same_id, "entries": 640}
    found, expected = mil_nce_partial(**arguments), mil_nce_partial_ref(**arguments)
    assert found.shape == expected.shape == (4, 17, 2, 22)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for self_positive in ("keep", "denominator", "drop_both", modes):
        settings = {"self_positive": self_positive, "temperature": 0.1, "reduction": "none"}
        merged = mil_nce_merge(found, inputs["query"], own_key, **settings)
        torch.testing.assert_close(merged, mil_nce_merge_ref(expected, inputs["query"], own_key, **settings))


@pytest.mark.parametrize("at_once", [64, 100])
def test_the_reference_computes_long_parts_in_chunks(at_once, monkeypatch):
    inputs, *_ = example(17, 2000, 20)
    expected = mil_nce_partial_ref(**inputs, entries=640)
    monkeypatch.setattr(partial, "_AT_ONCE", at_once)
    torch.testing.assert_close(mil_nce_partial_ref(**inputs, entries=640), expected, rtol=1e-6, atol=1e-6)


def test_gradients_on_cuda_are_computed_as_on_the_cpu():
    """On CUDA the outputs of the merge are computed in plain PyTorch; here on the CPU."""
    from cpr_fast.ops.partial.mil_nce import _merge

    inputs, own_key, modes = example(17, 2000, 20)
    partials = mil_nce_partial(**inputs, entries=640)
    arguments = (partials, inputs["query"], own_key, modes, "keep", 0.1)
    for found, expected in zip(_merge(*arguments), torch.ops.cpr_fast.mil_nce_merge(*arguments), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_without_ids_and_positives_the_loss_is_info_nce():
    inputs, own_key, _ = example(6, 1500, 9)
    inputs |= {"positives": None, "query_ids": None}
    expected = mil_nce(own_key=own_key, **inputs)
    assert torch.equal(in_parts(inputs, own_key, 2), expected)


def test_a_memory_has_at_most_16_parts_of_at_least_1024_entries():
    for size in (1, 63, 1024, 1025, 16_384, 16_385, 99_999, 2**20, 2**24):
        entries = mil_nce_part_entries(size)
        parts = -(-size // entries)
        assert entries % 64 == 0 and parts == min(16, -(-size // 1024)), size


def test_wrong_arguments_are_named():
    inputs, own_key, _ = example(5, 300, 4)
    with pytest.raises(ValueError, match="entries: expected a multiple of 64, got 100"):
        mil_nce_partial(**inputs, entries=100)
    with pytest.raises(ValueError, match="temperature: expected a positive finite number"):
        mil_nce_partial(**inputs | {"temperature": 0.0}, entries=64)
    with pytest.raises(IndexError, match="positives: expected memory slots 0..299 or -1, got 300"):
        mil_nce_partial(**inputs | {"positives": torch.full((5, 1), 300)}, entries=64)
    partials = mil_nce_partial(**inputs, entries=64)
    with pytest.raises(ValueError, match=r"partials: expected shape \[S, 5, 2, 6\], got \[5, 4, 2, 6\]"):
        mil_nce_merge(partials[:, :4], inputs["query"], own_key)
    with pytest.raises(TypeError, match="partials: expected dtype float32, got torch.float64"):
        mil_nce_merge(partials.double(), inputs["query"], own_key)
    with pytest.raises(ValueError, match="self_positive: expected one of"):
        mil_nce_merge(partials, inputs["query"], own_key, self_positive="both")
    with pytest.raises(ValueError, match="size: expected an int in 1"):
        mil_nce_part_entries(0)


def test_registered_operators_agree_with_their_fake_ones():
    inputs, own_key, modes = example(5, 300, 4)
    names = ("query", "memory", "positives", "query_ids", "memory_ids")
    arguments = (*(inputs[name] for name in names), "ignore", 0.1, 64)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.cpr_fast.mil_nce_partial, arguments, test_utils=tests)
    partials = torch.ops.cpr_fast.mil_nce_partial(*arguments)
    merged = (partials, inputs["query"], own_key, modes, "keep", 0.1)
    torch.library.opcheck(torch.ops.cpr_fast.mil_nce_merge, merged, test_utils=tests)
