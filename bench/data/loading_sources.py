"""The sources of clips on which the loader and other decoders are compared, and the truth of their frames.

Letters: T frames of a clip, H x W pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from loading_forms import prepared
from support import real_clips

from cpr_fast.config import DataConfig
from cpr_fast.data.clips.sampling import Clips, Sources, clip_frames, epoch_order, plan_first
from cpr_fast.data.flow.files import encode_video
from cpr_fast.data.flow.records import encode_jpegs
from cpr_fast.data.index.build import IndexOptions, write_index
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.storage.media import is_record
from cpr_fast.data.storage.record_writer import RecordWriter
from cpr_fast.data.video.decode import read_frames
from cpr_fast.doctor.parity import decode_linearly

SEED, EPOCH = 0, 0


@dataclass(frozen=True)
class Work:
    """Plans the clips of an epoch, one of each video, in the order and batches of the loader."""

    source: str
    view: str
    index: Index
    data: DataConfig
    clips: Clips

    @classmethod
    def of(cls, source: str, view: str, index: Index, data: DataConfig) -> Work:
        order = epoch_order(len(index), SEED, EPOCH)
        return cls(source, view, index, data, plan_first(Sources.of(index), order, data, SEED, EPOCH))

    def file(self, row: int) -> Video:
        """Returns the video of a clip with the path and the length of the file that its view is read from."""
        video = self.index[int(self.clips.video[row])]
        if self.view == "rgb":
            return video
        return replace(video, path=video.flow_path, num_frames=video.num_frames - 1)

    def read(self, decoder: Callable, row: int) -> np.ndarray:
        return decoder(self.file(row), clip_frames(int(self.clips.start[row]), self.data))


def sources(root: Path | None, videos: int, data: DataConfig, folder: Path, *, files_only: bool = False) -> list[Work]:
    """Makes five indexes of the same videos: as they are, transcoded, as JPEG records (quality 100, 4:2:0), and with
    flow in files and in JPEG records as `cpr-fast flow` stores it. With `files_only` only the first."""
    paths = real_clips.spread_videos(videos) if root is None else sorted(root.glob("*/*.*"))[:videos]
    for path in paths:
        link = folder / "set" / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    made, copies = {}, [("files", IndexOptions()), ("transcoded", IndexOptions(transcode=folder / "transcoded"))]
    for name, options in copies[:1] if files_only else copies:
        write_index(folder / "set", folder / f"{name}.csv", options)
        made[name] = "rgb", list(Index.load(folder / f"{name}.csv"))
    _, files = made["files"]
    if not files_only:
        made |= _records_and_flow(files, folder)
    whole = len(files) // data.batch_size * data.batch_size
    return [Work.of(name, view, Index(rows[:whole]), data) for name, (view, rows) in made.items()]


def _records_and_flow(files: list[Video], folder: Path) -> dict[str, tuple[str, list[Video]]]:
    with RecordWriter(folder / "frames.lmdb") as frames, RecordWriter(folder / "flow.lmdb") as flow:
        for video in files:
            pixels = read_frames(video.path, range(video.num_frames), "rgb", video.num_frames)
            jpegs = [simplejpeg.encode_jpeg(frame, 100, colorsubsampling="420") for frame in pixels]
            frames.put(_name(video), jpegs)
            levels = _levels(pixels)
            encode_video(folder / "flow" / f"{_name(video)}.flow.mp4", levels)
            flow.put(_name(video), encode_jpegs(levels))
    write_index(folder / "frames.lmdb", folder / "records.csv", IndexOptions(layout="lmdb", verify=False))
    return {
        "records": ("rgb", list(Index.load(folder / "records.csv"))),
        "flow files": ("flow", [replace(v, flow_path=folder / "flow" / f"{_name(v)}.flow.mp4") for v in files]),
        "flow records": ("flow", [replace(v, flow_path=Path(f"{folder}/flow.lmdb#{_name(v)}")) for v in files]),
    }


def _name(video: Video) -> str:
    return f"{video.label}/{video.path.stem}"


def _levels(pixels: np.ndarray) -> np.ndarray:
    """Returns levels that are as smooth and cost about as many bytes as TV-L1's, uint8 [T - 1, 2, H, W], in a moment:
    the blurred change of green is u, and its negative, blurred more, is v."""
    change = np.diff(pixels[..., 1].astype(np.float32), axis=0)
    u = np.stack([cv2.GaussianBlur(picture, (0, 0), 4) for picture in change])
    v = np.stack([cv2.GaussianBlur(picture, (0, 0), 7) for picture in change])
    return np.clip(128 + 2 * np.stack([u, -v], axis=1), 0, 255).astype(np.uint8)


def bytes_per_field(works: list[Work]) -> int:
    """Returns the mean size of a field (a frame pair) in the flow files."""
    work = next(work for work in works if work.source == "flow files")
    files = [work.file(row) for row in range(len(work.clips))]
    return round(sum(file.path.stat().st_size for file in files) / sum(file.num_frames for file in files))


def truth_of(work: Work) -> list[np.ndarray]:
    """Decodes the frames of every clip in the simplest way: records by PIL, files from their start."""
    if is_record(work.file(0).path):
        reader = prepared("PIL", work.file(0), work.view)
    elif work.view == "flow":
        reader = prepared("PyAV", work.file(0), work.view)
    else:

        def reader(video: Video, frames: np.ndarray) -> np.ndarray:
            return decode_linearly(video.path)[frames]

    return [work.read(reader, row) for row in range(len(work.clips))]
