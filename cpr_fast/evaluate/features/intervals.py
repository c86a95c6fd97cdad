"""Confidence intervals: over the sources of the test set, and over seeds.

Letters: Q videos, S runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy import stats
from torch import Tensor

RESAMPLES = 2000  # number of bootstrap samples
_CHUNK = 100  # number of samples computed at once


def source_interval(hits: Tensor, sources: Tensor) -> list[float]:
    """Returns the 95 % percentile bootstrap interval of the mean of `hits` [Q] (bool or 0..1).

    Clips of one source are not independent, so whole `sources` [Q] int64 are drawn, each with all its videos. The seed
    is fixed.
    """
    unit = torch.unique(sources, return_inverse=True)[1]
    units = int(unit.max()) + 1
    total, size = torch.zeros(2, units, dtype=torch.float64).unbind()
    total.index_add_(0, unit, hits.double())
    size.index_add_(0, unit, torch.ones_like(hits, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(RESAMPLES // _CHUNK):
        drawn = torch.randint(units, (_CHUNK, units), generator=generator)
        means.append(total[drawn].sum(1) / size[drawn].sum(1))
    return torch.quantile(torch.cat(means), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def seed_interval(values: Sequence[float]) -> list[float] | None:
    """Returns the 95 % interval (Student's t) of the mean over S runs of different seeds; None for fewer than two."""
    if len(values) < 2:
        return None
    runs = torch.tensor(values, dtype=torch.float64)
    half = stats.t.ppf(0.975, len(runs) - 1) * (runs.std() / math.sqrt(len(runs))).item()
    return [runs.mean().item() - half, runs.mean().item() + half]
