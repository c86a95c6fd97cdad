"""The rule of `mining.stages = "auto"`: its criteria against a brute force in float64, and known answers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from cpr_fast.mining.auto import COUNTS, JUDGED, LEAST_MUTUAL, choose, possible
from cpr_fast.mining.stages import stage_keep
from cpr_fast.ops import cascade_select


def planted(classes=8, sources=8, videos=2, width=32, signal=(0.7, 0.7), scene=0.4, seed=0):
    """Returns features [2, K, D], source ids and labels [K] of classes that are seen in two noisy views."""
    generator = torch.Generator().manual_seed(seed)

    def directions(count):
        return F.normalize(torch.randn(count, width, generator=generator), dim=1)

    labels = torch.arange(classes).repeat_interleave(sources * videos)
    ids = torch.arange(classes * sources).repeat_interleave(videos)
    views = [
        weight * directions(classes)[labels] + scene * directions(classes * sources)[ids] + directions(len(ids))
        for weight in signal
    ]
    return F.normalize(torch.stack(views), dim=2), ids, labels


def pmr(features, ids, labels, views, keep):
    mined, _ = cascade_select(features, features, views, keep, query_ids=ids, memory_ids=ids)
    return (labels[mined] == labels[:, None]).double().mean().item()


def best_fixed(features, ids, labels, count):
    return max(pmr(features, ids, labels, s.views, s.keep) for s in possible(len(ids), count))


def reference(features, ids, top_k):
    """Returns {(views, ratio): score} of all cascades and the mutual shares, from loops over pairs in float64."""
    features, ids = features.double().numpy(), ids.numpy()
    scores, size = features @ features.transpose(0, 2, 1), len(ids)  # [2, K, K]
    allowed = (ids != -1) & (ids != ids[:, None])

    def near(anchor, entry):
        nearer = [(allowed[anchor] & (view[anchor] > view[anchor, entry])).sum() for view in scores]
        return np.mean([-math.log((1 + count) / allowed[anchor].sum()) - 1 for count in nearer])

    def mined(query, stages):
        left = np.flatnonzero(allowed[query])
        for view, keep in zip(stages.views, stages.keep, strict=True):
            left = left[np.argsort(-scores[view, query, left], kind="stable")[:keep]]
            if view != stages.views[-1] or keep != stages.keep[-1]:
                left = np.sort(left)
        return left

    rows = [slot for slot in range(size) if ids[slot] != -1]
    members = {source: [slot for slot in rows if ids[slot] == source] for source in set(ids.tolist())}
    sibling = {q: (same * 2)[same.index(q) + 1] for q in rows if len(same := members[ids[q]]) > 1}
    found, lists = {}, {}
    for stages in possible(size, min(size, max(JUDGED, top_k))):
        lists[stages] = {q: mined(q, stages) for q in rows}
        judged = {q: entries[:JUDGED] for q, entries in lists[stages].items()}
        to_sibling = [near(sibling[q], x) for q in sibling for x in judged[q]] if len(sibling) >= 64 else []
        agree = [near(m[0], x) for m in judged.values() for x in m[1:] if ids[x] != ids[m[0]]]
        found[stages] = np.mean([np.mean(part) for part in (to_sibling, agree) if part])
    chosen = lists[max(found, key=found.get)]
    near_query = {q: [near(x, q) for x in entries] for q, entries in chosen.items()}
    counts = [*dict.fromkeys([*(count for count in COUNTS if count < top_k), top_k])]
    means = {count: np.mean([v for values in near_query.values() for v in values[:count]]) for count in [1, *counts]}
    shares = {count: means[count] / means[1] for count in counts}
    return {(stages.views, stages.ratio): score for stages, score in found.items()}, shares


@pytest.mark.parametrize(("videos", "top_k"), [(2, 3), (1, 7), (3, 1)])
def test_criteria_are_those_of_a_brute_force(videos, top_k):
    generator = torch.Generator().manual_seed(videos)
    ids = torch.arange(67) // videos
    ids = ids[torch.randperm(67, generator=generator)]
    ids[11] = -1
    # Small whole numbers: dot products are exact, and many are equal.
    features = torch.randint(-2, 3, (2, 67, 6), generator=generator).float() + 2 * (ids % 5 == 0)[None, :, None]
    scores, mutual = reference(features, ids, top_k)
    choice = choose(features, ids, top_k)
    judged = {(tuple(row["views"]), row["ratio"]): row["score"] for row in choice.judged}
    assert judged == pytest.approx(scores, abs=1e-4)
    assert choice.criteria["mutual"] == pytest.approx(mutual, abs=1e-6)
    assert scores[choice.views, choice.ratio] == pytest.approx(max(scores.values()), abs=1e-9)
    assert choice.top_k == max((count for count, share in mutual.items() if share >= LEAST_MUTUAL), default=1)
    assert (choice.criteria["siblings"] is None) == (videos == 1)


@pytest.mark.parametrize("noisy", [0, 1])
@pytest.mark.parametrize("videos", [1, 2])
def test_a_view_of_noise_is_not_compared_last(noisy, videos):
    signal = [1.0, 1.0]
    signal[noisy] = 0.0
    features, ids, labels = planted(signal=signal, videos=videos, sources=16 // videos)
    choice = choose(features, ids, 5)
    assert choice.views[-1] != noisy
    found = pmr(features, ids, labels, choice.views, choice.keep)
    assert found >= 0.95 * best_fixed(features, ids, labels, choice.top_k)
    last_is_noise = (noisy, 1 - noisy, noisy, 1 - noisy, noisy)
    assert pmr(features, ids, labels, last_is_noise, stage_keep(5, len(ids), 0.5, 5)) < 0.6 * found


def test_exchanged_views_exchange_the_order():
    features, ids, _ = planted(signal=(0.9, 0.5))
    choice, exchanged = choose(features, ids, 5), choose(features.flip(0), ids, 5)
    assert exchanged.views == tuple(1 - view for view in choice.views)
    assert (exchanged.ratio, exchanged.keep) == (choice.ratio, choice.keep)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_choice_is_near_the_best_cascade_found_with_labels(seed):
    features, ids, labels = planted(seed=seed)
    choice = choose(features, ids, 5)
    found = pmr(features, ids, labels, choice.views, choice.keep)
    assert found >= 0.95 * best_fixed(features, ids, labels, choice.top_k)
    assert found >= 0.9 * max(best_fixed(features, ids, labels, count) for count in (1, 2, 3, 5))


def test_copies_of_a_video_do_not_mislead():
    features, ids, labels = planted(sources=4, videos=2)
    for copied in (ids, ids + ids.max() + 1):  # known as siblings, or under another source
        everything = torch.cat([features, features], dim=1), torch.cat([ids, copied]), torch.cat([labels, labels])
        choice = choose(*everything[:2], 3)
        found = pmr(*everything, choice.views, choice.keep)
        assert found >= 0.9 * best_fixed(*everything, choice.top_k)


def test_easily_told_classes_let_more_entries_be_positives():
    few = choose(*planted(signal=(0.5, 0.5), sources=24)[:2], 20)
    many = choose(*planted(signal=(3.0, 3.0), sources=24)[:2], 20)
    assert few.top_k < many.top_k <= 20


@pytest.mark.parametrize("size", [1, 2, 5, 9, 24])
def test_a_memory_too_small_for_a_cascade_has_fewer_stages(size):
    features, ids, _ = planted(videos=1)
    choice = choose(features[:, :size], ids[:size], 1)
    assert choice.top_k == 1
    assert len(choice.views) == 1 or choice.keep[-2] > JUDGED
    assert all(kept > 5 for stages in possible(size, 5) if len(stages.views) > 1 for kept in stages.keep[:-1])


def test_without_entries_to_judge_the_choice_is_one_stage_in_the_other_view():
    choice = choose(planted()[0][:, :20], torch.zeros(20, dtype=torch.int64), 5)
    assert (choice.views, choice.keep) == ((1,), (1,))
    assert choice.reason(("rgb", "flow")) == "flow, top-1: the entries of the memory allow no judgement"


def test_the_reason_names_cascade_and_criteria():
    features, ids, _ = planted()
    choice = choose(features, ids, 5)
    reason = choice.reason(("rgb", "flow"))
    order = "-".join(("rgb", "flow")[view] for view in choice.views)
    assert reason.startswith(f"{order}, ratio {choice.ratio:g}, top-{choice.top_k}: the best of ")
    assert f"nearness to siblings {choice.criteria['siblings']:.2f}" in reason
    assert choice.judged[0]["views"] == list(choice.views)
    unjudged = {"views": [1], "ratio": 1.0, "siblings": None, "mined_agree": None, "score": None}
    assert dataclasses.replace(choice, judged=[*choice.judged, unjudged]).reason(("rgb", "flow")) == reason.replace(
        f"{len(choice.judged)} cascades", f"{len(choice.judged) + 1} cascades"
    )
    clear = choose(*planted(signal=(3.0, 3.0), sources=24)[:2], 5)
    share = clear.criteria["mutual"][clear.top_k]
    assert clear.top_k > 1
    assert clear.reason(("rgb", "flow")).endswith(f"keep {share:.0%} of the mutual nearness of the first one")
    assert choose(features, ids, 1).reason(("rgb", "flow")).endswith("; only the first entry is kept as a positive")


@pytest.mark.parametrize(
    ("shape", "count", "top_k", "message"),
    [
        ((3, 10, 4), 10, 1, r"features, ids: expected \[2, K, D\] and \[K\], got \[3, 10, 4\] and \[10\]"),
        ((2, 10, 4), 9, 1, r"got \[2, 10, 4\] and \[9\]"),
        ((2, 10, 4), 10, 0, "top_k: expected 1..10, got 0"),
        ((2, 10, 4), 10, 11, "top_k: expected 1..10, got 11"),
    ],
)
def test_bad_arguments_are_named(shape, count, top_k, message):
    with pytest.raises(ValueError, match=message):
        choose(torch.ones(shape), torch.arange(count), top_k)


def test_an_empty_memory_is_named():
    with pytest.raises(ValueError, match="ids: expected at least one filled slot, got 10 empty ones"):
        choose(torch.ones(2, 10, 4), torch.full((10,), -1), 1)
