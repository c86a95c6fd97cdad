"""Flow stored as JPEG records of one LMDB file, in CoCLR's format, under the names "Class/video".

Frame t of a record is the picture (u, v, 128) in OpenCV's channel order (BGR), as levels (`levels.quantise`): this is
what CoCLR's loader reads. The JPEG quality is 100 as published, but chroma (colour) keeps the full resolution (4:4:4),
which every JPEG reader accepts: with the published 4:2:0 single pixels at the edges of moving objects err by several
pixels of flow (`bench/data/flow_storage.py`).

Letters: N frames of a video, H x W pixels.
"""

from __future__ import annotations

import glob
import os
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg

from cpr_fast.data.flow.names import distinct_name, record_names, require_place, utf8_name
from cpr_fast.data.flow.origin import Origin, place_of
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.storage.record_writer import RecordWriter
from cpr_fast.data.storage.records import open_records, read_jpegs, record_path
from cpr_fast.data.video.container import VideoError

BYTES_PER_PIXEL = 0.309  # size of a flow field per pixel: 23.7 kB at 320x240 (bench/results/flow_storage.md)


class FlowRecords:
    """Stores flow as records of the LMDB file OUT, or for shard i of n of OUT.i-of-n.lmdb. A run without shards copies
    the records of finished shards into OUT, so that one file holds all of them."""

    def __init__(self, index: Index, folder: Path, out: Path, shard: tuple[int, int]) -> None:
        """Raises InputError if `out` does not end in .lmdb, or if another process is writing this shard."""
        require_place(out, "lmdb")
        number, count = shard
        file = out if count == 1 else out.with_name(f"{out.stem}.{number}-of-{count}{out.suffix}")
        self._index, self._lock, self._takes_over = index, threading.Lock(), count == 1
        self._writer = RecordWriter(file)
        self._names, places = _look(index, folder, out)
        self._places = [None if place is None or place.file == file else place for place in places]
        written = self._writer.num_frames
        self._current = [
            name in written and _is_current(video, written[name], self._writer.origin(name))
            for video, name in zip(index, self._names, strict=True)
        ]

    def holds(self, position: int) -> bool:
        """Returns whether complete flow, computed from the current version of the video, was stored when this object
        was created."""
        return self._current[position] or self._places[position] is not None

    def write(self, position: int, levels: np.ndarray) -> None:
        """Stores the levels of a video, uint8 [N - 1, 2, H, W]; safe to call from several threads."""
        jpegs, origin = encode_jpegs(levels), Origin.of(self._index[position].path).dump()
        with self._lock:
            self._writer.put(self._names[position], jpegs, origin)

    @staticmethod
    def found(index: Index, folder: Path, *, out: Path) -> list[tuple[set[Path], Path | None]]:
        """Returns for every video the paths that its flow may have in this store, in OUT or in the file of a shard, and
        the one where it is, or None."""
        files = [out, *_shards(out)]
        return [
            ({record_path(file, name) for file in files}, place and record_path(*place))
            for name, place in zip(*_look(index, folder, out), strict=True)
        ]

    def __enter__(self) -> FlowRecords:
        self._writer.__enter__()
        for position, place in enumerate(self._places):
            if self._takes_over and place is not None and not self._current[position]:
                try:
                    jpegs = read_jpegs(record_path(*place), range(self._index[position].num_frames - 1))
                except VideoError:  # damaged in the file of the shard: computed again
                    self._places[position] = None
                    continue
                self._writer.put(self._names[position], jpegs, open_records(place.file).origin(place.name))
        return self

    def __exit__(self, *raised: object) -> None:
        self._writer.__exit__(*raised)


class _Place(NamedTuple):
    file: Path  # LMDB
    name: str  # name of the record


def encode_jpegs(levels: np.ndarray) -> list[bytes]:
    """Returns uint8 [N - 1, 2, H, W] as JPEGs of (u, v, 128)."""
    fields, _, height, width = levels.shape
    picture = np.full((height, width, 3), 128, np.uint8)
    jpegs = []
    for field in levels:
        picture[..., :2] = field.transpose(1, 2, 0)
        jpegs.append(simplejpeg.encode_jpeg(picture, 100, "BGR", "444"))
    return jpegs


def _look(index: Index, folder: Path, out: Path) -> tuple[list[str], list[_Place | None]]:
    """Returns the name of every video's record, and where its flow is if complete and computed from the current version
    of the video."""
    files = [(file, open_records(file)) for file in [out, *_shards(out)] if file.exists()]
    lengths = {file: records.num_frames() for file, records in files}
    names, own, places = record_names(index, folder), {place_of(video.path) for video in index}, []
    for position, video in enumerate(index):
        held = [(file, records) for file, records in files if names[position] in lengths[file]]
        origins = [Origin.parse(records.origin(names[position])) for _, records in held]
        if any(origin is not None and origin.is_foreign(video.path, own) for origin in origins):
            # Two indexes share OUT, and the record belongs to a video of the other one: it is kept.
            folder, name = video.path.parent.name, video.path.name
            names[position] = utf8_name(f"{folder}/{distinct_name(name, os.path.abspath(video.path), '')}")
            held = [(file, records) for file, records in files if names[position] in lengths[file]]
        name = names[position]
        current = (_Place(f, name) for f, records in held if _is_current(video, lengths[f][name], records.origin(name)))
        places.append(next(current, None))
    return names, places


def _shards(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f"{glob.escape(out.stem)}.*-of-*{out.suffix}"))


def _is_current(video: Video, fields: int, origin: str | None) -> bool:
    said = Origin.parse(origin)
    return fields == video.num_frames - 1 and (said is None or said.describes(video.path))
