"""A process that knows nothing of any file, as one that has just started."""

from __future__ import annotations

from cpr_fast.data.files.cached.recent import RecentRanges
from cpr_fast.data.files.remote import REMOTE
from cpr_fast.data.video.numbering import LAYOUTS
from cpr_fast.data.video.reads.extents import EXTENTS


def as_a_new_process() -> None:
    """Forgets what the process knows of files."""
    for known in (REMOTE._facts, EXTENTS, LAYOUTS):
        known.clear()
    REMOTE._recent = RecentRanges()
