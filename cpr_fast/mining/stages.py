"""The rules for the stages of a cascade, as pure functions of its settings.

Source: CPR, arXiv 2201.07989, Algorithm 1 and Fig. 1.

View 0 is the query's view, view 1 is the other one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

# n and r of the cascades that `mining.stages = "auto"` chooses from.
STAGES = (1, 3, 5, 7)
RATIOS = (0.3, 0.5, 0.8)


def stage_views(stages: int, protocol: Literal["paper", "coclr"] = "paper") -> tuple[int, ...]:
    """Returns SV(s) for s = 1..n: the other view (1) if n - s is even, else the query view (0) [paper, Fig. 1].

    The published code ("coclr") always starts and ends in the other view: for an even n the last two stages use it.
    """
    if protocol == "coclr":
        return (*(s % 2 for s in range(1, stages)), 1)
    return tuple(1 if (stages - s) % 2 == 0 else 0 for s in range(1, stages + 1))


def stage_keep(stages: int, memory_size: int, ratio: float, top_k: int) -> tuple[int, ...]:
    """Returns the number of survivors of each stage: ``max(top_k, int(K * r**s))`` for s < n, and top_k for s = n."""
    return (*(max(top_k, int(memory_size * ratio**s)) for s in range(1, stages)), top_k)


def idle_stages(keep: Sequence[int], memory_size: int) -> list[int]:
    """Returns the stages, from 1, that keep all entries that they see, so that they select nothing.

    The cascade is then that of the other stages: with K = 256, r = 1/2, n = 7 and top-5 the stages keep 128, 64, 32,
    16, 8, 5 and 5, so the last one is idle and the cascade ends in the view of stage 6, the query's own.

    Args:
        keep: the numbers of survivors that `stage_keep` returns.
    """
    return [s for s, (seen, kept) in enumerate(zip((memory_size, *keep), keep, strict=False), 1) if kept >= seen]


def most_stages(numbers: Iterable[int], memory_size: int, ratio: float, top_k: int) -> int:
    """Returns the largest of these `numbers` of stages with which every stage selects something; 1 if there is none."""
    return max(
        (n for n in numbers if not idle_stages(stage_keep(n, memory_size, ratio, top_k), memory_size)), default=1
    )
