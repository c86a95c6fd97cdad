"""Decodes chosen frames of a video, frame-exact.

A frame's number is its position in presentation order when the file is decoded from its start. No other definition
works for all containers: the counts in headers are often wrong, and AVI carries no presentation times.

Decoding starts at the previous key frame, and skips unwanted frames that no other frame refers to, if the packets prove
the numbering: there are as many distinct times as frames that decode or, for MPEG-4 in AVI, as many pictures, whose
kinds determine the order in which they are shown. Otherwise every frame from 0 on is decoded. The proof requires
reading the whole file. Its result is cached, so that later reads of the same file read only the packets they need.

Letters: F frames, H x W pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from operator import attrgetter
from pathlib import Path

import av
import numpy as np

from cpr_fast.data.video.container import (
    VideoError,
    fewer_than_listed,
    format_name,
    holds_frame,
    open_video,
    shows_times,
)
from cpr_fast.data.video.numbering import LAYOUTS, REMEMBERED_FILES, Layout, fewer_frames, file_identity
from cpr_fast.data.video.pixels import Pixels, Region, pixels_of
from cpr_fast.data.video.reads.extents import remember_extents

PASSES_OVER = ("h264", "mpeg4")  # decoders whose skip_frame leaves out exactly the frames that no other frame refers to
# What determines the conversion of a frame to RGB; neither size nor format may change within a file.
KIND = attrgetter("width", "height", "format.name", "colorspace", "color_range", "interlaced_frame")
# Limits of what is converted before it is used, in frames and in pixels: few enough to stay in the last cache of a CPU,
# and many, because decoding and resizing evict one another's code and data. 32 frames of 320x240 are 7 MiB.
PART, PART_PIXELS = 32, 2**22


def frames_at_once(pixels: int) -> int:
    """Returns how many frames are converted at once if of each so many pixels are."""
    return max(1, min(PART, PART_PIXELS // max(1, pixels)))


def read_frames(path: str | Path, frames: Sequence[int] | np.ndarray, view: str, num_frames: int) -> np.ndarray:
    """Returns the frames of the given numbers, read in one pass over the file.

    Args:
        path: The video file.
        frames: Strictly increasing frame numbers.
        view: "rgb" | "flow" | "gray".
        num_frames: Frames of the video, as counted by `probe_video`.
    Returns:
        uint8 [F, H, W, 3] for "rgb"; [F, H, W] for "gray"; for "flow" [F, H, W, 2] (u, v), which are the upper and
        lower half of the luma plane as stored.
    Raises:
        VideoError: one of the frames does not decode.
    """
    return joined(read_parts(path, frames, view, num_frames), len(frames))


def joined(parts: Iterable[np.ndarray], count: int) -> np.ndarray:
    """Returns parts that hold `count` frames in all as one array; a single part is not copied."""
    out, done = None, 0
    for part in parts:
        if out is None:
            out = part if len(part) == count else np.empty((count, *part.shape[1:]), np.uint8)
        if out is not part:
            out[done : done + len(part)] = part
        done += len(part)
    return out


def read_parts(
    path: str | Path, frames: Sequence[int] | np.ndarray, view: str, num_frames: int, region: Region | None = None
) -> Iterator[np.ndarray]:
    """Yields what `read_frames` returns, a few frames at a time, and of each frame only `region`.

    The first read of a file also compares its number of frames with `num_frames`: every read of a file that holds
    fewer raises VideoError, whichever frames are wanted.
    """
    frames, done = [int(number) for number in frames], 0
    identity = file_identity(path, num_frames)
    known, packets = _remembered(path, identity, num_frames, view), None
    if known is not None:
        # a file in which seeking fails, for example, is read as if no result were cached
        opened = open_video(path, probe=known.probe, known_format=known.format)
        with suppress(VideoError), opened as (container, stream):
            for part in _parts(path, frames, view, num_frames, region, decode_frames(container, stream, known, frames)):
                yield part
                done += len(part)
            return
    with open_video(path) as (container, stream):
        if known is not None or identity not in LAYOUTS:
            packets, failed = list(container.demux(stream)), known is not None
            known = _remember(path, identity, container, stream, packets, num_frames, view, probe=failed)
            if known is not None:
                remember_extents(path, known, packets)
        frames = frames[done:]
        yield from _parts(
            path, frames, view, num_frames, region, decode_frames(container, stream, known, frames, packets)
        )


def frame_times(path: str | Path, num_frames: int) -> tuple[np.ndarray | None, Fraction]:
    """Returns when the frames of a video are shown, int64 [num_frames] in ticks, and the clock: seconds of a tick.

    The times of AVI are its decoding times in increasing order, which differ from the presentation times by a constant.
    A file whose packets do not prove which frame each carries is decoded completely. The times are None if the frames
    do not have one each, in their order. Raises VideoError, also for a file of fewer than `num_frames` frames.
    """
    known = known_layout(path, num_frames)
    if known is not None:
        return np.sort(np.array(known.times(range(num_frames)), np.int64)), known.clock
    with open_video(path) as (container, stream):
        clock = Fraction(stream.time_base)
        if not shows_times(container):
            return None, clock
        times = [frame.pts for frame in itertools.islice(container.decode(stream), num_frames)]
    if None in times or len(times) < num_frames or np.any(np.diff(times) < 0):
        return None, clock
    return np.array(times, np.int64), clock


def known_layout(path: str | Path, num_frames: int) -> Layout | None:
    """Returns the layout of a file, whose packets are read once per process; None if they do not prove it. Raises
    VideoError, also for a file of fewer than `num_frames` frames."""
    identity = file_identity(path, num_frames)
    known = _remembered(path, identity, num_frames, "rgb")
    if known is None and identity not in LAYOUTS:
        with open_video(path) as (container, stream):
            packets = list(container.demux(stream))
            known = _remember(path, identity, container, stream, packets, num_frames, "rgb", probe=False)
    return known


def _remembered(path: str | Path, identity: tuple, num_frames: int, view: str) -> Layout | None:
    """Returns the layout of a file that was read before. Raises VideoError if it has fewer frames than the index."""
    known = LAYOUTS.get(identity)
    if isinstance(known, int):
        raise fewer_than_listed(path, known, num_frames, view)
    return known


def _remember(
    path: str | Path,
    identity: tuple,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    packets: list[av.Packet],
    num_frames: int,
    view: str,
    *,
    probe: bool,
) -> Layout | None:
    """Returns the layout that follows from all packets of a file, and keeps it; `probe` becomes an attribute of it.
    Raises VideoError if the file has fewer frames than the index says."""
    found: Layout | int | None = Layout.of(container, stream, packets, num_frames)
    if found is None:
        found = fewer_frames(path, packets, num_frames)
    else:
        found.probe, found.format = probe, format_name(container)
    if len(LAYOUTS) < REMEMBERED_FILES:
        LAYOUTS[identity] = found
    if isinstance(found, int):
        raise fewer_than_listed(path, found, num_frames, view)
    return found


def _parts(
    path: str | Path,
    frames: list[int],
    view: str,
    num_frames: int,
    region: Region | None,
    decoded: Iterator[tuple[int, av.VideoFrame]],
) -> Iterator[np.ndarray]:
    """Yields what `read_parts` does, from the (number, frame) of all `frames`."""
    pixels: Pixels | None = None
    kind: tuple | None = None
    held = most = 0
    for wanted in frames:
        number, frame = next(decoded, (None, None))
        if number != wanted:
            raise VideoError(path, f"frame {wanted} of {num_frames} does not decode")
        now = KIND(frame)
        if now != kind:
            if kind is None:
                refuse_rotation(path, frame)
                most = min(len(frames), frames_at_once(_pixels_of_a_frame(frame, region)))
            elif now[:3] != kind[:3]:
                before, after = ("{}x{} {}".format(*each[:3]) for each in (kind, now))
                raise VideoError(path, f"the frame size or format changes from {before} to {after}")
            if held:
                yield pixels.take()
            held, kind, pixels = 0, now, pixels_of(path, frame, view, region, most)
        pixels.add(frame)
        held += 1
        if held == most:
            yield pixels.take()
            held = 0
    if held:
        yield pixels.take()


def _pixels_of_a_frame(frame: av.VideoFrame, region: Region | None) -> int:
    """Returns how many pixels of a frame are converted."""
    if region is None:
        return frame.width * frame.height
    top, left, bottom, right = region.box
    return (bottom - top) * (right - left)


def decode_frames(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    layout: Layout | None,
    wanted: list[int],
    packets: list[av.Packet] | None = None,
    watch: Callable[[av.Packet], None] | None = None,
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields (number, frame) of those `wanted` frames (increasing) that decode, in presentation order.

    `packets` are all packets of the file, if they have been read already. `watch` is called for each packet before it
    is decoded, if there is a layout.
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
            decoder.decode(next(filter(holds_frame, demux()), None))
        if packets is None:
            container.seek(start, stream=stream)
    # frames that an edit list cuts off are needed too, because others refer to them; the decoder does not return them
    needed = itertools.dropwhile(lambda packet: packet.pts != start, (packet for packet in demux() if packet.size))
    number_at = dict(zip(layout.times(wanted), wanted, strict=False))
    for packet in itertools.chain(_up_to_the_last(needed, decoder, number_at), [None]):
        if watch is not None and packet is not None:
            watch(packet)
        for frame in decoder.decode(packet):
            number = number_at.get(frame.pts)
            if number is not None:
                yield number, frame


def _up_to_the_last(
    packets: Iterable[av.Packet], decoder: av.VideoCodecContext, wanted: Collection[int]
) -> Iterator[av.Packet]:
    """Yields the packets up to the one that completes the `wanted` times.

    Later packets would only make the decoder return its buffered frames. Before each packet the decoder is told whether
    the packet's frame is wanted.
    """
    passes, passing, left = decoder.name in PASSES_OVER, False, len(wanted)
    for packet in packets:
        passed = packet.pts not in wanted
        if passes and passed != passing:
            decoder.skip_frame, passing = ("NONREF" if passed else "DEFAULT"), passed
        yield packet
        left -= not passed
        if not left:
            return


def refuse_rotation(path: str | Path, frame: av.VideoFrame) -> None:
    """Raises VideoError for a rotated frame: hardware decoders ignore the rotation, so results would differ."""
    if frame.rotation % 360:
        raise VideoError(path, f"is stored rotated by {frame.rotation} degrees; transcode it upright")
