"""Finds the frames that a video shows at evenly spaced times, for `data.fps`.

Sample i of a video at the rate r is the frame that is shown i / r seconds after the first one: the last frame whose
presentation time is at or before that time. After the end the last frame stays. The times are those of the file, so a
variable frame rate, an edit list and a start other than 0 are taken into account. Frames without times are evenly
spaced at the rate that the index lists: of AVI without certain numbering, of raw streams, and of pictures.

The clock of a file rounds the times of its frames: that of Matroska, in milliseconds, shows the third frame of 30 per
second at 0.067 s and not at 2/30 s. A frame therefore counts as shown if it is late by half a tick of the clock, and by
at most ROUNDING_S.

Letters: N frames of a video.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from cpr_fast.data.storage.media import is_pictures
from cpr_fast.data.video.decode import frame_times
from cpr_fast.data.video.numbering import REMEMBERED_FILES, compact, file_identity
from cpr_fast.errors import InputError

ROUNDING_S = Fraction(1, 2000)
# Part of the distance of two samples by which the last frame may be later than the last sample, because an index holds
# six digits of a frame rate.
SLACK = 1e-3


@dataclass(frozen=True)
class Timeline:
    """The presentation times of the frames of a video, in ticks of a clock of `clock` seconds."""

    ticks: range | np.ndarray  # int [N], in increasing order
    clock: Fraction
    rounding: Fraction  # seconds by which a time may be late

    @classmethod
    def even(cls, num_frames: int, rate: float) -> Timeline:
        """Returns the times of frames that are evenly spaced, `rate` per second."""
        return cls(range(num_frames), 1 / _exact(rate), Fraction(0))

    @classmethod
    def of(cls, ticks: np.ndarray, clock: Fraction) -> Timeline:
        """Returns the times that a file with this clock states, int64 [N]."""
        return cls(compact(ticks), clock, min(clock / 2, ROUNDING_S))

    def shown(self, samples: np.ndarray, fps: float) -> np.ndarray:
        """Returns the number of the frame of each sample (not negative) of `fps` per second, int64."""
        step, late = 1 / (_exact(fps) * self.clock), self.rounding / self.clock  # in ticks
        until = np.array([(sample * step + late).__floor__() for sample in samples.ravel().tolist()], np.int64)
        until = until.reshape(samples.shape) + self.ticks[0]
        if isinstance(self.ticks, range):
            return np.minimum((until - self.ticks.start) // self.ticks.step, len(self.ticks) - 1)
        return np.searchsorted(self.ticks, until, side="right") - 1


TIMELINES: dict[tuple, Timeline] = {}  # by file


def native_rate(path: str | Path, listed: float, pictures_fps: float) -> float:
    """Returns the frames per second of a video: those `listed` in the index, and of extracted frames and LMDB records,
    which do not state a rate, `data.pictures_fps`. Raises InputError if it is needed and not set."""
    if not is_pictures(path):
        return listed
    if not pictures_fps:
        raise InputError(
            "data.pictures_fps: expected the frames per second of the extracted frames and LMDB records, which do not "
            f"state it and are sampled by time with data.fps, got 0; the first is {str(path)!r}. An evaluation takes "
            "it from its network, or from --pictures-fps"
        )
    return pictures_fps


def sample_count(num_frames: int | np.ndarray, rate: float | np.ndarray, fps: float) -> np.ndarray:
    """Returns how many samples of `fps` per second begin at or before the last of `num_frames` frames of which `rate`
    are shown per second on average, int64; the arguments are broadcast."""
    num_frames = np.asarray(num_frames)
    count = np.floor((num_frames - 1) * fps / rate + SLACK).astype(np.int64) + 1
    return np.where(num_frames > 0, count, 0)


def shown_frames(path: Path, samples: np.ndarray, num_frames: int, rate: float, fps: float) -> np.ndarray:
    """Returns the number of the frame that a video shows at each sample of `fps` per second.

    Args:
        path: The video, whose packets are read once per process.
        samples: Numbers of samples, int64 of any shape, not negative.
        num_frames: N, frames of the video according to the index.
        rate: The result of `native_rate`, for frames without times.
    Returns:
        int64 of the shape of `samples`, in 0 .. N - 1.
    Raises:
        VideoError: the file cannot be read, or holds fewer than N frames.
    """
    if is_pictures(path):
        return Timeline.even(num_frames, rate).shown(samples, fps)
    identity = (*file_identity(path, num_frames), rate)
    timeline = TIMELINES.get(identity)
    if timeline is None:
        ticks, clock = frame_times(path, num_frames)
        timeline = Timeline.even(num_frames, rate) if ticks is None else Timeline.of(ticks, clock)
        if len(TIMELINES) < REMEMBERED_FILES:
            TIMELINES[identity] = timeline
    return timeline.shown(samples, fps)


def _exact(rate: float) -> Fraction:
    """Returns a rate as it is written in decimals: 29.97 is 2997/100."""
    return Fraction(repr(float(rate)))
