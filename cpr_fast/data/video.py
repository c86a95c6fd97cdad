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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter

PICTURE = b"\x00\x00\x01\xb6"  # starts one in an MPEG-4 stream; the next two bits say which kind
INTRA, BIDIRECTIONAL = 0, 2  # kinds of MPEG-4 pictures
EMPTY_PICTURE = 19  # bytes: FFmpeg's bound of a picture that only repeats the last one
PASSES_OVER = ("h264", "mpeg4")  # decoders that leave out exactly the frames to which no other refers


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


def read_frames(path: str | Path, frames: Sequence[int] | np.ndarray, view: str, num_frames: int) -> np.ndarray:
    """The frames of the given numbers, in one pass over the file.

    `frames` is strictly increasing; `num_frames` is what `probe_video` counted. Returns uint8 [F, H, W, 3] (RGB), or
    for view "flow" [F, H, W, 2] (u, v): the luma plane as stored, cut into its upper and lower half; for "gray"
    [F, H, W]. Raises VideoError for a video that does not give every one of them.
    """
    identity = _identity(path, num_frames)
    known, packets = _LAYOUTS.get(identity), None
    if known is not None:
        # a file that cannot seek, say: then as if nothing were remembered
        with suppress(VideoError), _open(path) as (container, stream):
            return _gather(path, frames, view, num_frames, _decode(container, stream, known, frames))
    with _open(path) as (container, stream):
        if known is not None or identity not in _LAYOUTS:
            packets = list(container.demux(stream))
            known = Layout.of(container, stream, packets, num_frames)
            if len(_LAYOUTS) < REMEMBERED_FILES:
                _LAYOUTS[identity] = known
        return _gather(path, frames, view, num_frames, _decode(container, stream, known, frames, packets))


def _gather(
    path: str | Path, frames: Sequence[int] | np.ndarray, view: str, num_frames: int, numbered: Iterator
) -> np.ndarray:
    """What `read_frames` returns, from (number, frame) in presentation order."""
    missing = {int(number): place for place, number in enumerate(frames)}
    write = _FrameWriter(path, len(missing), view)
    for number, frame in numbered:
        if number in missing:
            write(missing.pop(number), frame)
            if not missing:
                return write.out
        if number > frames[-1]:
            break
    raise VideoError(path, f"frame {min(missing)} of {num_frames} does not decode")


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
        table = PacketTable([packet for packet in packets if _holds_frame(packet)], layout)
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

    def __init__(self, times: np.ndarray, numbers: np.ndarray, keys: np.ndarray) -> None:
        """Of every packet that holds a frame, in decoding order: its time, the frame's number (both int64 [F]), and
        whether that is a key frame (bool [F])."""
        self.first_time = int(times[0])
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
        packets = [packet for packet in packets if _holds_frame(packet)]
        times = [packet.pts for packet in packets]
        if None in times or len(set(times)) != len(times) or len(times) != num_frames:
            return None
        times, keys = np.array(times, np.int64), np.array([packet.is_keyframe for packet in packets])
        if _shows_times(container):
            numbers = np.argsort(np.argsort(times))
        else:
            numbers = _numbers_by_kind(packets, keys) if stream.codec_context.name == "mpeg4" else None
        return None if numbers is None else cls(times, numbers, keys)

    def number(self, time: int | None) -> int:
        """The frame of the packet of that time; -1 if there is none."""
        if time is None:
            return -1
        if isinstance(self._times, range):
            return int(self._numbers[self._times.index(time)]) if time in self._times else -1
        place = int(np.searchsorted(self._times, time))
        return int(self._numbers[place]) if place < len(self._times) and self._times[place] == time else -1

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
    wanted: Sequence[int] | np.ndarray,
    packets: list[av.Packet] | None = None,
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(number, frame) in presentation order: the frames `wanted` (increasing) that decode, and others.

    `packets` are all of the file, if they have been read already.
    """
    decoder = stream.codec_context

    def demux() -> Iterable[av.Packet]:
        return container.demux(stream) if packets is None else packets

    if layout is None:
        yield from enumerate(frame for packet in demux() for frame in decoder.decode(packet))
        return
    start = int(layout.start(wanted[0]))
    if start != layout.first_time:
        if not _shows_times(container):  # the first names the encoder, by whose habits FFmpeg decodes all that follows
            decoder.decode(next(filter(_holds_frame, demux())))
        if packets is None:
            container.seek(start, stream=stream)
    needed = itertools.dropwhile(lambda packet: packet.pts != start, filter(_holds_frame, demux()))
    base, wanted, passing = layout.number(start), {int(number) for number in wanted}, False
    passes = decoder.name in PASSES_OVER
    for packet in itertools.chain(needed, [None]):
        passed = passes and packet is not None and layout.number(packet.pts) not in wanted
        if passed != passing:
            decoder.skip_frame, passing = ("NONREF" if passed else "DEFAULT"), passed
        for frame in decoder.decode(packet):
            number = layout.number(frame.pts)
            if number >= base:
                yield number, frame


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
        self.ranks = np.array([layout.number(packet.pts) for packet in packets])

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


class _FrameWriter:
    """Converts decoded frames into one array; the scaler and the array are made once per video."""

    def __init__(self, path: str | Path, count: int, view: str) -> None:
        self._path, self._count, self._view = path, count, view
        self._scaler = VideoReformatter()  # a new one per frame costs three times the conversion itself
        self._size: tuple[int, int] | None = None
        self.out: np.ndarray | None = None

    def __call__(self, place: int, frame: av.VideoFrame) -> None:
        if self._size is None:
            _refuse_rotation(self._path, frame)
            self._size = (frame.height, frame.width)
            height, width = self._size
            shape = {"rgb": (height, width, 3), "flow": (height // 2, width, 2), "gray": (height, width)}[self._view]
            self.out = np.empty((self._count, *shape), np.uint8)
        if (frame.height, frame.width) != self._size:
            raise VideoError(self._path, f"the frame size changes from {self._size} to {(frame.height, frame.width)}")
        if self._view == "rgb":
            plane = self._scaler.reformat(frame, format="rgb24", threads=1).planes[0]
            rows = np.frombuffer(plane, np.uint8).reshape(frame.height, plane.line_size)
            self.out[place] = rows[:, : 3 * frame.width].reshape(frame.height, frame.width, 3)
        elif self._view == "gray":
            plane = self._scaler.reformat(frame, format="gray", threads=1).planes[0]
            rows = np.frombuffer(plane, np.uint8).reshape(frame.height, plane.line_size)
            self.out[place] = rows[:, : frame.width]
        else:
            if frame.format.components[0].bits != 8 or not frame.format.name.startswith(("yuv", "gray", "nv")):
                raise VideoError(self._path, f"flow is stored in 8-bit luma, this is {frame.format.name}")
            plane = frame.planes[0]
            rows = np.frombuffer(plane, np.uint8).reshape(frame.height, plane.line_size)[:, : frame.width]
            half = frame.height // 2
            self.out[place, ..., 0], self.out[place, ..., 1] = rows[:half], rows[half : 2 * half]


@contextmanager
def _open(path: str | Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The file and its first video stream; every failure of FFmpeg inside the block becomes a VideoError."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoError(path, "holds no video stream")
            stream = container.streams.video[0]
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
