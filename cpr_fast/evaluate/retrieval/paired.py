"""Whether two networks differ: paired differences over queries, whose sources are resampled, and over seeds.

The two intervals answer different questions. The one over sources says how the difference of these networks varies over
other videos; the one over seeds says how the difference of the two settings varies over other trainings.

Letters: Q queries, S seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from cpr_fast.evaluate.features.intervals import NO_SPREAD, are_equal, mean_interval, resampled_means, seed_interval


def paired_difference(first: Tensor, second: Tensor, sources: Tensor) -> dict[str, Any]:
    """Returns the difference of the means of two measures of the same queries.

    Args:
        first, second: [Q] float64 in [0, 1], NaN where a query has no value; such queries are left out of both.
        sources: [Q] int64.
    Returns:
        `first` and `second` (means), `difference` (first - second), its 95 % percentile bootstrap interval over sources
        `ci95`, the two-sided `p` (twice the smaller share of bootstrap samples at or below 0 and at or above 0, where 0
        itself counts as one more sample, at most 1), and the numbers of `queries` and `sources`. Values are None if
        there is no query, `ci95` and `p` also if there is one source only. If all sources have the same difference d,
        `ci95` is that of `unseen_interval`, and `p` = 2 (1 + |d|)^-n, at which an interval of its kind just excludes 0.
    """
    paired = first - second
    counted = ~paired.isnan()
    found = {"queries": int(counted.sum()), "sources": len(sources[counted].unique())}
    if not found["queries"]:
        return dict.fromkeys(("first", "second", "difference", "ci95", "p")) | found
    found |= {"first": first[counted].mean().item(), "second": second[counted].mean().item()}
    found |= {"difference": paired[counted].mean().item(), "ci95": None, "p": None}
    means = resampled_means(paired[:, None], sources)
    if means is not None:
        if are_equal(means):
            p = 2 * (1 + abs(found["difference"])) ** -found["sources"]
        else:
            p = 2 * (1 + min(int((means <= 0).sum()), int((means >= 0).sum()))) / (1 + len(means))
        found |= {"ci95": mean_interval(means[:, 0], found["sources"], -1, 1), "p": min(1.0, p)}
    return found


def seed_difference(differences: Sequence[float]) -> dict[str, Any]:
    """Returns the mean of the differences of S pairs of trainings, each pair with a seed of its own.

    Returns:
        `difference` (mean), its 95 % interval `ci95` and two-sided `p` (both Student's t, paired), `d_z` (Cohen's
        effect size of paired values: mean / standard deviation, n - 1), the number of `seeds` and their `differences`.
        `ci95`, `p` and `d_z` are None for one seed, and if all differences are equal.
    """
    values = np.asarray(differences, dtype=np.float64)
    found: dict[str, Any] = {"difference": float(values.mean()), "ci95": seed_interval(values.tolist()), "p": None}
    found |= {"d_z": None, "seeds": len(values), "differences": values.tolist()}
    if len(values) > 1 and (deviation := float(values.std(ddof=1))) > NO_SPREAD:
        from scipy import stats  # 1.3 s of CPU time, which one seed does not need

        found |= {"d_z": found["difference"] / deviation, "p": float(stats.ttest_1samp(values, 0).pvalue)}
    return found
