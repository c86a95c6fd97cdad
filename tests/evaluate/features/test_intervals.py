"""Bootstrap intervals over sources against a plain loop, and how often they hold the true value."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from cpr_fast.evaluate.features import intervals as module
from cpr_fast.evaluate.features.intervals import RESAMPLES, resampled_means, source_interval


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
