"""The k-nearest-neighbour graph against cascade_select, float64 and itself in steps."""

from __future__ import annotations

import pytest
import torch

from cpr_fast.ops import KnnGraph, cascade_select, knn_graph, knn_graph_ref

SIZES = [(1, 1, 1), (2, 3, 5), (65, 5, 10), (513, 33, 3), (1100, 24, 17)]  # N, D, k


def example(N: int, D: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Features of which some are equal, zero of either sign, or NaN, and of which some scores are equal."""
    features = torch.randn(N, D, generator=torch.Generator().manual_seed(N + D)).to(dtype)
    features[::7] = features[:1].clone()
    features[3::40] = -0.0
    features[5::50] = 0.0
    features[11::60, 0] = torch.nan
    return features


def selected(features: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    slots = torch.arange(len(features))
    return cascade_select(features[None], features[None], [0], [k], query_ids=slots, memory_ids=slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_graph_is_that_of_a_selection_bit_for_bit(sizes, dtype, cpu_variants):
    N, D, k = sizes
    features = example(N, D, dtype)
    expected = selected(features, k)
    names, force = cpu_variants
    for name in names:
        force(name)
        assert all(map(torch.equal, knn_graph(features, k), expected)), name


@pytest.mark.parametrize("threads", [1, 3])
def test_many_parts_and_threads_give_the_same_bits(threads, thread_counts):
    features = example(9001, 6)
    expected = selected(features, 4)
    torch.set_num_threads(threads)  # which `thread_counts` restores
    assert all(map(torch.equal, knn_graph(features, 4), expected))


@pytest.mark.parametrize("sizes", SIZES)
def test_the_graph_is_that_of_the_reference_in_float64(sizes):
    N, D, k = sizes
    features = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    features[2::9, 0] = torch.nan
    (indices, scores), (expected, values) = knn_graph(features, k), knn_graph_ref(features, k)
    assert torch.equal(indices == -1, expected == -1)
    torch.testing.assert_close(scores, values, rtol=1e-5, atol=1e-5)
    pairs = features.double() @ features.double().T
    kept = indices >= 0
    own = pairs.gather(1, indices.clamp(min=0))[kept].float()
    torch.testing.assert_close(scores[kept], own, rtol=1e-5, atol=1e-5)


def test_no_entry_is_its_own_neighbour_and_none_is_listed_twice():
    features = torch.ones(300, 4)  # all scores are equal: the lowest indices win
    indices, scores = knn_graph(features, 5)
    assert indices[0].tolist() == [1, 2, 3, 4, 5] and indices[2].tolist() == [0, 1, 3, 4, 5]
    assert (indices[6:] == torch.arange(5)).all() and (scores == 4).all()


def test_infinite_scores_are_scores_and_nan_is_none():
    features = torch.tensor([[1.0], [torch.inf], [-1.0], [torch.nan]])
    indices, scores = knn_graph(features, 3)
    assert indices.tolist() == [[1, 2, -1], [0, 2, -1], [0, 1, -1], [-1, -1, -1]]
    assert scores[1].tolist() == [torch.inf, -torch.inf, -torch.inf]


def test_a_graph_continues_from_a_stored_state():
    features = example(1500, 8)
    whole = KnnGraph(features, 6)
    shares = [whole.share]
    while whole.done < len(features):
        whole.step()
        shares.append(whole.share)
    assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares) and len(shares) > 3
    first = KnnGraph(features, 6)
    first.step()
    stored, done = first.best.clone(), first.done
    first.step()
    for best in (stored, first.best):  # also lists that are newer than `done`
        later = KnnGraph(features, 6, best=best.clone(), done=done)
        while later.done < len(features):
            later.step()
        later.step()  # nothing is left
        assert torch.equal(later.best, whole.best)
    assert all(map(torch.equal, whole.result(), selected(features, 6)))


@pytest.mark.parametrize("bounds", [(0, 1500), (0, 1, 700, 1499, 1500), (0, 0, 640, 640, 1500)])
def test_merged_ranges_of_rows_are_the_graph(bounds, monkeypatch):
    monkeypatch.setattr("cpr_fast.ops.graph.knn_graph._MERGED", 400)
    features, parts = example(1500, 8), []
    for begin, end in zip(bounds, bounds[1:], strict=False):
        parts.append(KnnGraph(features, 6, done=begin, end=end))
        while parts[-1].done < end:
            parts[-1].step()
        parts[-1].step()  # nothing is left
        assert parts[-1].done == end and (parts[-1].best[:begin] == -(2**63)).all()
    graph = KnnGraph(features, 6, done=1500)
    for begin, part in reversed([*zip(bounds, parts, strict=False)]):
        graph.merge(part.best[begin:])
    assert all(map(torch.equal, graph.result(), selected(features, 6)))


def test_what_cuda_computes_is_the_same():
    features = example(700, 9)
    graph = KnnGraph(features, 5)
    for end in (300, 700):
        graph._select(end)
        graph.done = end
    assert all(map(torch.equal, graph.result(), knn_graph(features, 5)))


def test_wide_features_and_strides_are_taken():
    features = example(130, 2100).T.contiguous().T
    assert not features.is_contiguous()
    assert all(map(torch.equal, knn_graph(features, 3), selected(features, 3)))
    assert not knn_graph(features.requires_grad_(), 3)[1].requires_grad


@pytest.mark.parametrize(
    "error, names, arguments",
    [
        (TypeError, "features: expected a torch.Tensor", ([[1.0]], 1)),
        (TypeError, "features: expected dtype", (torch.ones(3, 2).double(), 1)),
        (ValueError, "features: expected a non-empty shape", (torch.ones(3), 1)),
        (ValueError, "features: expected a non-empty shape", (torch.ones(0, 3), 1)),
        (ValueError, "k: expected an int in 1", (torch.ones(3, 2), 0)),
        (TypeError, "k: expected an int", (torch.ones(3, 2), 1.5)),
        (TypeError, "k: expected an int", (torch.ones(3, 2), True)),
    ],
)
def test_bad_arguments_are_named(error, names, arguments):
    with pytest.raises(error, match=names):
        knn_graph(*arguments)


def test_a_bad_state_is_named():
    features = torch.ones(3, 2)
    with pytest.raises(TypeError, match="best: expected int64"):
        KnnGraph(features, 2, best=torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"best: expected shape \[3, 2\]"):
        KnnGraph(features, 2, best=torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="best: expected contiguous"):
        KnnGraph(features, 2, best=torch.zeros(2, 3, dtype=torch.int64).T)
    with pytest.raises(ValueError, match=r"done: expected 0\.\.3"):
        KnnGraph(features, 2, done=4)
    for end in (1, 4):
        with pytest.raises(ValueError, match=r"end: expected 2\.\.3"):
            KnnGraph(features, 2, done=2, end=end)
    for best in (torch.zeros(4, 2, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"best: expected shape"):
            KnnGraph(features, 2).merge(best)
    operator = torch.ops.cpr_fast.knn_graph_rows
    best = torch.zeros(3, 2, dtype=torch.int64)
    for arguments in ((features, best, 2, 2), (features, best, -1, 2), (features, best, 0, 4)):
        with pytest.raises(ValueError, match="begin, end"):
            operator(*arguments)
    for arguments in ((features, best[:2], 0, 1), (features, best.float(), 0, 1), (features.T, best[:2], 0, 1)):
        with pytest.raises(ValueError, match="best|features"):
            operator(*arguments)


def test_the_operator_is_registered_as_torch_expects():
    features, best = torch.randn(9, 4), torch.full((9, 2), -(2**63))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.cpr_fast.knn_graph_rows, (features, best, 0, 9), test_utils=tests)
