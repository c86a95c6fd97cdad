"""Recipes: how the windows of a video become one feature or one prediction, as in the published protocols."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from cpr_fast.config import READING, DataConfig
from cpr_fast.errors import InputError

RecipeName = Literal["paper", "coclr", "iic"]
Metric = Literal["cosine", "plain_cosine", "euclidean"]

# Settings of the data that do not change an evaluation's clips: speed, location, augmentation of training clips.
_IRRELEVANT = (
    *READING,
    "features",
    "window",
    "split",
    "batch_size",
    "crop_area",
    "crop_attempts",
    "grayscale",
    "short_videos",
)
_JITTER_SEED = 0


@dataclass(frozen=True)
class Recipe:
    """A test-time protocol.

    Attributes:
        name: "paper": the test split is used for the final evaluation only. "coclr": as in the released code,
            colour jitter is also applied at test time, and classifiers are selected on the test split. "iic": the
            retrieval of IIC.
        clips_per_video: Number of evenly spaced windows per video; None means all windows, which overlap by half.
        crops: 1 (centre), 5 or 10 crops of every window.
        pool: "mean" over the feature map, or IIC's "max" over 2 x 2 cells in space, whose results are concatenated.
        metric: "cosine": windows are L2-normalised, averaged, centred per set, and compared by cosine [CoCLR].
            "plain_cosine": averaged without normalisation and compared by cosine, without centring [IIC].
            "euclidean": averaged without normalisation, for the pixel baselines, whose lengths carry information.
    """

    name: RecipeName
    clips_per_video: int | None = None
    crops: int = 1
    pool: Literal["mean", "max"] = "mean"
    metric: Metric = "cosine"

    @property
    def jitter_seed(self) -> int | None:
        """The seed of `WindowLoader`'s colour jitter; None where test clips keep their colours."""
        return _JITTER_SEED if self.name == "coclr" else None

    @property
    def selects_on_test(self) -> bool:
        """Whether the best epoch of a classifier is chosen on the test split."""
        return self.name == "coclr"

    @property
    def leakage(self) -> str | None:
        """A sentence for readers of the results if the test split was used for selection, else None."""
        if not self.selects_on_test:
            return None
        return (
            "the released code's protocol: classifiers are selected on the test split, test clips are colour-jittered"
        )

    def identity(self, data: DataConfig, device: str) -> str:
        """Returns everything that a feature depends on, except weights and videos, as canonical JSON."""
        values = {"recipe": dataclasses.asdict(self), "data": clip_settings(data), "device": device.split(":")[0]}
        return json.dumps(values, sort_keys=True)


def clip_settings(data: DataConfig) -> dict[str, Any]:
    """Returns the settings that the pixels of an evaluation's clips depend on."""
    return settings_without(data, _IRRELEVANT)


def settings_without(data: DataConfig, names: Collection[str]) -> dict[str, Any]:
    """Returns the settings of clips but those of these names, and without those of sampling by time if it is off:
    features that were stored before these settings existed keep their names."""
    unset = () if data.fps else ("fps", "pictures_fps")
    return {key: value for key, value in dataclasses.asdict(data).items() if key not in names and key not in unset}


def default_recipe(data: DataConfig) -> RecipeName:
    """Returns the recipe of the networks that were trained on such clips: IIC's, or that of the paper."""
    return "iic" if data.augment == "iic" else "paper"


def recipe_for(
    data: DataConfig, name: RecipeName | None = None, clips_per_video: int | None = None, crops: int | None = 1
) -> Recipe:
    """Returns the recipe for networks that were trained on such clips: by default `default_recipe`, and, with `crops`
    of None, 1 crop with IIC's recipe and else 10."""
    name = name or default_recipe(data)
    return make_recipe(name, clips_per_video, crops or (1 if name == "iic" else 10))


def make_recipe(name: RecipeName, clips_per_video: int | None = None, crops: int = 1) -> Recipe:
    """Returns the named recipe with these windows; None means the default number of clips of the recipe."""
    if clips_per_video is not None and clips_per_video < 1:
        raise InputError(f"--clips: expected at least 1 window per video, got {clips_per_video}")
    if name == "iic":
        return Recipe("iic", clips_per_video or 10, crops, "max", "plain_cosine")
    if name not in ("paper", "coclr"):
        raise InputError(f"--recipe: expected 'paper', 'coclr' or 'iic', got {name!r}")
    return Recipe(name, clips_per_video, crops)
