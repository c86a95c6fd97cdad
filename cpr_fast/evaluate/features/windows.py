"""The windows of the videos of an index, as clips for evaluation."""

from __future__ import annotations

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.loader import WindowLoader
from cpr_fast.data.index.index import Index
from cpr_fast.evaluate.features.recipe import Recipe


def open_windows(part: Index, data: DataConfig, views: list[str], recipe: Recipe, device: str) -> WindowLoader:
    """Returns the loader of the windows that a recipe uses."""
    return WindowLoader(
        part, data, views, clips_per_video=recipe.clips_per_video, crops=recipe.crops, jitter_seed=recipe.jitter_seed,
        device=device,
    )  # fmt: skip
