"""How the windows of a video become one feature or one prediction: the published protocols as settings."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from cpr_fast.config import DataConfig
from cpr_fast.errors import InputError

RecipeName = Literal["paper", "coclr", "iic"]
Metric = Literal["cosine", "plain_cosine", "euclidean"]

# Settings of the data that say how fast clips come, where from, or how training clips vary.
_IRRELEVANT = ("index", "split", "batch_size", "workers", "prefetch", "cache_gib", "crop_area")
_JITTER_SEED = 0


@dataclass(frozen=True)
class Recipe:
    """Test-time protocol.

    Attributes:
        name: "paper": nothing of the test split but its final evaluation. "coclr": as the released code does, which
            leaves colour jitter on at test time and selects classifiers on the test split. "iic": [iic]'s retrieval.
        clips_per_video: uniform windows per video; None takes all, overlapping by half.
        crops: 1 (centre) | 5 | 10 of every window.
        pool: "mean" over the feature map, or [iic]'s spatial "max" of 2 x 2 whose cells stay apart.
        metric: "cosine": windows are L2-normalised, averaged, centred per set, and compared by cosine [CoCLR].
            "plain_cosine": averaged as they are and compared by cosine, without centring [iic].
            "euclidean": averaged as they are, for the few-dimensional baselines whose length says something.
    """

    name: RecipeName
    clips_per_video: int | None = None
    crops: int = 1
    pool: Literal["mean", "max"] = "mean"
    metric: Metric = "cosine"

    @property
    def jitter_seed(self) -> int | None:
        """What `WindowLoader` takes: None where test clips keep their colours."""
        return _JITTER_SEED if self.name == "coclr" else None

    @property
    def selects_on_test(self) -> bool:
        """Whether classifiers are selected by their accuracy on the test split."""
        return self.name == "coclr"

    @property
    def leakage(self) -> str | None:
        """What a reader of the numbers must know, or None."""
        if not self.selects_on_test:
            return None
        return (
            "the released code's protocol: classifiers are selected on the test split, test clips are colour-jittered"
        )

    def identity(self, data: DataConfig, device: str) -> str:
        """Everything besides weights and videos that a feature depends on, as canonical JSON."""
        values = {"recipe": dataclasses.asdict(self), "data": clip_settings(data), "device": device.split(":")[0]}
        return json.dumps(values, sort_keys=True)


def clip_settings(data: DataConfig) -> dict[str, Any]:
    """The settings that the pixels of an evaluation's clips depend on."""
    return {key: value for key, value in dataclasses.asdict(data).items() if key not in _IRRELEVANT}


def make_recipe(name: RecipeName, clips_per_video: int | None = None, crops: int = 1) -> Recipe:
    """The named protocol with these windows; None takes the protocol's own number of clips."""
    if clips_per_video is not None and clips_per_video < 1:
        raise InputError(f"clips: expected at least 1 window per video, got {clips_per_video}")
    if name == "iic":
        return Recipe("iic", clips_per_video or 10, crops, "max", "plain_cosine")
    if name not in ("paper", "coclr"):
        raise InputError(f"recipe: expected 'paper', 'coclr' or 'iic', got {name!r}")
    return Recipe(name, clips_per_video, crops)
