"""Confidence intervals: over the sources of the test set, and over seeds.

Letters: Q videos, S runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

RESAMPLES = 2000  # number of bootstrap samples
_CHUNK = 100  # number of samples computed at once


def source_interval(values: Tensor, sources: Tensor) -> list[float] | None:
    """Returns the 95 % percentile bootstrap interval of the mean of `values` [Q] (bool or float, NaN: left out).

    None if the values that count come from fewer than two sources, because one source does not show how sources differ.
    """
    means = resampled_means(values.double()[:, None], sources)
    return None if means is None else percentile_interval(means[:, 0])


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


def seed_interval(values: Sequence[float]) -> list[float] | None:
    """Returns the 95 % interval (Student's t) of the mean over S runs of different seeds; None for fewer than two."""
    if len(values) < 2:
        return None
    from scipy import stats  # 1.3 s of CPU time, which training and most evaluations do not need

    runs = torch.tensor(values, dtype=torch.float64)
    half = stats.t.ppf(0.975, len(runs) - 1) * (runs.std() / math.sqrt(len(runs))).item()
    return [runs.mean().item() - half, runs.mean().item() + half]
