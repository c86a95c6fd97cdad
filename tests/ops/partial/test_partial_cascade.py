"""The steps of a cascade in a memory that is divided: keys, counts of digits, and what survives."""

from __future__ import annotations

import pytest
import torch

from cpr_fast.ops import (
    cascade_counts,
    cascade_counts_ref,
    cascade_keep,
    cascade_keep_ref,
    cascade_keys,
    cascade_keys_ref,
    cascade_select,
)
from cpr_fast.ops.partial.cascade import NO_KEY, _keys_on_cuda, scores_of

SIZES = [(1, 1, 1), (2, 63, 5), (33, 1030, 24)]  # B, K, D


def example(B: int, K: int, D: int, dtype: torch.dtype = torch.float32) -> dict:
    """Features of which some entries are equal, NaN or zero, and ids of which some are equal or -1."""
    draw = torch.Generator().manual_seed(B + K + D)
    queries, memory = (torch.randn(2, n, D, generator=draw) for n in (B, K))
    memory[:, ::7] = memory[:, :1].clone()
    memory[1, 5::50, 0] = torch.nan
    memory[:, 3::40] = -0.0
    ids = [torch.randint(-1, 9, (n,), generator=draw) for n in (B, K)]
    return {"queries": queries.to(dtype), "memory": memory.to(dtype), "query_ids": ids[0], "memory_ids": ids[1]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", SIZES)
def test_keys_order_like_the_scores_of_the_selection(sizes, dtype, cpu_variants):
    inputs = example(*sizes, dtype)
    names, force = cpu_variants
    for name in names:
        force(name)
        keys = cascade_keys(**inputs, views=[1, 0])
        for row, view in enumerate([1, 0]):
            # All entries, best first: excluded by the other view too, so its view comes first and keeps everything.
            indices, scores = cascade_select(**inputs, views=[1 - view, view], keep=[sizes[1]] * 2)
            found = keys[row].gather(1, indices.clamp(min=0)).where(indices >= 0, NO_KEY)
            assert torch.equal(scores_of(found), scores)
            assert ((keys[row] != NO_KEY).sum(1) == (indices >= 0).sum(1)).all()
        assert torch.equal(keys, _keys_on_cuda(inputs["queries"], inputs["memory"], [1, 0],
                                               inputs["query_ids"], inputs["memory_ids"]))  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES)
def test_keys_are_those_of_the_reference(sizes):
    inputs = example(*sizes)
    keys, expected = (function(**inputs, views=[0, 1]) for function in (cascade_keys, cascade_keys_ref))
    assert torch.equal(keys == NO_KEY, expected == NO_KEY)
    kept = keys != NO_KEY
    torch.testing.assert_close(scores_of(keys)[kept], scores_of(expected)[kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES)
def test_counts_of_digits_are_those_of_python(sizes):
    keys = cascade_keys(**example(*sizes), views=[0])[0]
    prefix = torch.zeros(len(keys), dtype=torch.int32)
    for digit in range(4):
        counts = cascade_counts(keys, prefix, digit)
        assert torch.equal(counts, cascade_counts_ref(keys, prefix, digit))
        for b in {0, len(keys) - 1}:
            digits = [(int(k) + 2**31).to_bytes(4, "big") for k in keys[b] if k != NO_KEY]
            first = int(prefix[b]).to_bytes(4, "big")[4 - digit :]
            expected = [d[digit] for d in digits if d[:digit] == first]
            assert counts[b].tolist() == [expected.count(d) for d in range(256)]
        prefix = prefix * 256 + counts.argmax(1).int()


@pytest.mark.parametrize("ties", [0, 1, 3, 2**31 - 1])
@pytest.mark.parametrize("row", [0, 1])
def test_what_is_kept_is_above_the_threshold_or_among_the_first_equal_to_it(row, ties):
    keys = torch.randint(-3, 3, (2, 5, 67), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    before, reference = keys.tolist(), keys.clone()
    threshold = torch.tensor([-4, -1, 0, 2, 2**31 - 1], dtype=torch.int32)
    left = torch.full((5,), ties, dtype=torch.int32)
    cascade_keep(keys, row, threshold, left)
    cascade_keep_ref(reference, row, threshold, left)
    assert torch.equal(keys, reference)
    for b, bound in enumerate(threshold.tolist()):
        tied = [k for k, key in enumerate(before[row][b]) if key == bound][:ties]
        kept = {k for k, key in enumerate(before[row][b]) if key > bound} | set(tied)
        for u in range(2):
            assert keys[u, b].tolist() == [key if k in kept else NO_KEY for k, key in enumerate(before[u][b])]


def test_wrong_arguments_are_named():
    inputs = example(3, 40, 4)
    with pytest.raises(ValueError, match="views: expected different views, got \\[1, 1\\]"):
        cascade_keys(**inputs, views=[1, 1])
    with pytest.raises(ValueError, match="^views: expected at least one view, got none"):
        cascade_keys(**inputs, views=[])
    with pytest.raises(ValueError, match="views: expected values in 0..1"):
        cascade_keys(**inputs, views=[2])
    keys, column = cascade_keys(**inputs, views=[0, 1]), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(TypeError, match="keys: expected dtype int32, got torch.int64"):
        cascade_counts(keys[0].long(), column, 0)
    with pytest.raises(ValueError, match="digit: expected 0..3, got 4"):
        cascade_counts(keys[0], column, 4)
    with pytest.raises(ValueError, match="prefix: expected shape \\[3\\], got \\[2\\]"):
        cascade_counts(keys[0], column[:2], 0)
    with pytest.raises(ValueError, match="row: expected 0..1, got 2"):
        cascade_keep(keys, 2, column, column)
    with pytest.raises(ValueError, match="keys: expected contiguous"):
        cascade_keep(keys.transpose(0, 1), 0, torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32))
    with pytest.raises(TypeError, match="ties: expected dtype int32, got torch.float32"):
        cascade_keep(keys, 0, column, column.float())


def test_registered_operators_agree_with_their_fake_ones():
    inputs = example(3, 40, 4)
    operators = torch.ops.cpr_fast
    ids = (inputs["query_ids"], inputs["memory_ids"])
    keys = cascade_keys(**inputs, views=[0, 1])
    column = torch.zeros(3, dtype=torch.int32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.cascade_keys, (inputs["queries"], inputs["memory"], [0, 1], *ids), test_utils=tests)
    torch.library.opcheck(operators.cascade_counts, (keys[0], column, 0), test_utils=tests)
    torch.library.opcheck(operators.cascade_keep, (keys, 0, column, column), test_utils=tests)
