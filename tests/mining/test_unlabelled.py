"""The score without labels: compared with its definition in loops over single videos, and on planted features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cpr_fast.mining.auto import PAIRS
from cpr_fast.mining.unlabelled import NEIGHBOURS, ROWS, SIGNS, effective_rank, unlabelled_score


def planted(*, videos=150, width=12, classes=5, signal=1.0, sibling=0.6, noise=0.6, seed=0, per_source=2):
    """Features [N, 2, F] of a class, a source and noise of their own, and source ids [N]."""
    draw = torch.Generator().manual_seed(seed)
    vectors = lambda count: torch.randn(count, width, generator=draw) / math.sqrt(width)  # noqa: E731
    ids = torch.arange(videos) // per_source
    mean = signal * vectors(classes)[ids % classes] + sibling * vectors(int(ids.max()) + 1)[ids]
    own = vectors(videos)
    clips = torch.stack([mean + noise * (0.5 * own + vectors(videos)) for _ in range(2)], dim=1)
    return clips, ids


def by_definition(features, ids):
    """The signs in NumPy, one video at a time."""
    x = features.double().numpy()
    x = x / np.linalg.norm(x, axis=2, keepdims=True)
    first, second, ids = x[:, 0], x[:, 1], ids.numpy()
    count = len(ids)

    def near(query, wanted, source):
        allowed = [k for k in range(count) if ids[k] != source or k == wanted]
        scores = second[allowed] @ query
        own = second[wanted] @ query
        others = [score for k, score in zip(allowed, scores, strict=True) if k != wanted]
        rank = 1 + sum(score > own for score in others) + sum(score == own for score in others) / 2
        return -math.log(rank / len(allowed)) - 1

    def sibling(video):
        same = [k for k in range(count) if ids[k] == ids[video]]
        return same[(same.index(video) + 1) % len(same)] if len(same) > 1 else None

    paired = [(i, sibling(i)) for i in range(count) if sibling(i) is not None]
    neighbours = []
    for i in range(count):
        others = [k for k in range(count) if ids[k] != ids[i]]
        nearest = sorted(others, key=lambda k, i=i: -float(first[k] @ first[i]))[:NEIGHBOURS]
        neighbours += [near(second[i], k, ids[i]) for k in nearest]
    values = np.linalg.svd(np.concatenate([first, second]), compute_uv=False)
    shares = values / values.sum()
    signs = {
        "same_video": np.mean([near(first[i], i, ids[i]) for i in range(count)]),
        "siblings": np.mean([near(first[i], k, ids[i]) for i, k in paired]) if len(paired) >= PAIRS else None,
        "neighbours": np.mean(neighbours),
    }
    known = [value for value in signs.values() if value is not None]
    rank = math.exp(-sum(share * math.log(share) for share in shares if share > 0))
    mean = np.mean(known)
    return {"score": mean * math.log(rank) if mean > 0 else mean, **signs, "effective_rank": rank}


@pytest.mark.parametrize(("videos", "per_source"), [(97, 2), (66, 3), (31, 1), (131, 7)])
def test_the_score_equals_its_definition(videos, per_source):
    features, ids = planted(videos=videos, per_source=per_source, seed=videos)
    found, expected = unlabelled_score(features, ids), by_definition(features, ids)
    assert (expected["siblings"] is None) == (videos == 31)
    assert found == {name: None if value is None else pytest.approx(value) for name, value in expected.items()}
    assert set(found) == {"score", *SIGNS}


def test_many_videos_are_compared_in_parts():
    features, ids = planted(videos=ROWS + 7, width=4)
    whole = unlabelled_score(features, ids)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    mixed = unlabelled_score(features[order], ids[order])
    assert mixed["same_video"] == pytest.approx(whole["same_video"])
    assert mixed["neighbours"] == pytest.approx(whole["neighbours"])


@pytest.mark.parametrize("seed", range(3))
def test_it_rises_with_the_signal(seed):
    scores = [unlabelled_score(*planted(noise=noise, seed=seed))["score"] for noise in (3.0, 1.5, 0.8, 0.4)]
    assert scores == sorted(scores) and scores[-1] > 2 * scores[0]


def test_collapsed_features_do_not_win():
    features, ids = planted()
    good = unlabelled_score(features, ids)["score"]
    draw = torch.Generator().manual_seed(3)
    point = torch.ones_like(features)
    line = (features.mean(2, keepdim=True) * torch.randn(12, generator=draw)).sign() * torch.ones(12)
    collapsed = {
        "zeros": torch.zeros_like(features),
        "one point": point,
        "one point, but for rounding": point + 1e-7 * torch.randn(features.shape, generator=draw),
        "one point beside the signal": features + 300,  # the signal is there, but in less than 1 % of the length
        "two opposite points": line,
        "noise": torch.randn(features.shape, generator=draw),
    }
    scores = {name: unlabelled_score(values, ids)["score"] for name, values in collapsed.items()}
    assert all(score < 0.8 * good for score in scores.values()), (good, scores)
    for equal in (torch.zeros_like(features), point):  # equal features share their ranks: none is near
        found = unlabelled_score(equal, ids)
        assert max(found[sign] for sign in ("same_video", "siblings", "neighbours")) < 0
    for name in ("zeros", "one point", "one point, but for rounding", "noise"):
        assert scores[name] < 0.1 * good, (name, scores[name])


@pytest.mark.parametrize("videos", [64, 150, 512])
def test_features_that_collapsed_to_one_point_score_below_noise(videos):
    """Noise of a finite number of videos is slightly below chance; a score of 0 would be above it."""
    draw = torch.Generator().manual_seed(videos)
    ids = torch.arange(videos) // 2
    noise = [unlabelled_score(torch.randn(videos, 2, 64, generator=draw), ids)["score"] for _ in range(3)]
    direction = torch.randn(64, generator=draw)  # the products of equal vectors differ in their last bits
    points = [torch.zeros(videos, 2, 64), torch.ones(videos, 2, 64), direction.expand(videos, 2, 64)]
    points.append(direction * (1 + 1e-7 * torch.randn(videos, 2, 64, generator=draw)))
    collapsed = [unlabelled_score(features, ids)["score"] for features in points]
    assert collapsed == pytest.approx([math.log(2) - 1] * 4, abs=0.05)
    assert max(collapsed) < min(noise) < 0.1


def test_unknown_sources_leave_out_the_siblings():
    features, _ = planted()
    found = unlabelled_score(features, torch.arange(len(features)))
    assert found["siblings"] is None
    assert found["score"] == pytest.approx(
        (found["same_video"] + found["neighbours"]) / 2 * math.log(found["effective_rank"])
    )


def test_the_fewest_videos():
    found = unlabelled_score(torch.eye(3)[:, None].repeat(1, 2, 1), torch.tensor([0, 0, 1]))
    assert math.isfinite(found["score"]) and found["siblings"] is None


@pytest.mark.parametrize(
    ("features", "ids", "said"),
    [
        (torch.zeros(4, 3, 2), torch.arange(4), r"got \[4, 3, 2\] and \[4\]"),
        (torch.zeros(4, 2, 2), torch.arange(5), r"got \[4, 2, 2\] and \[5\]"),
        (torch.zeros(0, 2, 2), torch.arange(0), "two sources or more"),
        (torch.ones(4, 2, 2), torch.zeros(4, dtype=torch.int64), "two sources or more"),
        (torch.full((4, 2, 2), math.nan), torch.arange(4), "expected finite"),
        (torch.ones(4, 2, 2), torch.tensor([0, 1, -1, 2]), "ids: expected source ids of 0 or more, got -1"),
    ],
)
def test_bad_input_is_named(features, ids, said):
    with pytest.raises(ValueError, match=said):
        unlabelled_score(features, ids)


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.eye(7)).item() == pytest.approx(7)
    assert effective_rank(torch.ones(7, 3)).item() == pytest.approx(1)
