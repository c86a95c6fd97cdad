"""Frame-exact decoding of chosen frames.

A frame's number is its place in presentation order when the file is decoded from its start, which is the only
definition that every container shares: header counts lie, and AVI carries no presentation times. Where the packets
prove the numbering (as many distinct times as frames that decode; of MPEG-4 in AVI as many pictures, whose kinds say in
which order they are shown) decoding starts at the previous key frame and passes over unwanted frames to which no other
refers; elsewhere every frame from 0 on is decoded. The proof reads a whole file; it is remembered, so that later reads
of the file take no more of it than they need.

Letters: F frames, H x W pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import av
import numpy as np

from cpr_fast.data.video.container import VideoError, holds_frame, open_video
from cpr_fast.data.video.numbering import LAYOUTS, REMEMBERED_FILES, Layout, file_identity
from cpr_fast.data.video.pixels import Pixels, Region, pixels_of

PASSES_OVER = ("h264", "mpeg4")  # decoders that leave out exactly the frames to which no other refers
PART = 8  # frames that are converted at once: few enough to stay in a cache
PART_PIXELS = 2**25  # of larger ones fewer: FFmpeg bounds the size of a picture


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
    identity = file_identity(path, num_frames)
    known, packets = LAYOUTS.get(identity), None
    if known is not None:
        # a file that cannot seek, say: then as if nothing were remembered
        with suppress(VideoError), open_video(path, probe=known.probe) as (container, stream):
            for part in _parts(path, frames, view, num_frames, region, _decode(container, stream, known, frames)):
                yield part
                done += len(part)
            return
    with open_video(path) as (container, stream):
        if known is not None or identity not in LAYOUTS:
            packets, failed = list(container.demux(stream)), known is not None
            known = Layout.of(container, stream, packets, num_frames)
            if known is not None:
                known.probe = failed
            if len(LAYOUTS) < REMEMBERED_FILES:
                LAYOUTS[identity] = known
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
    pixels: Pixels | None = None
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
            held, colours, pixels = 0, _colours(frame), pixels_of(path, frame, view, region, most)
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
            decoder.decode(next(filter(holds_frame, demux()), None))
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


def _refuse_rotation(path: str | Path, frame: av.VideoFrame) -> None:
    """Hardware decoders ignore the display matrix: the same file must not give two pictures."""
    if frame.rotation % 360:
        raise VideoError(path, f"is stored rotated by {frame.rotation} degrees; transcode it upright")
