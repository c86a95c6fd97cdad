"""Flow as JPEG records of an LMDB file in CoCLR's format, under the names "Class/video".

Field t of a record is the picture (u, v, 128) in the order of OpenCV, as levels (`flow_levels`): what CoCLR's loader
reads. Quality 100 as published, but with chroma at full resolution (4:4:4; any reader of JPEG takes it): with the
published 4:2:0 single pixels at the edges of moving things err by pixels of flow (`bench/data/flow_storage.py`).

Letters: N frames of a video, H x W pixels.
"""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import simplejpeg

from cpr_fast.data.flow.files import relative_path
from cpr_fast.data.index.index import Index
from cpr_fast.data.storage.record_writer import RecordWriter
from cpr_fast.data.storage.records import open_records, read_jpegs, record_path, split_record
from cpr_fast.errors import InputError


class FlowRecords:
    """Records in OUT; those of shard i of n in OUT.i-of-n.lmdb. The whole (shard 0 of 1) takes over the records of
    shards that are done, so that one file holds all."""

    def __init__(self, index: Index, folder: Path, out: Path, shard: tuple[int, int]) -> None:
        """Raises InputError where two videos would share a name, or another process writes the same shard."""
        number, count = shard
        self._index, self._names, self._lock = index, _names(index, folder), threading.Lock()
        self._writer = RecordWriter(out if count == 1 else out.with_name(f"{out.stem}.{number}-of-{count}{out.suffix}"))
        found = [split_record(path) if path else None for path in self.paths(index, folder, out=out)]
        self._elsewhere = {name: file for file, name in filter(None, found) if name not in self._writer.num_frames}
        self._takes_over = count == 1

    def holds(self, position: int) -> bool:
        """Whether the flow of a video is there, as many fields as the video wants."""
        name, fields = self._names[position], self._index[position].num_frames - 1
        return name in self._elsewhere or self._writer.num_frames.get(name) == fields

    def write(self, position: int, levels: np.ndarray) -> None:
        """Stores the levels of a video, uint8 [N - 1, 2, H, W]; safe to call from several threads."""
        jpegs = encode_jpegs(levels)
        with self._lock:
            self._writer.put(self._names[position], jpegs)

    @staticmethod
    def paths(index: Index, folder: Path, *, out: Path) -> list[Path | None]:
        """Where the flow of every video of the index is, None where it is not there: in OUT, or in that of a shard."""
        shards = sorted(out.parent.glob(f"{out.stem}.*-of-*{out.suffix}"))
        files = [(file, open_records(file).num_frames()) for file in [out, *shards] if file.exists()]
        wanted = zip(_names(index, folder), (video.num_frames - 1 for video in index), strict=True)
        return [
            next((record_path(file, name) for file, held in files if held.get(name) == fields), None)
            for name, fields in wanted
        ]

    def __enter__(self) -> FlowRecords:
        self._writer.__enter__()
        for name, video in zip(self._names, self._index, strict=True):
            if self._takes_over and name in self._elsewhere:
                jpegs = read_jpegs(record_path(self._elsewhere.pop(name), name), range(video.num_frames - 1))
                self._writer.put(name, jpegs)
        return self

    def __exit__(self, *raised: object) -> None:
        self._writer.__exit__(*raised)


def encode_jpegs(levels: np.ndarray) -> list[bytes]:
    """uint8 [N - 1, 2, H, W] as JPEGs of (u, v, 128)."""
    fields, _, height, width = levels.shape
    picture = np.full((height, width, 3), 128, np.uint8)
    jpegs = []
    for field in levels:
        picture[..., :2] = field.transpose(1, 2, 0)
        jpegs.append(simplejpeg.encode_jpeg(picture, 100, "BGR", "444"))
    return jpegs


def _names(index: Index, folder: Path) -> list[str]:
    """Returns the name of every video's record: Class/video as in CoCLR's tools, by the last two parts of the path.

    Videos that would share such a name are named by their whole path below the folder of the index. A video that is a
    record keeps its own name.
    """
    records = [split_record(video.path) for video in index]
    short = [f"{video.path.parent.name}/{video.path.stem}" if record is None else record[1]
             for video, record in zip(index, records, strict=True)]  # fmt: skip
    shared = Counter(short)
    owner: dict[str, Path] = {}
    for video, record, name in zip(index, records, short, strict=True):
        if record is None and shared[name] > 1:
            name = relative_path(video, folder).as_posix()
        if name in owner:
            raise InputError(f"index: {str(video.path)!r} and {str(owner[name])!r} would share the record {name!r}")
        owner[name] = video.path
    return list(owner)
