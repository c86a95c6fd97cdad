"""Bootstrap intervals over sources against a plain loop, and how often they hold the true value."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from scipy import stats

from cpr_fast.evaluate.features import intervals as module
from cpr_fast.evaluate.features.intervals import RESAMPLES, binomial_interval, resampled_means, source_interval


def test_it_resamples_sources_not_videos():
    # 4 sources of 50 equal videos each: an interval over videos would be about .5 +- .07.
    hits = torch.tensor([1, 1, 0, 0]).repeat_interleave(50).bool()
    assert source_interval(hits, torch.arange(4).repeat_interleave(50)) == [0.0, 1.0]
    assert source_interval(hits, torch.arange(200)) == pytest.approx([0.43, 0.57], abs=0.01)


def test_samples_are_those_of_a_loop_over_the_same_draws():
    """Sources of unequal size, numbered with gaps; values that are NaN do not count, nor does a source of only NaN."""
    rng = torch.Generator().manual_seed(3)
    sources = torch.tensor([7, 7, 7, 2, 90, 90, 4, 4, 50])
    values = torch.rand(9, 2, dtype=torch.float64, generator=rng)
    values[5, 1] = values[8, 0] = torch.nan
    got = resampled_means(values, sources)
    assert got.shape == (RESAMPLES, 2)
    counted = [i for i in range(9) if i not in (5, 8)]
    names = sorted({int(sources[i]) for i in counted})
    for sample, times in zip(got, module._draws(len(names)).tolist(), strict=True):
        drawn = [i for name, count in zip(names, times, strict=True) for i in counted * count if sources[i] == name]
        assert sum(times) == len(names) and sample.tolist() == pytest.approx(values[drawn].mean(0).tolist())


@pytest.mark.parametrize(
    ("values", "sources"), [([], []), ([0.5], [3]), ([0.0, 1.0], [3, 3]), ([0.0, torch.nan], [3, 4])]
)
def test_one_source_has_no_interval(values, sources):
    assert source_interval(torch.tensor(values), torch.tensor(sources, dtype=torch.int64)) is None


@pytest.mark.parametrize("count", [2, 12, 61, 2000])
@pytest.mark.parametrize("hit", [False, True])
def test_no_hit_and_only_hits_have_the_exact_interval(count, hit):
    """Every source has three videos, which are one observation only; a value that does not count adds no source."""
    expected = stats.binomtest(count * hit, count).proportion_ci(method="exact")
    sources = torch.arange(count).repeat_interleave(3)
    got = source_interval(torch.full((3 * count,), hit), sources)
    assert got == pytest.approx([expected.low, expected.high])
    values = torch.cat([torch.full((3 * count,), float(hit)), torch.tensor([torch.nan])])
    assert source_interval(values, torch.cat([sources, torch.tensor([count])])) == pytest.approx(got)


@pytest.mark.parametrize("value", [0.3, 0.5])
def test_equal_values_between_the_ends_have_an_interval_inside_the_range(value):
    low, high = source_interval(torch.full((5,), value, dtype=torch.float64), torch.arange(5))
    assert 0 < low < value < high < 1
    halves = torch.tensor([0, 1] * 5)  # each source answers one of two queries
    low, high = source_interval(halves.bool(), torch.arange(5).repeat_interleave(2))
    assert 0 < low < 0.5 < high < 1


def test_it_is_deterministic_and_quick():
    values, sources = torch.rand(3783, generator=torch.Generator().manual_seed(0)), torch.arange(3783)
    module._draws.cache_clear()
    start = time.process_time()
    first = source_interval(values, sources)
    seconds = time.process_time() - start
    torch.rand(5)
    module._draws.cache_clear()
    assert source_interval(values, sources) == first
    assert seconds < 1  # .14 s on a core of a Zen 1


def test_it_holds_the_true_mean_about_as_often_as_it_says():
    """400 sets of 60 sources with 1 to 6 correlated videos each; 95 % +- 2 % standard error 1.1 %."""
    rng = np.random.default_rng(0)
    held = []
    for _ in range(400):
        sizes = rng.integers(1, 7, 60)
        sources = np.repeat(np.arange(60), sizes)
        chance = np.repeat(rng.beta(2, 2, 60), sizes)  # mean .5, shared by the videos of a source
        low, high = source_interval(torch.from_numpy(rng.random(len(sources)) < chance), torch.from_numpy(sources))
        held.append(low <= 0.5 <= high)
    assert 0.92 <= np.mean(held) <= 0.98


@pytest.mark.parametrize(("share", "draws"), [(0.0, 1), (0.0, 6), (0.1, 60), (0.5, 7), (1.0, 40), (0.37, 1000)])
def test_the_interval_of_a_share_solves_wilsons_equation(share, draws):
    """A bound b is a share from which `share` is 1.96 standard errors away, those of b itself; it lies in 0..1."""
    low, high = binomial_interval(share, draws)
    assert -1e-12 <= low <= share <= high <= 1 + 1e-12
    for bound in (low, high):
        error = np.sqrt(bound * (1 - bound) / draws)
        assert abs(bound - share) == pytest.approx(stats.norm.ppf(0.975) * error, abs=1e-6)
