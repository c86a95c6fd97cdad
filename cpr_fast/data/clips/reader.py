"""Planned clips to source material, in parallel: decoded frames for the CPU graph, packets or JPEGs for the GPU graph.

A video that cannot be read is replaced, in training by another video of the same epoch, in evaluation by nothing; it
is counted and named once.

Letters: M clips of a job (one video) = N groups of G, T frames, U distinct frames of a group, H x W pixels.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.cut import cut_clips, needed_region, taken
from cpr_fast.data.clips.sampling import Clips, clip_frames
from cpr_fast.data.flow.on_the_fly import ReadParts, frame_reader
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.storage.media import is_record, read_parts
from cpr_fast.data.storage.records import read_jpegs
from cpr_fast.data.video.container import VideoError
from cpr_fast.data.video.decode import joined
from cpr_fast.data.video.packets import slice_packets
from cpr_fast.data.video.pixels import Region
from cpr_fast.errors import InputError

log = logging.getLogger(__name__)

Fetch = Callable[[Video, Clips, str, DataConfig], list]  # the clips of one video, in one view


@dataclass(frozen=True)
class Material:
    """The clips of one video and, per view, what the graph decodes or augments (see `ClipGraph.run`)."""

    clips: Clips
    views: dict[str, list]


def fetch_frames(
    video: Video, clips: Clips, view: str, data: DataConfig, read: ReadParts | None = None
) -> list[np.ndarray]:
    """Decoded clips, whole: uint8 [T, H, W, 3] (rgb) or [T, H, W, 2] (flow), one pass over the file.

    `read` is that of `frame_reader`, the default, or a cache of it.
    """
    path, num_frames = _file(video, view, data)
    frames = np.stack([clip_frames(start, data) for start in clips.start])  # [M, T]
    needed, place = np.unique(frames, return_inverse=True)
    parts = (read or frame_reader(data))(path, needed, view, num_frames, Region.whole(video.height, video.width))
    pixels = joined(parts, len(needed))
    return [taken(pixels, row) for row in place.reshape(frames.shape)]


def fetch_cut(
    video: Video, clips: Clips, view: str, data: DataConfig, read: ReadParts | None = None, *, finish: bool = True
) -> list[np.ndarray]:
    """Decoded clips as `cut_clips` leaves them: M of uint8 [T, S, S, 3]; `read` as above."""
    region, parts = needed_parts(video, clips, view, data, read)
    return cut_clips(parts, clips, view, data, region, finish=finish)


def needed_parts(
    video: Video, clips: Clips, view: str, data: DataConfig, read: ReadParts | None = None
) -> tuple[Region, Iterator[np.ndarray]]:
    """What `cut_clips` cuts the clips from, in one pass over the file: a region, and that of their distinct frames, a
    few at a time; `read` as above."""
    path, num_frames = _file(video, view, data)
    region = needed_region(clips, video.height, video.width, data)
    frames = np.unique([clip_frames(start, data) for start in clips.start])
    return region, (read or frame_reader(data))(path, frames, view, num_frames, region)


def fetch_packets(
    video: Video, clips: Clips, view: str, data: DataConfig, *, group: int = 1
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Encoded clips, one entry for every `group` of them, so that their video is decoded once:
    (bytes uint8 [L], frame numbers in them int32 [U], place in those of every clip's frames int32 [G, T])."""
    path, num_frames = _file(video, view, data)
    out = []
    for starts in clips.start.reshape(-1, group):
        frames = np.stack([clip_frames(s, data) for s in starts])  # [G, T]
        needed, order = np.unique(frames, return_inverse=True)
        encoded, chosen = slice_packets(path, needed, num_frames)
        out.append((encoded, chosen, order.reshape(frames.shape).astype(np.int32)))
    return out


def fetch_jpegs(video: Video, clips: Clips, view: str, data: DataConfig) -> list[list[np.ndarray]]:
    """Encoded clips of a record: T JPEGs each, uint8 [L], in the mapped file."""
    path, _ = _file(video, view, data)
    records = (read_jpegs(path, clip_frames(start, data)) for start in clips.start)
    return [[np.frombuffer(jpeg, np.uint8) for jpeg in jpegs] for jpegs in records]


