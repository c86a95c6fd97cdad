"""Frame-exact decoding of chosen frames, and the packets that carry them.

A frame's number is its place in presentation order when the file is decoded from its start, which is the only
definition that every container shares: header counts lie, and AVI carries no presentation times. Where the packets
prove the numbering (as many distinct times as frames that decode; of MPEG-4 in AVI as many pictures, whose kinds say in
which order they are shown) decoding starts at the previous key frame and passes over unwanted frames to which no other
refers; elsewhere every frame from 0 on is decoded. The proof reads a whole file; it is remembered, so that later reads
of the file take no more of it than they need.

Letters: F frames, H x W pixels, L bytes.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

import av
import numpy as np
from av.video.reformatter import VideoReformatter

PICTURE = b"\x00\x00\x01\xb6"  # starts one in an MPEG-4 stream; the next two bits say which kind
ENCODER = b"\x00\x00\x01\xb2"  # starts the name of its encoder, by whose habits FFmpeg decodes
INTRA, BIDIRECTIONAL = 0, 2  # kinds of MPEG-4 pictures
UNIT = b"\x00\x00\x01"  # starts a unit of H.264 or HEVC outside MP4
INTRA_SLICES = (2, 4, 7, 9)  # I and SI
EMPTY_PICTURE = 19  # bytes: FFmpeg's bound of a picture that only repeats the last one
UNPROBED = {"codec_whitelist": "none", "probesize": "32"}  # the opening of a container decodes nothing
PASSES_OVER = ("h264", "mpeg4")  # decoders that leave out exactly the frames to which no other refers
PART = 8  # frames that are converted at once: few enough to stay in a cache
PART_PIXELS = 2**25  # of larger ones fewer: FFmpeg bounds the size of a picture
PLANAR = ("yuv420p", "yuvj420p")  # formats of which any box of whole chroma samples converts as in the whole frame


class VideoError(RuntimeError):
    """A video cannot be read: `path` says which, `reason` why."""

    def __init__(self, path: str | Path, reason: str) -> None:
        super().__init__(f"video {str(path)!r}: {reason}")
        self.path, self.reason = Path(path), reason


@dataclass(frozen=True)
class VideoInfo:
    """What a video really holds: `num_frames` frames decode, then comes its end or `error` ("" at a clean end)."""

    num_frames: int
    fps: float
    width: int  # as stored, before any rotation
    height: int
    codec: str
    error: str = ""
    rotation: int = 0  # degrees by which a player turns the stored picture counter-clockwise
    variable_rate: bool = False


def probe_video(path: str | Path, *, decode: bool = True) -> VideoInfo:
    """Decodes the whole video and says what came out, or, without `decode`, its first frame and counts packets.

    Raises VideoError if no frame decodes.
    """
    times: list[int | None] = []  # of every frame, or packet, in the file's clock
    first, error = None, ""
    try:
        with _open(path) as (container, stream):
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            codec, clocked = stream.codec_context.codec.canonical_name, _shows_times(container)
            for packet in container.demux(stream):
                frames = stream.codec_context.decode(packet) if decode or first is None else []
                first = first or next(iter(frames), None)
                if decode:
                    times += [frame.pts for frame in frames]
                elif _holds_frame(packet):
                    times.append(packet.pts)
    except VideoError as failure:
        if first is None:
            raise
        error = failure.reason
    if first is None:
        raise VideoError(path, "no frame decodes")
    variable = clocked and _irregular(times)
    return VideoInfo(len(times), rate, first.width, first.height, codec, error, first.rotation % 360, variable)


def _irregular(times: Sequence[int | None]) -> bool:
    """Whether frames shown at these times (any order and unit) have a variable rate; times may be unknown.

    A step is irregular if it differs from the median by more than a quarter (and by more than rounding to a coarse
    clock explains); one in a hundred is forgiven.
    """
    known = np.sort(np.array([time for time in times if time is not None], np.int64))
    if len(known) < 3 or len(known) < len(times):
        return False
    steps = np.diff(known)
    middle = np.median(steps)
    odd = np.abs(steps - middle) > middle / 4 + (middle > 2)
    return bool(odd.sum() > max(1, 0.01 * len(steps)))


@dataclass(frozen=True)
class Region:
    """A box of frames whose size is known."""

    box: tuple[int, int, int, int]  # top, left, bottom, right, ends exclusive, pixels
    height: int  # of the frames
    width: int

    @classmethod
    def whole(cls, height: int, width: int) -> Region:
        return cls((0, 0, height, width), height, width)

    def check(self, path: str | Path, height: int, width: int, view: str) -> None:
        """Raises VideoError for frames of another size. Flow files pad an odd width by one column, for 4:2:0."""
        padded = view == "flow" and self.width % 2 == 1 and width == self.width + 1
        if height != self.height or (width != self.width and not padded):
            raise VideoError(path, f"decodes to {width}x{height}, the index says {self.width}x{self.height}")

    def of(self, path: str | Path, frames: np.ndarray, view: str) -> np.ndarray:
        """The box of whole frames [F, H, W, ...], without a copy. Raises VideoError if they have another size."""
        self.check(path, *frames.shape[1:3], view)
        top, left, bottom, right = self.box
        return frames[:, top:bottom, left:right]


def read_frames(path: str | Path, frames: Sequence[int] | np.ndarray, view: str, num_frames: int) -> np.ndarray:
    """The frames of the given numbers, in one pass over the file.

    `frames` is strictly increasing; `num_frames` is what `probe_video` counted. Returns uint8 [F, H, W, 3] (RGB), or
    for view "flow" [F, H, W, 2] (u, v): the luma plane as stored, cut into its upper and lower half; for "gray"
    [F, H, W]. Raises VideoError for a video that does not give every one of them.
    """
    return joined(read_parts(path, frames, view, num_frames), len(frames))


def joined(parts: Iterable[np.ndarray], count: int) -> np.ndarray:
    """The parts, of `count` frames in all, as one array."""
    out, done = None, 0
    for part in parts:
        if out is None:
            out = np.empty((count, *part.shape[1:]), np.uint8)
        out[done : done + len(part)] = part
        done += len(part)
    return out


def read_parts(
    path: str | Path, frames: Sequence[int] | np.ndarray, view: str, num_frames: int, region: Region | None = None
) -> Iterator[np.ndarray]:
    """As `read_frames`, a few frames after the other, and of each only the region: no more of it is converted."""
    frames, done = [int(number) for number in frames], 0
    identity = _identity(path, num_frames)
    known, packets = _LAYOUTS.get(identity), None
    if known is not None:
        # a file that cannot seek, say: then as if nothing were remembered
        with suppress(VideoError), _open(path, probe=known.probe) as (container, stream):
            for part in _parts(path, frames, view, num_frames, region, _decode(container, stream, known, frames)):
                yield part
                done += len(part)
            return
    with _open(path) as (container, stream):
        if known is not None or identity not in _LAYOUTS:
            packets, failed = list(container.demux(stream)), known is not None
            known = Layout.of(container, stream, packets, num_frames)
            if known is not None:
                known.probe = failed
            if len(_LAYOUTS) < REMEMBERED_FILES:
                _LAYOUTS[identity] = known
        frames = frames[done:]
        yield from _parts(path, frames, view, num_frames, region, _decode(container, stream, known, frames, packets))


def _parts(
    path: str | Path,
    frames: list[int],
    view: str,
    num_frames: int,
    region: Region | None,
    decoded: Iterator[tuple[int, av.VideoFrame]],
) -> Iterator[np.ndarray]:
    """What `read_parts` yields, from the (number, frame) of all `frames`."""
    pixels: _Pixels | None = None
    kind = colours = None
    held = most = 0
    for wanted in frames:
        number, frame = next(decoded, (None, None))
        if number != wanted:
            raise VideoError(path, f"frame {wanted} of {num_frames} does not decode")
        now = (frame.width, frame.height, frame.format.name)
        if kind is None:
            _refuse_rotation(path, frame)
            kind, most = now, max(1, min(PART, len(frames), PART_PIXELS // (frame.width * frame.height)))
        if now != kind:
            before, after = ("{}x{} {}".format(*each) for each in (kind, now))
            raise VideoError(path, f"the frame size or format changes from {before} to {after}")
        if pixels is None or colours != _colours(frame):
            if held:
                yield pixels.take()
            held, colours, pixels = 0, _colours(frame), _pixels(path, frame, view, region, most)
        pixels.add(frame)
        held += 1
        if held == most:
            yield pixels.take()
            held = 0
    if held:
        yield pixels.take()


def _colours(frame: av.VideoFrame) -> tuple:
    """What a conversion to RGB depends on beside the format."""
    return frame.colorspace, frame.color_range, frame.interlaced_frame


def slice_packets(
    path: str | Path, frames: Sequence[int] | np.ndarray, num_frames: int
) -> tuple[np.ndarray, np.ndarray]:
    """The shortest part of a video from which a decoder gets `frames` (strictly increasing) without seeking.

    Returns the encoded bytes, uint8 [L], and the number that each of `frames` has in them, int32 [F]. Of every group of
    pictures that holds a wanted frame (if they are closed; else from the first such group on), the packets up to the
    last needed one come as Matroska, never as mp4, in which VP9 and MJPEG decode to wrong frames without an error. A
    video whose timestamps do not prove the numbering comes whole.
    """
    frames = np.asarray(frames)
    if not 0 <= frames[0] <= frames[-1] < num_frames:
        raise VideoError(path, f"frames {frames[0]}..{frames[-1]} asked of {num_frames}")
    with _open(path) as (container, stream):
        layout = None
        if _shows_times(container):
            packets = list(container.demux(stream))
            layout = Layout.of(container, stream, packets, num_frames)
        if layout is None:
            return np.fromfile(path, np.uint8), frames.astype(np.int32)
        table = PacketTable([packet for packet in packets if packet.size], layout)
        chosen = table.needed(frames)
        ranks = table.ranks[chosen]
        order = np.sort(ranks)
        packets = [table.packets[i] for i in chosen]
        places = np.searchsorted(order, frames).astype(np.int32)
        return _matroska(stream, packets, np.searchsorted(order, ranks)), places


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
        keys = np.array([packet.is_keyframe and _is_intra(packet, decoder) for packet in packets])
        if _shows_times(container):
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
        if not _shows_times(container):
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
_LAYOUTS: dict[tuple, Layout | None] = {}  # by file; kept once proven


def _identity(path: str | Path, num_frames: int) -> tuple:
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


def _shows_times(container: av.container.InputContainer) -> bool:
    """Whether packets carry times of presentation; those of AVI, called so, are times of decoding."""
    return container.format.name != "avi"


def _holds_frame(packet: av.Packet) -> bool:
    return bool(packet.size) and not packet.is_discard


def _decode(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    layout: Layout | None,
    wanted: list[int],
    packets: list[av.Packet] | None = None,
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(number, frame) of the `wanted` frames (increasing) that decode, in presentation order.

    `packets` are all of the file, if they have been read already.
    """
    decoder = stream.codec_context

    def demux() -> Iterable[av.Packet]:
        return container.demux(stream) if packets is None else packets

    if layout is None:
        chosen = set(wanted)
        frames = enumerate(frame for packet in demux() for frame in decoder.decode(packet))
        yield from ((number, frame) for number, frame in frames if number in chosen)
        return
    start = int(layout.start(wanted[0]))
    if start != layout.first_time:
        if layout.first_alone:
            decoder.decode(next(filter(_holds_frame, demux()), None))
        if packets is None:
            container.seek(start, stream=stream)
    # a frame that an edit list cuts off is still one that others refer to; the decoder does not give it out
    needed = itertools.dropwhile(lambda packet: packet.pts != start, (packet for packet in demux() if packet.size))
    number_at = dict(zip(layout.times(wanted), wanted, strict=False))
    for packet in itertools.chain(_up_to_the_last(needed, decoder, number_at), [None]):
        for frame in decoder.decode(packet):
            number = number_at.get(frame.pts)
            if number is not None:
                yield number, frame


