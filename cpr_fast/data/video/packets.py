"""Cuts the packets that carry chosen frames out of a video, as a small file in memory for decoders that do not seek.

Letters: F frames, L bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from cpr_fast.data.files.access import read_whole
from cpr_fast.data.video.container import VideoError, fewer_than_listed, open_video, shows_times
from cpr_fast.data.video.numbering import Layout, fewer_frames


def slice_packets(
    path: str | Path, frames: Sequence[int] | np.ndarray, num_frames: int, view: str = "rgb"
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the shortest part of a video from which a decoder gets `frames` (strictly increasing) without seeking.

    Of every group of pictures that holds a wanted frame, the packets up to the last needed one are taken; if groups
    are open, all packets from the first such group on. If the timestamps of a video do not prove the numbering, the
    complete video is returned. The container is Matroska, because in mp4, VP9 and MJPEG decode to wrong frames without
    an error.

    Returns:
        The encoded bytes, uint8 [L], and the number that each of `frames` has in them, int32 [F].
    Raises:
        VideoError: a frame is outside of the video, the file holds fewer than `num_frames`, or it cannot be read.
    """
    frames = np.asarray(frames)
    if not 0 <= frames[0] <= frames[-1] < num_frames:
        raise VideoError(path, f"expected frames within 0..{num_frames - 1}, got {frames[0]}..{frames[-1]}")
    with open_video(path) as (container, stream):
        layout, alone = None, len(container.streams.video) == 1
        if shows_times(container) or not alone:
            packets = list(container.demux(stream))
        if shows_times(container):
            layout = Layout.of(container, stream, packets, num_frames)
            if layout is None and (held := fewer_frames(path, packets, num_frames)) is not None:
                raise fewer_than_listed(path, held, num_frames, view)
        if layout is None:
            whole = np.frombuffer(read_whole(Path(path)), np.uint8) if alone else _copied(stream, packets)
            return whole, frames.astype(np.int32)
        table = PacketTable([packet for packet in packets if packet.size], layout)
        chosen = table.needed(frames)
        ranks = table.ranks[chosen]
        order = np.sort(ranks)
        packets = [table.packets[i] for i in chosen]
        places = np.searchsorted(order, frames).astype(np.int32)
        return _matroska(stream, packets, np.searchsorted(order, ranks)), places


class PacketTable:
    """The packets of a video in decoding order, and the number of the frame of each."""

    def __init__(self, packets: list[av.Packet], layout: Layout) -> None:
        self.packets, self._layout = packets, layout
        self.ranks = layout.numbers([packet.pts for packet in packets])

    def needed(self, frames: np.ndarray) -> np.ndarray:
        """Returns the indices, increasing, of the packets that `frames` (increasing) need; each run starts at a key."""
        place = {packet.pts: i for i, packet in enumerate(self.packets)}
        begins = np.array([place[time] for time in self._layout.start(frames).tolist()])
        if not self._closed():  # open groups of pictures decode with errors after a gap, so leave none
            begins = np.full_like(begins, begins[0])
        keep = np.zeros(len(self.packets), bool)
        for begin in np.unique(begins):
            last = frames[begins == begin][-1]
            end = 1 + int(np.flatnonzero(self.ranks <= last)[-1])
            keep[begin:end] |= self.ranks[begin:end] >= self.ranks[begin]
        return np.flatnonzero(keep)

    def _closed(self) -> bool:
        """Returns whether all groups of pictures are closed: no packet that follows a key packet is shown before it."""
        earliest_after = np.minimum.accumulate(self.ranks[::-1])[::-1]  # of the packet itself and all later ones
        return all(earliest_after[i] == self.ranks[i] for i, packet in enumerate(self.packets) if packet.is_keyframe)


def _copied(stream: av.VideoStream, packets: list[av.Packet]) -> np.ndarray:
    """Returns all packets of one stream as a Matroska file, uint8 [L].

    A decoder that is given the whole file may choose its cover art or another stream.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        copy = output.add_stream_from_template(stream, opaque=True)
        for packet in packets:
            if packet.size:
                packet.stream = copy
                output.mux(packet)
    return np.frombuffer(buffer.getbuffer(), np.uint8)


def _matroska(stream: av.VideoStream, packets: list[av.Packet], ranks: np.ndarray) -> np.ndarray:
    """Returns packets in decoding order, whose frames have the numbers `ranks`, as a Matroska file, uint8 [L]."""
    buffer = io.BytesIO()
    delay = int(np.max(np.arange(len(packets)) - ranks))  # no decoding time may be after its presentation time
    with av.open(buffer, "w", format="matroska") as output:
        copy = output.add_stream_from_template(
            stream, opaque=True
        )  # opaque: PyAV has no encoder for AV1, only a decoder
        copy.time_base = Fraction(1, 25)  # one tick per frame, whatever the source's clock was
        for position, (packet, rank) in enumerate(zip(packets, ranks, strict=True)):
            packet.stream = copy
            packet.time_base = copy.time_base
            packet.pts, packet.dts = int(rank), position - delay
            output.mux(packet)
    return np.frombuffer(buffer.getbuffer(), np.uint8)
