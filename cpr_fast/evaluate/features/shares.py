"""Distribution of the videos of an evaluation over the processes of a run.

Letters: M videos, m videos of one process, R processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from cpr_fast.runtime import distributed

Name = TypeVar("Name")
Rows = tuple[dict[Name, Tensor], Tensor]


def shared_out(videos: int, measure: Callable[[range], Rows]) -> Rows:
    """Returns the results of `measure` for M videos in every process; process r measures the videos r, r + R, ...

    Args:
        videos: M.
        measure: Called with the positions of a process's videos, if it has any; returns rows {name: [m, ...]} and
            numbers of windows [m] int64, on the CPU. A name may be missing if no window could be read.
    Returns:
        {name: [M, ...]}, zero where a process had no rows of that name, and windows [M] int64.
    """
    mine = distributed.share(range(videos))
    shares: list[Rows] = distributed.gather_objects(measure(mine) if mine else ({}, torch.zeros(0, dtype=torch.int64)))
    if len(shares) == 1:
        return shares[0]
    rows: dict[Name, Tensor] = {}
    windows = torch.zeros(videos, dtype=torch.int64)
    for rank, (found, counts) in enumerate(shares):
        windows[rank :: len(shares)] = counts
        for name, values in found.items():
            if name not in rows:
                rows[name] = values.new_zeros(videos, *values.shape[1:])
            rows[name][rank :: len(shares)] = values
    return rows, windows