def _up_to_the_last(
    packets: Iterable[av.Packet], decoder: av.VideoCodecContext, wanted: Collection[int]
) -> Iterator[av.Packet]:
    """The packets as far as the one that completes the `wanted` times: those after it would only make the decoder give
    up what it holds back. Before each the decoder is told whether it is among them."""
    passes, passing, left = decoder.name in PASSES_OVER, False, len(wanted)
    for packet in packets:
        passed = packet.pts not in wanted
        if passes and passed != passing:
            decoder.skip_frame, passing = ("NONREF" if passed else "DEFAULT"), passed
        yield packet
        left -= not passed
        if not left:
            return


def _is_intra(packet: av.Packet, decoder: av.VideoCodecContext) -> bool:
    """Whether a key packet is one: containers and FFmpeg call so what is none, such as the recovery points of H.264's
    periodic intra refresh, or every packet of an MP4 without a table of them."""
    if decoder.name == "mpeg4":
        data = bytes(packet)
        first = data.find(PICTURE)
        return 0 <= first < len(data) - 4 and data[first + 4] >> 6 == INTRA
    if decoder.name not in ("h264", "hevc"):
        return True
    for unit in _units(bytes(packet), decoder.name, decoder.extradata or b""):
        if decoder.name == "hevc":
            kind = unit[0] >> 1 & 63
            if kind < 32:
                return 16 <= kind <= 23
        elif unit[0] & 31 in (1, 5) and _slice_kind(unit) not in INTRA_SLICES:
            return False
    return True


