"""Compares PMR, mining R@1 and CMR with sets and loops in plain Python."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from cpr_fast.mining.quality import (
    MiningQuality,
    class_mining_rate,
    class_units,
    gather_slots,
    hub_share,
    hubness,
    judge,
    mined_counts,
    mining_r1,
    positive_mining_rate,
)


def reference(batches, labels, sources):
    """Computes PMR, R@1 and CMR of an epoch from their definitions, one query at a time."""
    pmr, r1 = [], []
    found = {"source": defaultdict(set), "video": defaultdict(set)}
    for mined, queries in batches:
        for row, query in zip(mined.tolist(), queries.tolist(), strict=True):
            known = [v for v in row if v >= 0 and labels[v] >= 0 and labels[query] >= 0]
            right = [v for v in known if labels[v] == labels[query]]
            if known:
                pmr.append(len(right) / len(known))
            if row[0] in known:
                r1.append(float(row[0] in right))
            for video in right:
                found["video"][labels[video]].add(video)
                found["source"][labels[video]].add(sources[video])
    instances = {"source": defaultdict(set), "video": defaultdict(set)}
    for video, (label, source) in enumerate(zip(labels, sources, strict=True)):
        instances["video"][label].add(video)
        instances["source"][label].add(source)
    several = {c for c, of_class in instances["source"].items() if c >= 0 and len(of_class) > 1}
    cmr = {unit: {c: len(found[unit][c]) / len(instances[unit][c]) for c in several} for unit in found}
    return pmr, r1, cmr


@pytest.mark.parametrize(
    ("videos", "classes", "batch", "mined"),
    [(1, 1, 1, 1), (37, 5, 7, 3), (101, 9, 16, 5)],
)
@pytest.mark.parametrize("unknown", [False, True])
def test_an_epoch_equals_its_definition(videos, classes, batch, mined, unknown):
    rng = np.random.default_rng(videos * 2 + unknown)
    labels = rng.integers(0, classes, videos)
    labels[0] = classes - 1
    sources = rng.integers(0, max(1, videos // 3), videos)  # a source may have videos of several classes
    if unknown and videos > 1:
        labels[rng.random(videos) < 0.3] = -1
    batches = [
        (
            torch.from_numpy(rng.integers(-1, videos, (batch, mined))),
            torch.from_numpy(rng.integers(0, videos, batch)),
        )
        for _ in range(6)
    ]
    quality = MiningQuality(torch.from_numpy(labels), torch.from_numpy(sources), top_k=mined)
    for mined_videos, queries in batches:
        step_pmr, step_r1 = quality.update(mined_videos, queries).values()
        expected_pmr, expected_r1, _ = reference([(mined_videos, queries)], labels.tolist(), sources.tolist())
        assert step_pmr.item() == pytest.approx(np.mean(expected_pmr) if expected_pmr else math.nan, nan_ok=True)
        assert step_r1.item() == pytest.approx(np.mean(expected_r1) if expected_r1 else math.nan, nan_ok=True)
    pmr, r1, cmr = reference(batches, labels.tolist(), sources.tolist())
    summary = quality.summary()
    assert summary["pmr"] == pytest.approx(np.mean(pmr))
    assert summary["mining_r1"] == pytest.approx(np.mean(r1))
    assert summary["cmr_median"] == (pytest.approx(np.median(list(cmr["source"].values()))) if cmr["source"] else None)
    assert summary["cmr_mean"] == (pytest.approx(np.mean(list(cmr["source"].values()))) if cmr["source"] else None)
    assert summary["cmr_median_video"] == (
        pytest.approx(np.median(list(cmr["video"].values()))) if cmr["video"] else None
    )
    right = [
        (int(labels[q]), sum(labels[v] == labels[q] for v in row if v >= 0))
        for mined_videos, queries in batches
        for row, q in zip(mined_videos.tolist(), queries.tolist(), strict=True)
        if labels[q] >= 0 and any(v >= 0 and labels[v] >= 0 for v in row)
    ]
    assert quality.right.tolist() == [sum(n == k for _, n in right) for k in range(mined + 1)]
    assert quality.right_of_class.tolist() == [sum(n for c, n in right if c == label) for label in range(classes)]
    for unit, rates in cmr.items():
        measured = quality.class_rates(unit)
        assert {c: measured[c].item() for c in rates} == pytest.approx(rates)


def test_paper_cmr_is_a_multiple_of_one_over_the_sources_of_a_class():
    # UCF101 split 1: 18 sources per class, 5 clips each. If 15 of the sources are mined, the result is the paper's 83.3
    # %.
    labels, sources = torch.zeros(90, dtype=torch.int64), torch.arange(90) // 5
    quality = MiningQuality(labels, sources)
    quality.update(torch.arange(0, 75, 5)[:, None], torch.full((15,), 89))
    assert quality.class_rates("source").item() == pytest.approx(15 / 18)
    assert quality.class_rates("video").item() == pytest.approx(15 / 90)


def test_classes_of_one_source_have_no_cmr():
    # Class 0 has two sources; class 1 two videos of one source, which are siblings; class 2 one video.
    labels, sources = torch.tensor([0, 0, 1, 1, 2, -1]), torch.tensor([0, 1, 2, 2, 3, 4])
    quality = MiningQuality(labels, sources)
    quality.update(torch.tensor([[1, 2], [0, 4]]), torch.tensor([0, 2]))
    for unit in ("source", "video"):
        assert quality.class_rates(unit).tolist() == pytest.approx([0.5, math.nan, math.nan], nan_ok=True)
    assert quality.summary()["cmr_median"] == quality.summary()["cmr_mean"] == 0.5
    alone = MiningQuality(labels[2:], sources[2:])
    alone.update(torch.tensor([[2]]), torch.tensor([0]))
    assert alone.summary()["cmr_median"] is alone.summary()["cmr_median_video"] is None


def test_padding_is_not_part_of_the_mined_set():
    true_positive, known = judge(torch.tensor([[3, 4, -1, -1], [-1, -1, -1, -1]]), torch.tensor([3, 3]))
    assert positive_mining_rate(true_positive, known).tolist() == pytest.approx([0.5, math.nan], nan_ok=True)
    assert mining_r1(true_positive, known).tolist() == pytest.approx([1.0, math.nan], nan_ok=True)


def test_slots_are_looked_up_and_padding_stays_padding():
    slots = torch.tensor([[2, -1], [0, 1]])
    assert gather_slots(torch.tensor([7, 8, 9]), slots).tolist() == [[9, -1], [7, 8]]


def test_unlabelled_data_has_no_quality_and_no_exception():
    quality = MiningQuality(torch.full((4,), -1), torch.arange(4))
    rates = quality.update(torch.tensor([[1, 2], [0, 3]]), torch.tensor([0, 1]))
    assert rates["pmr"].isnan() and rates["mining_r1"].isnan()
    told = {name for name, value in quality.summary().items() if value is not None}
    assert told == {"hub_share", "mined_share"}  # all four videos were mined once, so the skewness is zero, too


def test_an_epoch_that_mined_nothing_has_no_quality():
    quality = MiningQuality(torch.zeros(4, dtype=torch.int64), torch.arange(4))
    quality.update(torch.full((2, 3), -1), torch.tensor([0, 1]))
    assert set(quality.summary().values()) == {None}


def test_hubness_is_the_skewness_of_the_counts():
    rng = np.random.default_rng(7)
    mined = torch.from_numpy(rng.integers(-1, 250, (40, 5)) // rng.integers(1, 30, (40, 5)))
    counts = [(mined == i).sum().item() for i in range(250)]
    assert mined_counts(mined, 250).tolist() == counts
    spread = np.array(counts) - np.mean(counts)
    assert hubness(torch.tensor(counts)).item() == pytest.approx((spread**3).mean() / (spread**2).mean() ** 1.5)
    assert hub_share(torch.tensor(counts)).item() == pytest.approx(sum(sorted(counts)[-2:]) / sum(counts))
    assert hubness(torch.full((5,), 3)).isnan() and hub_share(torch.zeros(5, dtype=torch.int64)).isnan()


def test_further_rates_are_means_over_the_queries_that_have_one():
    quality = MiningQuality(torch.zeros(4, dtype=torch.int64), torch.arange(4), extra=["age"])
    quality.update(torch.tensor([[1], [2]]), torch.tensor([0, 1]), {"age": torch.tensor([3.0, math.nan])})
    step = quality.update(torch.tensor([[1], [2]]), torch.tensor([0, 1]), {"age": torch.tensor([5.0, 7.0])})
    assert step["age"].item() == 6
    assert quality.summary()["age"] == pytest.approx(5)


def test_an_epoch_goes_on_from_its_state():
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(-1, 12, (5, 3), generator=generator), torch.randint(0, 12, (5,), generator=generator)

    labels, sources = torch.arange(12) % 3, torch.arange(12) // 2
    straight, first, second = (MiningQuality(labels, sources) for _ in range(3))
    for seed in (0, 1):
        straight.update(*draw(seed))
    first.update(*draw(0))
    second.load_state_dict(first.state_dict())
    second.update(*draw(1))
    assert second.summary() == straight.summary()


def test_reset_starts_a_new_epoch():
    quality = MiningQuality(torch.zeros(4, dtype=torch.int64), torch.arange(4))
    quality.update(torch.tensor([[1], [2]]), torch.tensor([0, 1]))
    quality.reset()
    quality.update(torch.tensor([[3]]), torch.tensor([0]))
    assert quality.summary()["cmr_median"] == pytest.approx(0.25)


def test_two_ranks_combine_to_the_whole():
    rng = np.random.default_rng(3)
    labels, sources = (
        torch.from_numpy(rng.integers(0, 4, 30)),
        torch.from_numpy(rng.integers(0, 9, 30)),
    )
    mined, queries = (
        torch.from_numpy(rng.integers(-1, 30, (10, 3))),
        torch.from_numpy(rng.integers(0, 30, 10)),
    )
    whole, left, right = (MiningQuality(labels, sources) for _ in range(3))
    whole.update(mined, queries)
    left.update(mined[:3], queries[:3])
    right.update(mined[3:], queries[3:])
    left.totals += right.totals
    left.counts += right.counts
    left.right += right.right
    left.right_of_class += right.right_of_class
    for unit in left.found:
        left.found[unit] = torch.maximum(left.found[unit], right.found[unit])
    assert left.summary() == pytest.approx(whole.summary())


def test_a_class_without_units_is_nan_and_unknown_units_count_nowhere():
    rates = class_mining_rate(torch.tensor([True, False, True]), torch.tensor([0, 0, -1]), 2)
    assert rates.tolist() == pytest.approx([0.5, math.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: judge(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)),
            "mined_labels",
        ),
        (
            lambda: judge(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)),
            r"\[3, 2\] and \[2\]",
        ),
        (
            lambda: class_units(torch.zeros(3), torch.zeros(2), "source"),
            r"\[3\] and \[2\]",
        ),
        (lambda: class_units(torch.zeros(3), torch.zeros(3), "clip"), "'clip'"),
        (
            lambda: MiningQuality(torch.zeros(3, dtype=torch.int64), torch.arange(3), top_k=2).update(
                torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
            ),
            r"P <= 2, got \[1, 3\]",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
