"""Frame numbers of the packets of a file: which packet carries which frame, and where decoding can start.

Letters: F frames.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from cpr_fast.data.video.bitstream import BIDIRECTIONAL, ENCODER, INTRA, PICTURE, is_intra
from cpr_fast.data.video.container import VideoError, shows_times

EMPTY_PICTURE = 19  # bytes: FFmpeg's bound of a picture that only repeats the last one


class Layout:
    """Which frame each packet of a file carries, known by the packet's time, and where decoding can start.

    A few numbers for a file of evenly spaced frames, in whatever order they are stored.
    """

    probe = False  # whether FFmpeg must look at some frames before it decodes all of them
    first_alone = False  # whether only the first packet of an MPEG-4 stream names its encoder

    def __init__(self, times: np.ndarray, numbers: np.ndarray, keys: np.ndarray) -> None:
        """Of every packet, in decoding order: its time, its frame's number (both int64 [F]), and whether decoding can
        start there (bool [F]). Frames that an edit list cuts off have numbers below 0, or above all others."""
        self.first_time, self._first_number = int(times[0]), int(numbers.min())
        starts = np.flatnonzero(keys)
        starts = starts[np.argsort(numbers[starts])]
        self._keys, self._key_times = numbers[starts], times[starts]
        order = np.argsort(times)
        self._times, self._numbers = _compact(times[order]), _compact(numbers[order])

    @classmethod
    def of(
        cls, container: av.container.InputContainer, stream: av.VideoStream, packets: list[av.Packet], num_frames: int
    ) -> Layout | None:
        """That of all packets of a file of which `num_frames` frames decode; None if they do not prove it."""
        packets = [packet for packet in packets if packet.size]
        times, shown = [packet.pts for packet in packets], np.array([not packet.is_discard for packet in packets])
        if None in times or len(set(times)) != len(times) or shown.sum() != num_frames:
            return None
        decoder = stream.codec_context
        times = np.array(times, np.int64)
        keys = np.array([packet.is_keyframe and is_intra(packet, decoder) for packet in packets])
        if shows_times(container):
            numbers = np.argsort(np.argsort(times))
            if decoder.has_b_frames and np.all(np.diff(numbers) > 0):  # of decoding, as ASF has them
                return None
            if decoder.name == "mpeg4" and not np.array_equal(numbers, _numbers_by_kind(packets, keys)):
                return None  # XviD's packed B-frames, taken over from AVI
            numbers -= numbers[shown].min()
            if numbers[shown].max() != num_frames - 1:  # cut out of the middle
                return None
        else:
            numbers = _numbers_by_kind(packets, keys) if stream.codec_context.name == "mpeg4" else None
        if numbers is None:
            return None
        layout = cls(times, numbers, keys)
        if not shows_times(container):
            layout.first_alone = any(ENCODER not in bytes(packet) for packet in packets if packet.is_keyframe)
        return layout

    def times(self, frames: Sequence[int]) -> list[int]:
        """The time of each frame; frames that the file does not have are left out."""
        count, first = len(self._times), self._first_number
        order = range(count) if isinstance(self._numbers, range) else np.argsort(self._numbers)
        return [int(self._times[order[number - first]]) for number in frames if number - first < count]

    def numbers(self, times: Sequence[int]) -> np.ndarray:
        """The frame of the packet of each time: int64."""
        return np.asarray(self._numbers)[np.searchsorted(np.asarray(self._times), times)]

    def start(self, frames: int | np.ndarray) -> np.ndarray:
        """Time of the last key packet at or before each frame, in presentation as in decoding order: int64.

        The frames of one presentation range may lie before its key frame in the file only if they are shown before
        it (leading pictures of an open GOP), so starting there loses none of the frames from it on.
        """
        before = np.searchsorted(self._keys, frames, side="right")
        return np.append(self._key_times, self.first_time)[before - 1]  # none before: the first packet of all


REMEMBERED_FILES = 2**17  # about 1 kB each
LAYOUTS: dict[tuple, Layout | None] = {}  # by file; kept once proven


def file_identity(path: str | Path, num_frames: int) -> tuple:
    """Another one as soon as the file changes."""
    try:
        facts = os.stat(path)
    except OSError as error:
        raise VideoError(path, error.strerror or str(error)) from error
    return str(path), facts.st_mtime_ns, facts.st_size, num_frames


def _compact(values: np.ndarray) -> range | np.ndarray:
    """The same numbers, as a range where they are evenly spaced and increase."""
    steps = np.unique(np.diff(values))
    if len(steps) == 1 and steps[0] > 0:
        return range(int(values[0]), int(values[-1]) + 1, int(steps[0]))
    return values.astype(np.int32) if abs(values).max() < 2**31 else values


def _numbers_by_kind(packets: list[av.Packet], keys: np.ndarray) -> np.ndarray | None:
    """The frame number of each packet of an MPEG-4 stream from an AVI file, in decoding order.

    A B-frame is shown at once, any other frame when the next such frame comes. None where that is not certain: packets
    without a picture, with an empty one, or with two (XviD's packed B-frames: what FFmpeg makes of their faulty padding
    depends on all that it decoded before).
    """
    kinds = []
    for packet in packets:
        data = bytes(packet)
        first = data.find(PICTURE)
        if len(data) <= EMPTY_PICTURE or not 0 <= first < len(data) - 4 or data.find(PICTURE, first + 4) >= 0:
            return None
        kinds.append(data[first + 4] >> 6)
    kinds = np.array(kinds)
    if not keys[0] or np.any((kinds == INTRA) != keys) or BIDIRECTIONAL in kinds[1:2]:
        return None
    numbers = np.arange(len(kinds)) - 1
    lasting = np.flatnonzero(kinds != BIDIRECTIONAL)
    numbers[lasting] = np.append(numbers[lasting[1:]], len(kinds) - 1)
    return numbers
