"""The windows of the videos of an index, as clips for evaluation, and how many they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.sampling import Sources, plan_windows
from cpr_fast.data.features.index import StoredClips
from cpr_fast.data.features.windows import StoredWindows
from cpr_fast.data.index.index import Index
from cpr_fast.evaluate.features.recipe import Recipe
from cpr_fast.wording import counted

if TYPE_CHECKING:
    from cpr_fast.data.clips.loader import WindowLoader


def open_windows(
    part: Index, data: DataConfig, views: list[str], recipe: Recipe, device: str
) -> WindowLoader | StoredWindows:
    """Returns the loader of the windows that a recipe uses; for clips of a store, of their evaluation features."""
    if isinstance(part, StoredClips):
        return StoredWindows(part, views, device)
    from cpr_fast.data.clips.loader import WindowLoader  # imported here, because the other functions do not need DALI

    return WindowLoader(
        part, data, views, clips_per_video=recipe.clips_per_video, crops=recipe.crops, jitter_seed=recipe.jitter_seed,
        device=device,
    )  # fmt: skip


def count_windows(part: Index, data: DataConfig, recipe: Recipe) -> int:
    """Returns the number of windows that a recipe uses, counting each crop, or of clips of a store; no file is read."""
    if isinstance(part, StoredClips):
        return len(part)
    sources = Sources.of(part, data)
    return sum(
        len(plan_windows(sources, video, data, recipe.clips_per_video, recipe.crops)) for video in range(len(part))
    )


def work_ahead(description: str, videos: int, loader: WindowLoader | StoredWindows, *, stored: int = 0) -> str:
    """Returns a sentence about the work of one pass over a loader, to be said before it starts.

    `stored` is the number of videos whose features are stored already, and which the loader leaves out.
    """
    known = f", {stored:,} more are stored already" if stored else ""
    batches = counted(len(loader), "batch", "batches")
    return f"{description}: {counted(videos, 'video')} in {counted(loader.windows, 'window')}, {batches}{known}"