def _units(data: bytes, codec: str, extradata: bytes) -> Iterator[bytes]:
    """The first bytes of every NAL unit of a packet of H.264 or HEVC."""
    if extradata[:1] == b"\x01":  # MP4's form: each after its length
        size, place = 1 + (extradata[4 if codec == "h264" else 21] & 3), 0
        while place + size < len(data):
            start = place + size
            place = start + int.from_bytes(data[place:start], "big")
            if place > start:
                yield data[start : min(place, start + 16)]
        return
    place = data.find(UNIT)
    while 0 <= place < len(data) - 3:
        yield data[place + 3 : place + 19]
        place = data.find(UNIT, place + 3)


def _slice_kind(unit: bytes) -> int:
    """slice_type of H.264: the second number of a slice's header."""
    bits = int.from_bytes(unit[1:].replace(b"\0\0\3", b"\0\0").ljust(16, b"\0")[:16], "big")
    place, value = 128, 0
    for _ in range(2):
        zeros = place - (bits & ((1 << place) - 1)).bit_length()
        place -= 2 * zeros + 1
        if place < 0:
            return -1
        value = (bits >> place & ((2 << zeros) - 1)) - 1
    return value


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


class PacketTable:
    """A video's packets in decoding order, and the frame number of each."""

    def __init__(self, packets: list[av.Packet], layout: Layout) -> None:
        self.packets, self._layout = packets, layout
        self.ranks = layout.numbers([packet.pts for packet in packets])

    def needed(self, frames: np.ndarray) -> np.ndarray:
        """Indices of the packets that `frames` (increasing) need, increasing; each run starts at a key packet."""
        place = {packet.pts: i for i, packet in enumerate(self.packets)}
        begins = np.array([place[time] for time in self._layout.start(frames).tolist()])
        if not self._closed():  # an open group of pictures shows errors after a gap: from the first key to the end
            begins = np.full_like(begins, begins[0])
        keep = np.zeros(len(self.packets), bool)
        for begin in np.unique(begins):
            last = frames[begins == begin][-1]
            end = 1 + int(np.flatnonzero(self.ranks <= last)[-1])
            keep[begin:end] |= self.ranks[begin:end] >= self.ranks[begin]
        return np.flatnonzero(keep)

    def _closed(self) -> bool:
        """Whether no packet that follows a key packet is shown before it."""
        earliest_after = np.minimum.accumulate(self.ranks[::-1])[::-1]  # of the packet itself and all later ones
        return all(earliest_after[i] == self.ranks[i] for i, packet in enumerate(self.packets) if packet.is_keyframe)


