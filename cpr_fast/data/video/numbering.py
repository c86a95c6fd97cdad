"""Determines which packet of a file carries which frame, and where decoding can start.

Letters: F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from cpr_fast.data.files.access import storage_of
from cpr_fast.data.video.bitstream import BIDIRECTIONAL, ENCODER, INTRA, PICTURE, is_intra
from cpr_fast.data.video.container import VideoError, holds_frame, open_video, shows_times

EMPTY_PICTURE = 19  # bytes: FFmpeg treats a picture of at most this size as a repetition of the previous one


class Layout:
    """The frame that each packet of a file carries, found by the packet's time, and where decoding can start.

    Evenly spaced frames need only a few bytes of memory, in whatever order they are stored.
    """

    probe = False  # whether FFmpeg must look at some frames before it decodes all of them
    format: str | None = None  # of the container, as `format_name` returns it: the file then opens without a search
    first_alone = False  # whether only the first packet of an MPEG-4 stream names its encoder, which FFmpeg must know

    def __init__(self, times: np.ndarray, numbers: np.ndarray, keys: np.ndarray, clock: Fraction) -> None:
        """Takes, for every packet in decoding order, its time, the number of its frame (both int64 [F]), and whether
        decoding can start there (bool [F]). Frames that an edit list cuts off have numbers below 0 or above all others.
        `clock` is the unit of the times, in seconds.
        """
        self.clock = clock
        self.first_time, self._first_number = int(times[0]), int(numbers.min())
        starts = np.flatnonzero(keys)
        starts = starts[np.argsort(numbers[starts])]
        self._keys, self._key_times = numbers[starts], times[starts]
        order = np.argsort(times)
        self._times, self._numbers = compact(times[order]), compact(numbers[order])

    @property
    def only_keys(self) -> bool:
        """Whether decoding can start at every frame, so that no frame refers to another."""
        return len(self._keys) == len(self._numbers)

    @classmethod
    def of(
        cls, container: av.container.InputContainer, stream: av.VideoStream, packets: list[av.Packet], num_frames: int
    ) -> Layout | None:
        """Returns the layout of all packets of a file with `num_frames` frames; None if they do not prove it."""
        packets = [packet for packet in packets if packet.size]
        times, shown = [packet.pts for packet in packets], np.array([not packet.is_discard for packet in packets])
        if None in times or len(set(times)) != len(times) or shown.sum() != num_frames:
            return None
        decoder = stream.codec_context
        times = np.array(times, np.int64)
        keys = np.array([packet.is_keyframe and is_intra(packet, decoder) for packet in packets])
        if shows_times(container):
            numbers = np.argsort(np.argsort(times))
            if decoder.has_b_frames and np.all(
                np.diff(numbers) > 0
            ):  # these are decoding times, the only ones that ASF has
                return None
            if decoder.name == "mpeg4" and not np.array_equal(numbers, _numbers_by_kind(packets, keys)):
                return None  # XviD's packed B-frames, copied from AVI
            numbers -= numbers[shown].min()
            if numbers[shown].max() != num_frames - 1:  # frames in the middle are cut out
                return None
        else:
            numbers = _numbers_by_kind(packets, keys) if stream.codec_context.name == "mpeg4" else None
        if numbers is None:
            return None
        layout = cls(times, numbers, keys, Fraction(stream.time_base))
        if not shows_times(container):
            layout.first_alone = any(ENCODER not in bytes(packet) for packet in packets if packet.is_keyframe)
        return layout

    def times(self, frames: Sequence[int]) -> list[int]:
        """Returns the time of each frame; frames that the file does not have are left out."""
        count, first = len(self._times), self._first_number
        order = range(count) if isinstance(self._numbers, range) else np.argsort(self._numbers)
        return [int(self._times[order[number - first]]) for number in frames if number - first < count]

    def numbers(self, times: Sequence[int]) -> np.ndarray:
        """Returns the number of the frame of each time, int64."""
        return np.asarray(self._numbers)[np.searchsorted(np.asarray(self._times), times)]

    def start(self, frames: int | np.ndarray) -> np.ndarray:
        """Returns the time, int64, of the last key packet at or before each frame in presentation order.

        A packet that follows a key packet in the file may be shown before it (leading pictures of an open GOP), but
        none that is stored before the key packet is shown after it. So decoding from there loses no wanted frame.
        """
        before = np.searchsorted(self._keys, frames, side="right")
        return np.append(self._key_times, self.first_time)[before - 1]  # if there is none, the first packet of the file


REMEMBERED_FILES = 2**17  # number of files whose layout is kept in memory, about 1 kB each
# By file: the layout; None if the packets do not prove the numbering; of a file with fewer frames than its row in the
# index says, their number.
LAYOUTS: dict[tuple, Layout | int | None] = {}


def fewer_frames(path: str | Path, packets: Sequence[av.Packet], num_frames: int) -> int | None:
    """Returns the number of frames of a file, given all its packets, if it is less than `num_frames`, else None.

    Only a file with fewer packets than frames is decoded to count them, because a packet may hold two frames. A file
    whose decoding fails is damaged, and its frames up to the damage may be used: the result is None.
    """
    if sum(map(holds_frame, packets)) >= num_frames:
        return None
    with suppress(VideoError), open_video(path) as (container, stream):
        held = sum(1 for _ in container.decode(stream))
        return held if held < num_frames else None
    return None


def file_identity(path: str | Path, num_frames: int) -> tuple:
    """Returns a key of the file that changes when the file does. Raises VideoError if the file does not exist."""
    try:
        version = storage_of(path).version(Path(path))
    except OSError as error:
        raise VideoError(path, error.strerror or str(error), unreadable=True) from error
    return str(path), version, num_frames


def compact(values: np.ndarray) -> range | np.ndarray:
    """Returns the same numbers, as a range if they increase evenly, else in as few bytes as possible."""
    steps = np.unique(np.diff(values))
    if len(steps) == 1 and steps[0] > 0:
        return range(int(values[0]), int(values[-1]) + 1, int(steps[0]))
    return values.astype(np.int32) if abs(values).max() < 2**31 else values


def _numbers_by_kind(packets: list[av.Packet], keys: np.ndarray) -> np.ndarray | None:
    """Returns the frame number of each packet of an MPEG-4 stream from an AVI file, in decoding order.

    A B-frame is shown at once, any other frame when the next one that is no B-frame arrives. Returns None if that is
    not certain: if a packet has no picture, an empty one, or two. Packets with two pictures are XviD's packed B-frames;
    how FFmpeg decodes their faulty padding depends on all frames that it decoded before.
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
