"""The training videos that an explanation counts steps for: those of the index, or the size of a known data set."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from cpr_fast.config import Config, DataConfig
from cpr_fast.data.features.index import StoredClips
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError
from cpr_fast.experiments.explain.section import Section
from cpr_fast.wording import counted

# Name, number of training videos and frames per second of the data sets that are assumed where an index does not exist,
# by a part of its path. UCF101 and HMDB51: split 1. Kinetics-400: the recipe's copies at 5 frames per second.
KNOWN = {"k400": ("Kinetics-400", 240_000, 5.0), "hmdb51": ("HMDB51", 3570, 30.0), "": ("UCF101", 9537, 25.0)}


@dataclass(frozen=True)
class TrainingVideos:
    """How many training videos there are, and where the number is from.

    Attributes:
        number: The number of training videos.
        assumed: The data set that is assumed because the index does not exist, or None.
        index: The training videos, or None if the index does not exist.
        fps: Frames per second: the median of the index.
    """

    number: int
    assumed: str | None
    index: Index | None
    fps: float

    @classmethod
    def of(cls, config: Config) -> TrainingVideos:
        """Reads the index of a config, if it exists, or its store of features.

        Raises InputError if it cannot be read, or has no video of the split.
        """
        if config.data.features:
            clips = StoredClips.open(config.data.features, "data.features")
            return cls(len(part := clips.select_for_training(config.data.split)), None, part, 0.0)
        if not config.data.index or not Path(config.data.index).is_file():
            name, number, fps = next(value for part, value in KNOWN.items() if part in config.data.index.lower())
            return cls(number, name, None, fps)
        try:
            index = Index.load(config.data.index, require_flow=False).select_for_training(config.data.split)
        except InputError as error:
            raise InputError(f"data.index: {error}") from None
        index = index.long_enough(config.data)
        return cls(len(index), None, index, statistics.median(video.fps for video in index))

    def section(self, config: Config) -> Section:
        """Explains which videos are read."""
        data = config.data
        if self.index is None:
            named = f"{data.index!r} does not exist here" if data.index else "none is named (--data.index INDEX.csv)"
            found = f"{named}; the steps below assume {self.assumed}'s {counted(self.number, 'training video')}"
        else:
            sources, classes = self.index.source_count, self.index.class_count
            found = (
                f"{data.features or data.index}: {counted(self.number, 'training video')} of "
                f"{counted(sources, 'source')}, " + (counted(classes, "class", "classes") if classes else "no labels")
            )
        views = list(dict.fromkeys(v for c in config.schedule.cycles for v in c.views(shared=config.model.shared)))
        if isinstance(self.index, StoredClips):
            rows = [("features", found), ("split", data.split or "all clips"), ("views", " and ".join(views))]
            rows.append(("samples", f"{self.index.store.about.samples} of each clip, of which two are query and key"))
        else:
            rows = [("index", found), ("split", data.split or "all videos"),
                    ("views", _views(config, views, self.index)), ("short videos", _short(data))]  # fmt: skip
        return Section(
            "Data",
            rows,
            {
                "index": data.features or data.index,
                "videos": self.number,
                "assumed": self.assumed,
                "split": data.split,
                "views": views,
                "short_videos": data.short_videos,
            },
        )


def _views(config: Config, views: list[str], index: Index | None) -> str:
    text = " and ".join({"rgb": "RGB", "flow": "optical flow", "residual": "frame residuals"}[view] for view in views)
    if "flow" not in views:
        return text
    if config.data.flow == "on_the_fly":
        return f"{text}; flow is computed from the frames of each clip (TV-L1)"
    if config.data.flow == "vectors":
        return f"{text}; flow is read from the motion vectors of the videos"
    missing = sum(video.flow_path is None for video in index or ())
    return f"{text}; flow is read from files (TV-L1, `cpr-fast flow`)" + (f"; {missing} have none" if missing else "")


def _short(data: DataConfig) -> str:
    padded = "shorter than a clip are padded with frame 0 on the left"
    if data.short_videos == "keep":
        return f"those {padded}"
    most = counted(data.frames // 2 * data.stride + 1, "frame" if not data.fps else "sample")
    return f"those of {most} or fewer are dropped; others {padded}"