def checked(fetch: Fetch) -> Fetch:
    """As `fetch`, after decoding the same clips here: raises VideoError where the graph would fail on them."""

    def fetch_checked(video: Video, clips: Clips, view: str, data: DataConfig) -> list:
        fetch_frames(video, clips, view, data)
        return fetch(video, clips, view, data)

    return fetch_checked


class FrameCache:
    """`read_parts` that keeps whole decoded videos in RAM, first come, until `limit_gib` are full.

    On 160x120 videos reading is more than half of the work of a batch. The frames are the same, bit for bit.
    """

    def __init__(self, limit_gib: float, read: ReadParts = read_parts) -> None:
        self._free_bytes, self._read = int(limit_gib * 2**30), read
        self._videos: dict[tuple[Path, str], np.ndarray] = {}  # by path and view
        self._damaged: set[Path] = set()  # cannot be decoded to their end, but may still give a clip
        self._lock = threading.Lock()

    def read_parts(
        self, path: Path, frames: np.ndarray, view: str, num_frames: int, region: Region | None = None
    ) -> Iterator[np.ndarray]:
        pixels = self._videos.get((path, view))
        if pixels is None:
            pixels = self._whole(path, view, num_frames)
        if pixels is None:
            yield from self._read(path, frames, view, num_frames, region)
        else:
            yield taken(pixels if region is None else region.of(path, pixels, view), frames)

    def _whole(self, path: Path, view: str, num_frames: int) -> np.ndarray | None:
        """All frames, kept if there is room; None where the wanted ones are better read alone."""
        # a record gives any frame at its own cost: none is decoded before it is asked for
        if self._free_bytes <= 0 or path in self._damaged or is_record(path):
            return None
        try:
            pixels = joined(self._read(path, np.arange(num_frames), view, num_frames, None), num_frames)
        except VideoError:
            self._damaged.add(path)
            return None
        self._keep((path, view), pixels)
        return pixels

    def _keep(self, video: tuple[Path, str], pixels: np.ndarray) -> None:
        with self._lock:
            if video in self._videos:
                return
            if pixels.nbytes > self._free_bytes:
                self._free_bytes = 0  # full: later videos are not decoded to their end for nothing
                return
            self._free_bytes -= pixels.nbytes
            self._videos[video] = pixels


@dataclass
class ClipReader:
    """Reads the clips of one video per call, from any number of threads, and keeps the list of what failed."""

    index: Index
    data: DataConfig
    fetch: Mapping[str, Fetch]  # by view
    skipped: list[tuple[Path, str]] = field(default_factory=list)  # (path, reason), once per file
    _named: set[Path] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, clips: Clips, *, check: bool = False) -> Material | None:
        """Every view of the clips of one video, or None if the video cannot be read; `check`: decoded to be sure."""
        video = self.index[int(clips.video[0])]
        fetch = {view: checked(fetch) if check else fetch for view, fetch in self.fetch.items()}
        try:
            return Material(clips, {view: fetch[view](video, clips, view, self.data) for view in fetch})
        except VideoError as error:
            with self._lock:
                if error.path not in self._named:
                    self._named.add(error.path)
                    self.skipped.append((error.path, error.reason))
                    log.warning("skipped %s: %s", error.path, error.reason)
            return None

    def read_or_substitute(self, clips: Clips, substitutes: Iterable[Clips], **options) -> Material:
        """As `read`, going through `substitutes` in order until one can be read.

        Which video stands in depends on the plan and the files alone: no memory of earlier failures is consulted, since
        a damaged file may give one clip and not another, and a resumed run would remember less.
        """
        for candidate in itertools.chain([clips], substitutes):
            material = self.read(candidate, **options)
            if material is not None:
                return material
        path, reason = self.skipped[0]
        raise InputError(f"none of the {len(self.index)} videos of the index can be read; the first: {path}: {reason}")


def _file(video: Video, view: str, data: DataConfig) -> tuple[Path, int]:
    """What a view is read from, and how many frames it has."""
    if view == "rgb":
        return video.path, video.num_frames
    if data.flow == "on_the_fly":
        if video.num_frames < 2:
            raise VideoError(video.path, "has a single frame: no flow")
        return video.path, video.num_frames - 1
    if video.flow_path is None:
        raise VideoError(video.path, "has no flow_path in the index; run `cpr-fast flow` first")
    return video.flow_path, video.num_frames - 1
