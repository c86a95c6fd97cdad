"""Reads the source material of planned clips: decoded frames for the CPU graph, packets or JPEGs for the GPU graph.

In training a video that cannot be read is replaced by another video of the same epoch; in evaluation it is left out.
Such videos are counted, and reported once per kind of problem.

Letters: M clips of a job (one video) = N groups of G clips, T frames, U distinct frames of a group, H x W pixels.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.cut import cut_clips, needed_region, taken
from cpr_fast.data.clips.sampling import Clips, clip_frames
from cpr_fast.data.flow.on_the_fly import ReadParts, frame_reader
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.index.rows.columns import spread
from cpr_fast.data.storage.media import is_pictures, read_jpegs, read_parts, require_frames
from cpr_fast.data.storage.times import native_rate, shown_frames
from cpr_fast.data.storage.unreadable import SAMPLED, Unreadable
from cpr_fast.data.video.container import VideoError
from cpr_fast.data.video.decode import joined
from cpr_fast.data.video.packets import slice_packets
from cpr_fast.data.video.pixels import Region
from cpr_fast.errors import InputError
from cpr_fast.wording import counted

LEAST_SHARE = 0.1  # of the decoded videos that have to fit in the cache, or none is kept
MOST_SUBSTITUTES = 1000  # videos tried for one place in a batch before an error is raised

Fetch = Callable[[Video, Clips, str, DataConfig], list]  # returns the clips of one video in one view


@dataclass(frozen=True)
class Material:
    """The planned clips of one video and, per view, what the graph decodes or augments (see `ClipGraph.run`)."""

    clips: Clips
    views: dict[str, list]


def fetch_frames(
    video: Video, clips: Clips, view: str, data: DataConfig, read: ReadParts | None = None
) -> list[np.ndarray]:
    """Returns decoded clips with whole frames, uint8 [T, H, W, 3] (rgb) or [T, H, W, 2] (flow), in one pass over the
    file.

    `read` is the result of `frame_reader`, which is the default, or `FrameCache.read_parts`. Raises VideoError.
    """
    path, num_frames = _file(video, view, data)
    frames = source_frames(video, clips, view, data)  # [M, T]
    needed, place = np.unique(frames, return_inverse=True)
    parts = (read or frame_reader(data))(path, needed, view, num_frames, Region.whole(video.height, video.width))
    pixels = joined(parts, len(needed))
    return [taken(pixels, row) for row in place.reshape(frames.shape)]


def fetch_cut(
    video: Video, clips: Clips, view: str, data: DataConfig, read: ReadParts | None = None, *, finish: bool = True
) -> list[np.ndarray]:
    """Returns decoded clips as `cut_clips` returns them: M arrays, uint8 [T, S, S, 3]. `read` as in `fetch_frames`."""
    region, frames, parts = needed_parts(video, clips, view, data, read)
    return cut_clips(parts, clips, view, data, region, finish=finish, frames=frames)


def needed_parts(
    video: Video, clips: Clips, view: str, data: DataConfig, read: ReadParts | None = None
) -> tuple[Region, np.ndarray, Iterator[np.ndarray]]:
    """Returns what `cut_clips` needs: the region of the frames, the clips' `source_frames`, and an iterator over that
    region of the distinct frames, a few at a time, in one pass over the file. `read` as in `fetch_frames`.
    """
    path, num_frames = _file(video, view, data)
    region = needed_region(clips, video.height, video.width, data)
    frames = source_frames(video, clips, view, data)
    return region, frames, (read or frame_reader(data))(path, np.unique(frames), view, num_frames, region)


def fetch_packets(
    video: Video, clips: Clips, view: str, data: DataConfig, *, group: int = 1
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Returns encoded clips, one entry for every `group` of clips, so that the video is decoded once for all of them.

    An entry is (bytes uint8 [L], the numbers of the needed frames in them int32 [U], the places of every clip's frames
    among these int32 [G, T]).
    """
    path, num_frames = _file(video, view, data)
    out = []
    for frames in source_frames(video, clips, view, data).reshape(-1, group, data.frames):  # [G, T] each
        needed, order = np.unique(frames, return_inverse=True)
        encoded, chosen = slice_packets(path, needed, num_frames, view)
        out.append((encoded, chosen, order.reshape(frames.shape).astype(np.int32)))
    return out


def fetch_jpegs(video: Video, clips: Clips, view: str, data: DataConfig) -> list[list[np.ndarray]]:
    """Returns encoded clips: T JPEGs each, uint8 [L]; those of a record are views of the memory-mapped file."""
    path, num_frames = _file(video, view, data)
    require_frames(path, view, num_frames)
    records = (read_jpegs(path, frames) for frames in source_frames(video, clips, view, data))
    return [[np.frombuffer(jpeg, np.uint8) for jpeg in jpegs] for jpegs in records]


def source_frames(video: Video, clips: Clips, view: str, data: DataConfig) -> np.ndarray:
    """Returns the number of each frame of the clips of one video in the file of a view, int64 [M, T].

    With `data.fps` these are the frames that the video shows at the times of the clips' samples. Flow is then the field
    that begins at such a frame: the motion to the next frame of the video, not to the next sample. Raises VideoError if
    the times of the video cannot be read.
    """
    frames = np.stack([clip_frames(start, data) for start in clips.start])
    if not data.fps:
        return frames
    rate = native_rate(video.path, video.fps, data.pictures_fps)
    _, held = _file(video, view, data)
    return np.minimum(shown_frames(video.path, frames, video.num_frames, rate, data.fps), held - 1)


