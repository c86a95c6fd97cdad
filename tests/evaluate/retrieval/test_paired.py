"""Paired differences: planted ones are found, and null ones are called significant about as often as stated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from cpr_fast.evaluate.features.intervals import RESAMPLES
from cpr_fast.evaluate.retrieval.paired import paired_difference, seed_difference


def two_methods(rng: np.random.Generator, gain: float, sources: int = 60) -> tuple[torch.Tensor, ...]:
    """Average precisions of two methods on videos of which a source's are alike, and the sources. The second method's
    mean is lower by `gain`."""
    sizes = rng.integers(1, 6, sources)
    source = np.repeat(np.arange(sources), sizes)
    hardness = np.repeat(rng.uniform(0.05, 0.95, sources), sizes)
    tilt = np.repeat(rng.normal(0, 0.05, sources), sizes)  # what one method does better on a whole source
    first, second = (hardness + rng.normal(0, 0.1, len(source)) for _ in range(2))
    return torch.from_numpy(first + tilt), torch.from_numpy(second - gain), torch.from_numpy(source)


def test_a_null_difference_is_called_significant_about_as_often_as_stated():
    rng = np.random.default_rng(1)
    found = [paired_difference(*two_methods(rng, 0.0)) for _ in range(400)]
    assert 0.92 <= np.mean([low <= 0 <= high for low, high in (each["ci95"] for each in found)]) <= 0.98
    assert 0.02 <= np.mean([each["p"] < 0.05 for each in found]) <= 0.08


def test_a_planted_difference_is_found_although_the_single_intervals_overlap():
    first, second, sources = two_methods(np.random.default_rng(2), 0.05)
    found = paired_difference(first, second, sources)
    assert found["difference"] == pytest.approx((first - second).mean().item())
    assert found["ci95"][0] > 0 and found["p"] < 0.01
    assert found["first"] == pytest.approx(first.mean().item()) and found["sources"] == 60
    alone = paired_difference(first, torch.zeros_like(first), sources)["ci95"]
    assert alone[0] < second.mean() < alone[1]  # unpaired, the two could not be told apart
    turned = paired_difference(second, first, sources)
    assert turned["difference"] == -found["difference"] and turned["p"] == found["p"]
    assert turned["ci95"] == pytest.approx([-bound for bound in found["ci95"][::-1]])


def test_siblings_do_not_count_as_independent_queries():
    """3 sources of 100 videos each: 300 independent queries would make this difference certain."""
    sources = torch.arange(3).repeat_interleave(100)
    first = torch.tensor([0.3, 0.3, 0.0]).repeat_interleave(100)
    second = torch.tensor([0.1, 0.1, 0.1]).repeat_interleave(100)
    assert paired_difference(first, second, sources)["p"] > 0.05
    assert paired_difference(first, second, torch.arange(300))["p"] < 0.01


def test_ugly_sizes():
    one = torch.tensor([0.5], dtype=torch.float64), torch.tensor([0.25], dtype=torch.float64), torch.tensor([4])
    found = paired_difference(*one)
    assert (found["difference"], found["ci95"], found["p"]) == (0.25, None, None)
    assert (found["queries"], found["sources"]) == (1, 1)
    nothing = torch.full((2,), torch.nan, dtype=torch.float64)
    found = paired_difference(nothing, nothing, torch.arange(2))
    assert found["difference"] is None and found["queries"] == 0
    values = torch.rand(9, dtype=torch.float64)
    found = paired_difference(values, values, torch.arange(9))
    assert found["difference"] == 0 and found["p"] == 1
    high = stats.binomtest(0, 9).proportion_ci(method="exact").high
    assert found["ci95"] == pytest.approx([-high, high])


@pytest.mark.parametrize("count", [2, 5, 6, 61])
@pytest.mark.parametrize("difference", [-1.0, 0.25, 1.0])
def test_equal_differences_do_not_make_the_difference_certain(count, difference):
    """One network right and the other wrong for every query: p is that of the sign test, and agrees with the
    interval."""
    first = torch.full((count,), max(difference, 0.0), dtype=torch.float64)
    found = paired_difference(first, first - difference, torch.arange(count))
    low, high = found["ci95"]
    assert low < high and -1 <= low <= difference <= high <= 1
    assert (found["p"] < 0.05) == (low > 0 or high < 0)
    if abs(difference) == 1:
        assert found["p"] == pytest.approx(stats.binomtest(0, count).pvalue)


def test_queries_without_a_value_are_left_out_of_both():
    first, second = torch.tensor([0.5, torch.nan, 0.7]).double(), torch.tensor([0.1, torch.nan, 0.5]).double()
    found = paired_difference(first, second, torch.arange(3))
    assert found["queries"] == 2 and found["difference"] == pytest.approx(0.3)
    assert found["p"] == pytest.approx(2 / (RESAMPLES + 1))  # no sample at or below 0


def test_seeds_are_compared_by_students_paired_test():
    first, second = np.array([0.606, 0.728, 0.637]), np.array([0.494, 0.562, 0.430])
    found = seed_difference((first - second).tolist())
    theirs = stats.ttest_rel(first, second)
    interval = theirs.confidence_interval(0.95)
    assert found["ci95"] == pytest.approx([interval.low, interval.high])
    assert found["p"] == pytest.approx(theirs.pvalue) and found["seeds"] == 3
    assert found["d_z"] == pytest.approx(theirs.statistic / np.sqrt(3))
    assert seed_difference([0.1]) == {
        "difference": 0.1, "ci95": None, "p": None, "d_z": None, "seeds": 1, "differences": [0.1]
    }  # fmt: skip
    equal = seed_difference([0.1, 0.1, 0.1])
    assert equal["d_z"] is None and equal["p"] is None and equal["ci95"] is None
