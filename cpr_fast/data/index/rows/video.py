"""A row of an index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cpr_fast.data.storage.times import native_rate, sample_count

if TYPE_CHECKING:
    from cpr_fast.config import DataConfig

COLUMNS = ("path", "label", "source", "split", "num_frames", "fps", "width", "height", "flow_path")


@dataclass(frozen=True)
class Video:
    """A row of an index, see `cpr_fast.data.index.index`; its paths can be opened from the working directory."""

    path: Path
    label: str  # class name; "" where unlabelled
    source: str  # equal for siblings
    split: str
    num_frames: int
    fps: float
    width: int  # pixels
    height: int
    flow_path: Path | None = None

    def shared_frames(self, data: DataConfig | None = None) -> int:
        """Returns the number of frames that all views have: flow has one less than RGB. Every video has flow
        if `data.flow` is not "stored". With `data.fps` the samples of these frames are counted, see
        `cpr_fast.data.storage.times`.

        Raises InputError if `data.pictures_fps` is needed and not set.
        """
        computed = data is not None and data.flow != "stored"
        frames = self.num_frames - (computed or self.flow_path is not None)
        if data is None or not data.fps:
            return frames
        return int(sample_count(frames, native_rate(self.path, self.fps, data.pictures_fps), data.fps))