def checked(fetch: Fetch) -> Fetch:
    """Returns `fetch` preceded by a decode of the same clips, which raises VideoError for data on which the graph would
    fail."""

    def fetch_checked(video: Video, clips: Clips, view: str, data: DataConfig) -> list:
        fetch_frames(video, clips, view, data)
        return fetch(video, clips, view, data)

    return fetch_checked


def cache_gib(index: Index, views: Iterable[str], data: DataConfig) -> float:
    """Returns `data.cache_gib`, or 0 if less than LEAST_SHARE of the decoded `views` ("rgb", "flow") fit in it.

    Of a large data set a cache would save hardly any decoding, but the first batches, which fill it, would decode whole
    videos in place of clips.
    """
    pixels = index.numbers("num_frames").astype(np.float64) * index.numbers("width") * index.numbers("height")
    held = pixels.sum() * sum(3 if view == "rgb" else 2 for view in views)  # bytes
    return data.cache_gib if data.cache_gib * 2**30 >= LEAST_SHARE * held else 0.0


class FrameCache:
    """A `read_parts` that keeps whole decoded videos in memory, in the order in which they are read, up to `limit_gib`.

    Reading is more than half of the work of a batch of 160x120 videos. The frames are the same, bit for bit.
    """

    def __init__(self, limit_gib: float, read: ReadParts = read_parts) -> None:
        self._free_bytes, self._read = int(limit_gib * 2**30), read
        self._videos: dict[tuple[Path, str], np.ndarray] = {}  # by path and view
        self._damaged: set[Path] = set()  # files that do not decode completely, but may still give some clips
        self._lock = threading.Lock()

    def read_parts(
        self, path: Path, frames: np.ndarray, view: str, num_frames: int, region: Region | None = None
    ) -> Iterator[np.ndarray]:
        """Yields what `read` yields; the frames of a cached video are yielded as a single part."""
        pixels = self._videos.get((path, view))
        if pixels is None:
            pixels = self._whole(path, view, num_frames)
        if pixels is None:
            yield from self._read(path, frames, view, num_frames, region)
        else:
            yield taken(pixels if region is None else region.of(path, pixels, view), frames)

    def clear(self) -> None:
        """Forgets the videos, and keeps none from now on."""
        with self._lock:
            self._videos, self._free_bytes = {}, 0

    def _whole(self, path: Path, view: str, num_frames: int) -> np.ndarray | None:
        """Reads all frames and keeps them if there is room. Returns None if only the needed frames should be read."""
        # Pictures give each frame without decoding others, so reading all of them would only cost more.
        if self._free_bytes <= 0 or path in self._damaged or is_pictures(path):
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
                self._free_bytes = 0  # full: later videos are no longer decoded completely
                return
            self._free_bytes -= pixels.nbytes
            self._videos[video] = pixels


@dataclass
class ClipReader:
    """Reads the clips of one video per call, from any number of threads, and keeps a list of the files that failed."""

    index: Index
    data: DataConfig
    fetch: Mapping[str, Fetch]  # by view

    def __post_init__(self) -> None:
        files = [
            video.path if view == "rgb" else video.flow_path or video.path
            for view in self.fetch
            for video in map(self.index.__getitem__, spread(len(self.index), SAMPLED))
        ]
        self._unreadable = Unreadable(files)

    @property
    def skipped(self) -> list[tuple[Path, str]]:
        """(path, reason) of every file that could not be read, once per file."""
        return self._unreadable.files

    def read(self, clips: Clips, *, check: bool = False) -> Material | None:
        """Reads every view of the clips of one video. Returns None if the video cannot be read.

        With `check` the clips are also decoded here. Raises InputError if most files of the index have disappeared.
        """
        video = self.index[int(clips.video[0])]
        fetch = {view: checked(fetch) if check else fetch for view, fetch in self.fetch.items()}
        try:
            return Material(clips, {view: fetch[view](video, clips, view, self.data) for view in fetch})
        except VideoError as error:
            self._unreadable.add(error.path, error.reason)
            return None

    def read_or_substitute(self, clips: Clips, substitutes: Iterable[Clips], **options) -> Material:
        """Reads the clips of one video, or else those of the first of `substitutes` that can be read.

        The choice depends only on the plan and the files. Earlier failures do not influence it, because a damaged file
        may give one clip and not another, and because a resumed run would not know them. Raises InputError if no video
        can be read.
        """
        tried = 0
        for candidate in itertools.islice(itertools.chain([clips], substitutes), MOST_SUBSTITUTES):
            material = self.read(candidate, **options)
            if material is not None:
                return material
            tried += 1
        path, reason = self.skipped[0]
        which = (
            f"none of the {counted(len(self.index), 'video')}"
            if tried >= len(self.index)
            else f"none of {tried} of the {counted(len(self.index), 'video')}"
        )
        raise InputError(f"{which} of the index can be read; the first: {path}: {reason}")


def _file(video: Video, view: str, data: DataConfig) -> tuple[Path, int]:
    """Returns the file that a view is read from, and the number of its frames."""
    if view == "rgb":
        return video.path, video.num_frames
    if data.flow != "stored":
        if video.num_frames < 2:
            raise VideoError(video.path, "has a single frame: no flow")
        return video.path, video.num_frames - 1
    if video.flow_path is None:
        raise VideoError(video.path, "has no flow_path in the index; run `cpr-fast flow` first")
    return video.flow_path, video.num_frames - 1
