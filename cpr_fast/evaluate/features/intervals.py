"""Confidence intervals: over the sources of the test set, over seeds, and of a share of independent draws.

If all sources have the same mean, for example because no query was answered correctly, every bootstrap sample is equal,
and the percentiles would claim that the value is known exactly. The bound of Clopper and Pearson (1934) for 0 of n is
used instead: had a share of more than u = 1 - 0.025^(1 / n) of all sources another mean, n sources would show none of
them with a probability below 2.5 %.

Letters: Q videos, S runs, n sources.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

RESAMPLES = 2000  # number of bootstrap samples
NO_SPREAD = 1e-12  # a spread this small is rounding
_CHUNK = 100  # number of samples computed at once


def source_interval(values: Tensor, sources: Tensor) -> list[float] | None:
    """Returns the 95 % percentile bootstrap interval of the mean of `values` [Q] (bool, or float in [0, 1]; NaN: left
    out), or the bound of `unseen_interval` if all sources have the same mean.

    None if the values that count come from fewer than two sources, because one source does not show how sources differ.
    """
    values = values.double()
    means = resampled_means(values[:, None], sources)
    return None if means is None else mean_interval(means[:, 0], len(sources[~values.isnan()].unique()), 0, 1)


def are_equal(means: Tensor) -> bool:
    """Returns whether bootstrap samples [RESAMPLES] differ by rounding only, as if all sources have the same mean."""
    return (means.max() - means.min()).item() <= NO_SPREAD


def mean_interval(means: Tensor, count: int, least: float, most: float) -> list[float]:
    """Returns the 95 % interval of a mean from its bootstrap samples `means` [RESAMPLES] over `count` sources.

    Args:
        least, most: The smallest and the largest value that a query can have.
    """
    if are_equal(means):
        return unseen_interval(means[0].item(), count, least, most)
    return percentile_interval(means)


def unseen_interval(value: float, count: int, least: float, most: float) -> list[float]:
    """Returns the 95 % interval of the mean of values in [least, most] where all `count` sources have the mean `value`.

    For a share of 0 or 1 it is the interval of Clopper and Pearson (1934); see the text of this module.
    """
    unseen = 1 - 0.025 ** (1 / count)
    return [value - unseen * (value - least), value + unseen * (most - value)]


def resampled_means(values: Tensor, sources: Tensor) -> Tensor | None:
    """Returns the means of bootstrap samples of the columns of `values` [Q, C] float64: [RESAMPLES, C] float64.

    Clips of one source are not independent, so whole `sources` [Q] int64 are drawn, each with all its videos. The seed
    is fixed, and all columns use the same draws, so that columns can be compared sample by sample. Rows that are NaN in
    any column are left out. Returns None if the other rows come from fewer than two sources.
    """
    counted = ~values.isnan().any(1)
    unit = torch.unique(sources[counted], return_inverse=True)[1]
    units = int(unit.max()) + 1 if len(unit) else 0
    if units < 2:
        return None
    with_size = torch.cat([values[counted], torch.ones(len(unit), 1, dtype=torch.float64)], 1)
    sums = torch.zeros(units, with_size.shape[1], dtype=torch.float64).index_add_(0, unit, with_size)
    total = torch.cat([times.double() @ sums for times in _draws(units).split(_CHUNK)])
    return total[:, :-1] / total[:, -1:]


@lru_cache(maxsize=1)  # all rows of an evaluation have the same number of sources
def _draws(units: int) -> Tensor:
    """Returns how often each source is in each bootstrap sample: [RESAMPLES, units] int16."""
    generator = torch.Generator().manual_seed(0)
    times = torch.zeros(RESAMPLES, units, dtype=torch.int16)
    for chunk in times.split(_CHUNK):
        drawn = torch.randint(units, (len(chunk), units), generator=generator)
        chunk.scatter_add_(1, drawn, torch.ones((), dtype=torch.int16).expand_as(drawn))
    return times


def percentile_interval(samples: Tensor) -> list[float]:
    """Returns the bounds between which 95 % of the samples [N] float64 lie."""
    return torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def binomial_interval(share: float, draws: int) -> list[float]:
    """Returns the 95 % interval of Wilson (1927) for a share of `draws` >= 1 independent draws."""
    z2 = 1.959964**2
    centre, half = share + z2 / (2 * draws), math.sqrt(z2 * (share * (1 - share) + z2 / (4 * draws)) / draws)
    return [(centre - half) / (1 + z2 / draws), (centre + half) / (1 + z2 / draws)]


def seed_interval(values: Sequence[float]) -> list[float] | None:
    """Returns the 95 % interval (Student's t) of the mean over S runs of different seeds.

    None for fewer than two runs, and if all values are equal: then the runs do not show how seeds differ.
    """
    runs = torch.tensor(values, dtype=torch.float64)
    if len(values) < 2 or runs.std().item() <= NO_SPREAD:
        return None
    from scipy import stats  # 1.3 s of CPU time, which training and most evaluations do not need

    half = stats.t.ppf(0.975, len(runs) - 1) * (runs.std() / math.sqrt(len(runs))).item()
    return [runs.mean().item() - half, runs.mean().item() + half]
