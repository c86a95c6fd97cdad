"""Ranks and average precision against brute force in NumPy, torchmetrics and scikit-learn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from cpr_fast.evaluate.retrieval import ranking as module
from cpr_fast.evaluate.retrieval.ranking import NO_HIT, Comparison, first_and_precision, prepare, rates


def brute_force(similarity: torch.Tensor, relevant: torch.Tensor) -> tuple[list[int], list[float]]:
    """Returns the first hit and the average precision of every query; equal similarities rank by position."""
    first, precisions = [], []
    for row, right in zip(similarity.numpy(), relevant.numpy(), strict=True):
        order = sorted(range(len(row)), key=lambda place, row=row: (-row[place], place))
        hits = right[order]
        ranks = hits.nonzero()[0]
        first.append(int(ranks[0]) if len(ranks) else NO_HIT)
        precisions.append(np.mean([hits[: rank + 1].mean() for rank in ranks]) if len(ranks) else np.nan)
    return first, precisions


@pytest.mark.parametrize(("queries", "gallery"), [(1, 1), (1, 7), (5, 1), (17, 33), (64, 257)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("levels", [1, 3, None])
def test_ranks_equal_a_sort_by_similarity_and_position(queries, gallery, share, levels):
    """With `levels`, the similarities have this number of different values, so that most of them are tied."""
    rng = torch.Generator().manual_seed(queries * gallery)
    similarity = torch.randn(queries, gallery, generator=rng)
    if levels:
        similarity = torch.randint(levels, (queries, gallery), generator=rng) - 1.0
        similarity[similarity == 0] *= -1  # zeros of either sign are equal
    left_out = torch.rand(queries, gallery, generator=rng) < 0.2
    similarity = similarity.masked_fill(left_out, -torch.inf)
    relevant = (torch.rand(queries, gallery, generator=rng) < share) & ~left_out
    first, precision = first_and_precision(similarity, relevant)
    expected = brute_force(similarity, relevant)
    assert first.tolist() == expected[0] and precision.tolist() == pytest.approx(expected[1], nan_ok=True)


def test_equal_similarities_rank_by_gallery_position():
    similarity = torch.tensor([[1.0, 2, 2, 2], [0, 0, 0, 0], [5, 1, 1, 1]])
    relevant = torch.tensor([[0, 0, 0, 1], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    first, precision = first_and_precision(similarity, relevant)
    assert first.tolist() == [2, 1, NO_HIT]
    assert precision.tolist() == pytest.approx([1 / 3, (1 / 2 + 2 / 4) / 2, np.nan], nan_ok=True)


def comparison_of(queries: int, gallery: int, width: int, seed: int = 0) -> Comparison:
    rng = torch.Generator().manual_seed(seed)
    features = torch.randn(queries, width, generator=rng), torch.randn(gallery, width, generator=rng)
    return Comparison([prepare(*features, "cosine")], "cosine")


@pytest.mark.parametrize("chunk", [1, 40, 2**23])
def test_average_precision_is_that_of_torchmetrics_and_scikit_learn(monkeypatch, chunk):
    from torchmetrics.functional.retrieval import retrieval_average_precision

    monkeypatch.setattr(module, "CHUNK", chunk)
    comparison = comparison_of(23, 41, 6)
    labels, gallery_labels = torch.arange(23) % 5, torch.arange(41) % 4  # the gallery has no video of class 4
    ranking = comparison.rank(labels, gallery_labels)
    similarity = comparison.similarity(torch.arange(23))
    for query in range(23):
        relevant = gallery_labels == labels[query]
        ours = ranking.average_precision[query].item()
        if labels[query] == 4:
            assert np.isnan(ours) and ranking.first_hit[query] == NO_HIT
            continue
        positive = similarity[query] + 2  # torchmetrics takes videos of similarities <= 0 for irrelevant
        assert ours == pytest.approx(retrieval_average_precision(positive, relevant).item(), abs=1e-6)
        assert ours == pytest.approx(average_precision_score(relevant.numpy(), similarity[query].numpy()), abs=1e-9)


def test_videos_of_the_querys_own_source_are_left_out():
    sources = torch.arange(30) // 3
    labels = torch.arange(30) % 4
    features = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    comparison = Comparison([prepare(features, features, "cosine")], "cosine", sources, sources)
    ranking = comparison.rank(labels, labels)
    similarity = comparison.similarity(torch.arange(30))
    for query in range(30):
        others = sources != sources[query]
        expected = average_precision_score((labels[others] == labels[query]).numpy(), similarity[query][others].numpy())
        assert ranking.average_precision[query].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("relevant", "gallery"), [(1, 1), (1, 5), (2, 5), (4, 5), (5, 5)])
def test_chance_is_the_mean_over_all_orders(relevant, gallery):
    """Every order of the gallery once, as the similarities of a query each."""
    orders = torch.tensor(list(itertools.permutations(range(gallery))), dtype=torch.float32)
    right = torch.zeros_like(orders, dtype=torch.bool)
    right[:, :relevant] = True
    precisions = [average_precision_score(r.numpy(), s.numpy()) for r, s in zip(right, orders, strict=True)]
    comparison = comparison_of(1, gallery, 3)
    labels = torch.arange(gallery).clamp(max=relevant) // relevant  # 0 for the relevant ones
    ranking = comparison.rank(torch.zeros(1, dtype=torch.int64), labels)
    assert ranking.chance_precision.item() == pytest.approx(np.mean(precisions))
    assert ranking.chance_r1.item() == pytest.approx(relevant / gallery)


def test_queries_without_a_relevant_video_are_counted_and_left_out_of_map_only():
    comparison = comparison_of(6, 20, 4)
    labels, sources = torch.tensor([0, 0, 1, 1, 9, 9]), torch.arange(6)
    ranking = comparison.rank(labels, torch.arange(20) % 2)
    measured = rates(ranking, torch.ones(6, dtype=torch.bool), sources, 20)
    assert measured["map_left_out"] == 2 and measured["queries"] == 6
    assert measured["map"] == pytest.approx(ranking.average_precision[:4].mean().item())
    assert measured["r@1"] == pytest.approx((ranking.first_hit < 1).double().mean().item())
    alone = rates(ranking, labels == 9, sources, 20)
    assert alone["map"] is None and alone["map_ci95"] is None and alone["chance_map"] is None
    assert alone["map_left_out"] == 2 and alone["r@1"] == 0


def test_a_perfect_and_the_worst_order():
    relevant = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    first, precision = first_and_precision(torch.tensor([[5.0, 4, 3, 2, 1]]).repeat(3, 1), relevant)
    assert first.tolist() == [0, 3, 0]
    assert precision.tolist() == pytest.approx([1, (1 / 4 + 2 / 5) / 2, 1])