class _Pixels(Protocol):
    """Decoded frames as pixels: those added since the last `take`, at most as many as were announced."""

    def add(self, frame: av.VideoFrame) -> None: ...

    def take(self) -> np.ndarray:
        """uint8 [F, H, W, ...], the caller's own."""


def _pixels(path: str | Path, frame: av.VideoFrame, view: str, region: Region | None, count: int) -> _Pixels:
    """For frames like the given one, `count` at once."""
    height, width = frame.height // 2 if view == "flow" else frame.height, frame.width
    if region is not None:
        region.check(path, height, width, view)
    box = (0, 0, height, width) if region is None else region.box
    if view == "flow" and (
        frame.format.components[0].bits != 8 or not frame.format.name.startswith(("yuv", "gray", "nv"))
    ):
        raise VideoError(path, f"flow is stored in 8-bit luma, this is {frame.format.name}")
    if view == "rgb" and frame.format.name in PLANAR and height % 2 == width % 2 == 0 and not frame.interlaced_frame:
        return _Stacked(frame, box, count)
    return _OneByOne(view, box)


class _Stacked:
    """RGB of boxes of 4:2:0 frames: they are stacked as they come and converted as one tall picture."""

    def __init__(self, frame: av.VideoFrame, box: tuple[int, int, int, int], count: int) -> None:
        top, left, bottom, right = box
        # whole chroma samples, and whole vectors of the converter from the left
        outer = top - top % 2, left - left % 16, bottom + bottom % 2, right + right % 2
        self._height, width = outer[2] - outer[0], outer[3] - outer[1]
        self._inner = slice(top - outer[0], bottom - outer[0]), slice(left - outer[1], right - outer[1])
        self._tall = av.VideoFrame(width, count * self._height, frame.format.name)
        self._tall.colorspace, self._tall.color_range = frame.colorspace, frame.color_range
        self._targets = [rows.reshape(count, -1, rows.shape[1]) for rows in map(_rows, self._tall.planes)]
        planes = (tuple(edge // scale for edge in outer) for scale in (1, 2, 2))
        self._boxes = [((bottom - top, right - left), top, left) for top, left, bottom, right in planes]
        self._scaler, self._held = VideoReformatter(), 0

    def add(self, frame: av.VideoFrame) -> None:
        for plane, target, (shape, top, left) in zip(frame.planes, self._targets, self._boxes, strict=True):
            row = plane.line_size
            target[self._held] = np.ndarray(shape, np.uint8, plane, top * row + left, (row, 1))
        self._held += 1

    def take(self) -> np.ndarray:
        rows = _rows(self._scaler.reformat(self._tall, format="rgb24", threads=1).planes[0], channels=3)
        frames = rows.reshape(-1, self._height, self._tall.width, 3)
        held, self._held = self._held, 0
        return frames[:held, *self._inner]


class _OneByOne:
    """Any view of frames of any format, each converted whole."""

    def __init__(self, view: str, box: tuple[int, int, int, int]) -> None:
        top, left, bottom, right = box
        self._view, self._box, self._frames = view, (slice(top, bottom), slice(left, right)), []
        self._scaler = VideoReformatter()  # a new one per frame costs three times the conversion itself

    def add(self, frame: av.VideoFrame) -> None:
        if self._view == "flow":
            rows, half = _rows(frame.planes[0]), frame.height // 2
            pixels = np.stack([rows[:half], rows[half : 2 * half]], axis=-1)
        else:
            name, channels = ("rgb24", 3) if self._view == "rgb" else ("gray", 1)
            pixels = _rows(self._scaler.reformat(frame, format=name, threads=1).planes[0], channels)
            if channels == 3:
                pixels = pixels.reshape(frame.height, frame.width, 3)
        self._frames.append(pixels[self._box])

    def take(self) -> np.ndarray:
        frames, self._frames = np.stack(self._frames), []
        return frames


def _rows(plane: av.video.plane.VideoPlane, channels: int = 1) -> np.ndarray:
    """A plane's bytes, uint8 [H, W * channels]; not a copy."""
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, : plane.width * channels]


@contextmanager
def _open(path: str | Path, *, probe: bool = True) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The file and its first video stream; every failure of FFmpeg inside the block becomes a VideoError.

    Without `probe` no frame is decoded to learn what the container does not say, such as the rate; that takes ten times
    as long as the rest, and frames come out the same but from streams that do not say how they are reordered.
    """
    try:
        options = {} if probe else UNPROBED
        with av.open(str(path), container_options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise VideoError(path, "holds no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise VideoError(path, "is of a codec that has no decoder here")
            stream.codec_context.thread_count = 1  # videos are decoded in parallel, not the frames of one
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise VideoError(path, error.strerror or str(error) or type(error).__name__) from error


def _refuse_rotation(path: str | Path, frame: av.VideoFrame) -> None:
    """Hardware decoders ignore the display matrix: the same file must not give two pictures."""
    if frame.rotation % 360:
        raise VideoError(path, f"is stored rotated by {frame.rotation} degrees; transcode it upright")


def _matroska(stream: av.VideoStream, packets: list[av.Packet], ranks: np.ndarray) -> np.ndarray:
    """The packets (decoding order, frame numbers `ranks` from 0) as a Matroska file in memory, uint8 [L]."""
    buffer = io.BytesIO()
    delay = int(np.max(np.arange(len(packets)) - ranks))  # decoding times must not lie after presentation times
    with av.open(buffer, "w", format="matroska") as output:
        copy = output.add_stream_from_template(stream, opaque=True)  # AV1 has a decoder alone
        copy.time_base = Fraction(1, 25)  # one tick per frame, whatever the source's clock was
        for position, (packet, rank) in enumerate(zip(packets, ranks, strict=True)):
            packet.stream = copy
            packet.time_base = copy.time_base
            packet.pts, packet.dts = int(rank), position - delay
            output.mux(packet)
    return np.frombuffer(buffer.getbuffer(), np.uint8)
