"""The names by which tables and pages call networks, views and measures, and the texts of rates and intervals.

`retrieve`, `compare`, the classifiers and the report use the same ones. Rates are fractions, and are shown in percent.
"""

from __future__ import annotations

from collections.abc import Sequence

from cpr_fast.wording import counted

VIEW_NAMES = {
    "rgb": "RGB",
    "flow": "Flow",
    "residual": "Residual",
    "two_stream": "RGB + flow",
    "merged": "RGB + residual",
}
MODEL_NAMES = {
    "trained": "Trained",
    "untrained": "Untrained network",
    "stored": "Stored features",
    "single_frame": "Single frame, 16 × 16",
    "mean_colour": "Mean colour",
    "mean_flow": "Mean flow",
}
MEASURES = {"map": "mAP", "r@1": "R@1"}
MISSING = "–"


def without_copies(count: int | None) -> str:
    """Returns a sentence about exact copies that were left out of a comparison; "" if there are none."""
    if not count:
        return ""
    of = "of another video is" if count == 1 else "of other videos are"
    return f"{counted(count, 'exact copy', 'exact copies')} {of} left out, because a copy is the same video."


def with_copies(count: int | None) -> str:
    """Returns a sentence about queries that have an exact copy in the gallery; "" if there are none."""
    if not count:
        return ""
    have = "query has" if count == 1 else "queries have"
    return f"{count:,} {have} an exact copy in the gallery, found whatever the network has learnt."


def percent(rate: float | None, unit: str = " %") -> str:
    """Returns a fraction as "12.3 %"; "–" for None."""
    return MISSING if rate is None else f"{100 * rate:.1f}{unit}"


def signed(difference: float | None) -> str:
    """Returns a difference of fractions in percentage points: "+4.7", "−0.3"; "–" for None."""
    return MISSING if difference is None else f"{100 * difference:+.1f}".replace("-", "−")


def interval(bounds: Sequence[float] | None) -> str:
    """Returns an interval of fractions in percent: "35.6 – 55.6"; "–" for None."""
    return MISSING if bounds is None else " – ".join(percent(bound, "") for bound in bounds)


def signed_interval(bounds: Sequence[float] | None) -> str:
    """Returns an interval of differences in percentage points: "+1.2 to +9.9"; "–" for None."""
    return MISSING if bounds is None else " to ".join(map(signed, bounds))
