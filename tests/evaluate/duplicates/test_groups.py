"""Groups from pairs of similar clips, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics.cluster import pair_confusion_matrix

from cpr_fast.data.index.index import numbered
from cpr_fast.evaluate.duplicates.groups import (
    ROUNDING,
    Groups,
    agreement,
    at_thresholds,
    grouped,
    joined,
    pairs_of,
    sizes,
)
from cpr_fast.ops import knn_graph


def clips(count: int, width: int, seed: int, groups: int = 0) -> torch.Tensor:
    """Unit features, around `groups` centres if there are any."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=draw)
    if groups:
        features = 0.15 * features + torch.randn(groups, width, generator=draw)[torch.arange(count) % groups]
    return torch.nn.functional.normalize(features, dim=1)


def by_brute_force(features: torch.Tensor, edges: list[tuple[float, int, int]], least: float) -> np.ndarray:
    """Joins sets of clips whose mean similarity is computed from all pairs in float64."""
    similarity = (features.double() @ features.double().T).numpy()
    group = {clip: frozenset([clip]) for clip in range(len(features))}
    for value, a, b in sorted(edges, key=lambda edge: (-edge[0], edge[1], edge[2])):
        first, second = group[a], group[b]
        alone = len(first) == len(second) == 1
        if first != second and (alone or similarity[np.ix_(sorted(first), sorted(second))].mean() >= least):
            assert value >= least
            group |= dict.fromkeys(first | second, first | second)
    firsts = [min(group[clip]) for clip in range(len(features))]
    return np.unique(firsts, return_inverse=True)[1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "count, width, groups, k, least", [(60, 3, 0, 7, 0.8), (90, 12, 9, 12, 0.7), (41, 2, 0, 3, 0.98)]
)
def test_groups_are_those_of_brute_force(count, width, groups, k, least, seed):
    features = clips(count, width, seed, groups)
    indices, scores = knn_graph(features, k)
    pairs = pairs_of(indices, scores, least)
    edges = {
        (1.0 if scores[a, place] > 1 - ROUNDING else float(scores[a, place]), min(a, int(b)), max(a, int(b)))
        for a in range(count)
        for place, b in enumerate(indices[a])
        if b >= 0 and scores[a, place] >= least
    }
    assert set(zip(pairs.similarity.tolist(), pairs.first.tolist(), pairs.second.tolist(), strict=True)) == edges
    assert len(pairs.first) == len(edges) and (np.diff(pairs.similarity) <= 0).all()
    found = grouped(features, pairs, least)
    assert found.tolist() == by_brute_force(features, list(edges), least).tolist()
    assert 1 < found.max() + 1 < count


def test_planted_groups_are_found_whatever_their_order():
    planted = torch.arange(120) % 11
    features = clips(120, 32, 0, groups=11)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    found = grouped(features[order], pairs_of(*knn_graph(features[order], 10), 0.6), 0.6)
    known = agreement(found, planted[order].numpy())
    assert known["both"] == agreement(found, found)["both"] and known["recall"] == 1


def test_a_chain_of_similar_clips_is_not_one_group():
    angles = torch.arange(0, 120, 5).double().deg2rad()  # neighbours have the cosine .996, the ends -.42
    features = torch.stack([angles.cos(), angles.sin()], 1).float()
    numbers = grouped(features, pairs_of(*knn_graph(features, 2), 0.99), 0.99)
    assert sizes(numbers)["largest"] < 8
    similarity = (features @ features.T).numpy()
    for group in range(numbers.max() + 1):
        members = np.flatnonzero(numbers == group)
        assert similarity[np.ix_(members, members)].min() > 0.9


def test_more_copies_than_neighbours_are_one_group():
    features = torch.cat([clips(1, 8, 0).expand(50, 8), clips(30, 8, 1)])
    found = grouped(features, pairs_of(*knn_graph(features, 5), 0.9999), 0.9999)
    assert (found[:50] == 0).all() and sizes(found) == {"groups": 1, "clips": 50, "largest": 50}


def test_a_smaller_threshold_continues_the_groups_of_a_greater_one():
    features = clips(200, 4, 3)
    indices, scores = knn_graph(features, 8)
    pairs, found = pairs_of(indices, scores, 0.8), Groups(features)
    found.join(pairs.above(0.95), 0.95)
    close = found.numbers()
    found.join(pairs.above(0.8), 0.8)
    wide = found.numbers()
    assert agreement(close, wide)["precision"] == 1 and wide.max() < close.max()


def test_pairs_above_a_threshold_include_those_equal_to_it():
    features = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.25, 0.0]])
    pairs = pairs_of(*knn_graph(features, 2), 0.0)
    assert [len(pairs.above(value).first) for value in (0.6, 0.5, 0.25, 0.125, 0.0)] == [0, 1, 2, 3, 3]
    empty = pairs_of(*knn_graph(features, 2), 2.0)
    assert len(empty.first) == len(empty.above(0.5).first) == 0


@pytest.mark.parametrize("seed", range(5))
def test_agreement_counts_pairs_as_scikit_learn_does(seed):
    draw = np.random.default_rng(seed)
    found, known = draw.integers(0, 9, 70), draw.integers(0, 14, 70)
    (_, only_found), (only_known, both) = pair_confusion_matrix(known, found).tolist()
    result = agreement(found, known)
    assert 2 * result["both"] == both and 2 * result["pairs"] == both + only_found
    assert result["precision"] == both / (both + only_found) and result["recall"] == both / (both + only_known)


def test_agreement_without_pairs_is_not_defined():
    result = agreement(np.arange(4), np.array([0, 0, 1, 2]))
    assert result["precision"] is None and result["recall"] == 0
    assert agreement(np.zeros(4, int), np.arange(4))["recall"] is None


def test_joined_groups_are_connected_by_either_division():
    first, second = np.array([0, 0, 1, 2, 3, 4]), np.array([5, 6, 6, 7, 7, 8])
    assert joined(first, second).tolist() == [0, 0, 0, 1, 1, 2]
    assert joined(np.arange(3), np.arange(3)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("values", [[7, 2, 7, 9, 2, 0], ["b", "a", "b", "c", "a", ""]])
def test_numbers_are_in_the_order_in_which_values_first_appear(values):
    assert numbered(np.array(values)).tolist() == [0, 1, 0, 2, 1, 3]


def test_the_table_of_thresholds_has_the_groups_of_each_alone():
    features, known = clips(150, 6, 0, groups=15), np.arange(150) % 15
    pairs = pairs_of(*knn_graph(features, 12), 0.5)
    rows = at_thresholds(features, pairs, (0.95, 0.6), known)
    for row in rows:
        found = grouped(features, pairs, row["threshold"])
        assert {name: row[name] for name in ("groups", "clips", "largest")} == sizes(found)
        assert row["precision"] == agreement(found, known)["precision"]
    assert rows[1]["recall"] > rows[0]["recall"] and rows[1]["pairs"] > rows[0]["pairs"]
    assert "precision" not in at_thresholds(features, pairs, (0.9,), None)[0]


def test_equal_clips_are_found_where_they_have_to_be_1_similar():
    features = clips(200, 32, 3)
    features[100:] = features[:100]
    indices, scores = knn_graph(features, 5)
    assert scores[:, 0].min() < 1 < scores[:, 0].max()  # by rounding
    pairs = pairs_of(indices, scores, 0.8).above(1.0)
    assert grouped(features, pairs, 1.0).tolist() == [*range(100), *range(100)] and (pairs.similarity == 1).all()
