"""Reads videos from JPEG records in LMDB files, as CoCLR and CPR publish them; decodes only the frames that are
requested.

The path of such a video is FILE.lmdb#CLASS/VIDEO: the LMDB file (or folder), "#", and the video's name in it. Keys:

    __order__   msgpack list of the names "Class/video"
    %09d        the video at that position of __order__: msgpack list of its frames as JPEG, in order
    __keys__    msgpack list of those keys, in the order they were written
    __len__     number of videos
    __vlen__    number of frames of each video, aligned with __keys__; absent in some published files

msgpack before 1.0 stored bytes and text in the same way, as "raw"; both encodings are read. A frame of flow is a
picture (u, v, 128) in the channel order of OpenCV, which is (128, v, u) in RGB order.

Letters: F frames, H x W pixels.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path

import lmdb
import msgpack
import numpy as np
import simplejpeg

from cpr_fast._host import msgpack_spans
from cpr_fast.data.storage.pages import require_intact
from cpr_fast.data.video.container import VideoError, fewer_than_listed, not_as_listed
from cpr_fast.data.video.pixels import Region
from cpr_fast.errors import InputError
from cpr_fast.wording import counted, not_a_file

MARK = ".lmdb#"
META = (b"__keys__", b"__len__", b"__order__", b"__vlen__")
# Prefix of a video's key; the value identifies what the video was made from. Not part of CoCLR's format.
ORIGIN = b"__origin__"
# Likewise; the value holds the CRC-32 of each JPEG, uint32 [F], because a damaged JPEG may decode to other pixels.
CHECKSUMS = b"__crc32__"


def split_record(path: str | Path) -> tuple[Path, str] | None:
    """Returns (LMDB file, name) of FILE.lmdb#NAME; None for the path of an ordinary file."""
    file, mark, name = str(path).partition(MARK)
    return (Path(file + MARK[:-1]), name) if mark else None


def record_path(file: Path, name: str) -> Path:
    """Returns the path of a record, FILE.lmdb#NAME."""
    return Path(f"{file}#{name}")


def read_jpegs(path: Path, frames: Sequence[int] | np.ndarray) -> list[memoryview]:
    """Returns the JPEG of every frame in `frames`, as slices of the memory-mapped file, without copying. Raises
    VideoError."""
    file, name = split_record(path)
    record, spans = _opened_record(path)
    if int(max(frames)) >= len(spans):
        raise not_as_listed(path, f"the record holds {counted(len(spans), 'frame')}", f"{int(max(frames)) + 1} or more")
    jpegs = [record[offset : offset + size] for offset, size in spans[np.asarray(frames)].tolist()]
    checksums = open_records(file).checksums(name)
    if checksums is not None:
        for frame, jpeg in zip(frames, jpegs, strict=True):
            if len(checksums) < len(spans) or zlib.crc32(jpeg) != checksums[frame]:
                raise VideoError(path, f"frame {int(frame)} is damaged on the disk: its bytes are not those written")
    return jpegs


def require_frames(path: Path, view: str, num_frames: int) -> None:
    """Raises VideoError if a record holds fewer than `num_frames` frames of `view`, or cannot be read."""
    _, spans = _opened_record(path)
    if len(spans) < num_frames:
        raise fewer_than_listed(path, len(spans), num_frames, view)


def _opened_record(path: Path) -> tuple[memoryview, np.ndarray]:
    """Returns a record, which holds a frame or more, and offset and size of each of its JPEGs. Raises VideoError."""
    file, name = split_record(path)
    try:
        record, spans = open_records(file).record(name)
    except (KeyError, ValueError, InputError, lmdb.Error) as error:
        raise VideoError(path, str(error.args[0])) from error
    if not len(spans):
        raise VideoError(path, "the record holds no frame")
    return record, spans


def read_record_frames(
    path: Path, frames: Sequence[int] | np.ndarray, view: str, region: Region | None = None
) -> np.ndarray:
    """Returns decoded frames, equal to those of PIL, or only `region` of each.

    They are uint8 [F, H, W, 3] for view "rgb", [F, H, W, 2] (u, v) for "flow", [F, H, W] for "gray". Raises VideoError
    if a frame is missing, does not decode or has another size than the first or than that of `region`.
    """
    jpegs = read_jpegs(path, frames)
    colours, channels = {"rgb": ("RGB", 3), "flow": ("BGRX", 4), "gray": ("GRAY", 1)}[view]
    buffers: np.ndarray | None = None
    for place, jpeg in enumerate(jpegs):
        try:
            if buffers is None:
                size = simplejpeg.decode_jpeg_header(jpeg)[:2]
                if region is not None:
                    region.check(path, *size, view)
                top, left, bottom, right = (0, 0, *size) if region is None else region.box
                # flow is copied out of a picture that stays in the cache of a CPU
                buffers = _unaligned((1 if view == "flow" else len(jpegs), *size, channels))
                out = buffers[:, top:bottom, left:right]
                if view == "flow":
                    out = np.empty((len(jpegs), *out.shape[1:3], 2), np.uint8)
            picture = simplejpeg.decode_jpeg(jpeg, colours, buffer=buffers[place % len(buffers)])
        except ValueError as error:
            raise VideoError(path, f"frame {int(frames[place])} does not decode: {error}") from error
        if picture.shape != buffers.shape[1:]:
            raise VideoError(path, f"the frame size changes from {buffers.shape[1:3]} to {picture.shape[:2]}")
        if view == "flow":  # the lower half of each pixel (u, v, 128, X), taken as one number
            np.copyto(out[place].view("<u2"), picture[top:bottom, left:right].view("<u4"), casting="unsafe")
    return out[..., 0] if view == "gray" else out


def _unaligned(shape: tuple[int, ...]) -> np.ndarray:
    """Returns a uint8 array for pictures, whose pixels stay in the caches of the CPU when libjpeg-turbo writes them.

    It writes rows that begin at a multiple of 16 bytes (SSE2) or 32 (AVX2) past the caches, and what reads the pixels
    next waits for the memory: 8 % of the time of a clip of flow on a Zen 5 core. These begin 4 bytes behind such a
    multiple.
    """
    size = math.prod(shape)
    memory = np.empty(size + 32, np.uint8)
    begin = (4 - memory.ctypes.data) % 32
    return memory[begin : begin + size].reshape(shape)


def frame_size(path: Path) -> tuple[int, int, int]:
    """Returns (frames, height, width) of a record, from the header of its first JPEG. Raises VideoError."""
    file, name = split_record(path)
    jpeg = read_jpegs(path, [0])[0]
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(jpeg)
    except ValueError as error:
        raise VideoError(path, f"frame 0 is no JPEG: {error}") from error
    return len(open_records(file).record(name)[1]), height, width


class Records:
    """One LMDB file that is open for reading, from any number of threads."""

    def __init__(self, file: Path) -> None:
        data = file / "data.mdb" if file.is_dir() else file
        if not data.is_file():
            state = "is a folder without data.mdb" if file.is_dir() else not_a_file(file)
            raise InputError(f"LMDB {str(file)!r} {state}")
        if not data.stat().st_size:
            raise InputError(f"LMDB {str(file)!r} is empty")
        require_intact(data, "copy it again")
        try:
            # No readahead: clips are scattered over terabytes. No lock: nobody writes, and the disk may be read-only.
            environment = lmdb.open(
                str(file), subdir=file.is_dir(), readonly=True, lock=False, readahead=False, meminit=False
            )
            # One transaction for the life of the process: the buffers that it returns are the mapped file.
            self._get = _shared_get(environment.begin(buffers=True))
            order = self._get(b"__order__")
        except lmdb.Error as error:
            raise InputError(f"LMDB {str(file)!r}: {error}") from error
        if order is None:
            raise InputError(f"LMDB {str(file)!r}: expected the key '__order__' of CoCLR's format, got none")
        try:
            self.names = decoded_names(msgpack.unpackb(order, raw=True))
        except (ValueError, TypeError, AttributeError) as error:  # not msgpack, not a list of names, or not UTF-8
            raise InputError(f"LMDB {str(file)!r}: expected UTF-8 names in the key '__order__', got {error}") from error
        places = {name: place for place, name in enumerate(self.names)}
        if len(places) < len(self.names):  # equal names would all lead to the last record of that name
            twice = next(name for place, name in enumerate(self.names) if places[name] != place)
            raise InputError(
                f"LMDB {str(file)!r}: expected different names in the key '__order__', got {twice!r} twice"
            )
        # record(name) returns the mapped record and, as uint32 [F, 2], offset and size of each JPEG in it. They are
        # remembered: 2.4 kB for 300 frames, 160 MB when the cache is full. The cache does not refer to self: LMDB can
        # open a file only once in a process, so an unused object must be freed at once.
        self.record = lru_cache(maxsize=2**16)(partial(_record, self._get, places))
        self._places, self._file = places, str(file)

    def origin(self, name: str) -> str | None:
        """Returns the origin of a video that was passed to `RecordWriter.put`, or None."""
        value = self._get(ORIGIN + b"%09d" % self._places[name])
        return None if value is None else bytes(value).decode(errors="replace")  # damaged bytes are no origin

    def checksums(self, name: str) -> np.ndarray | None:
        """Returns the CRC-32 of every JPEG of a video, uint32 [F] and zeros, or None if the file holds none."""
        value = self._get(CHECKSUMS + b"%09d" % self._places[name])
        return None if value is None else np.frombuffer(value, "<u4", len(value) // 4)

    def num_frames(self) -> dict[str, int]:
        """Returns the number of frames of every video by name."""
        try:
            return record_lengths(self._get, self.names)
        except (ValueError, TypeError, LookupError) as error:
            raise InputError(
                f"LMDB {self._file}: the keys '__keys__', '__vlen__' or a record are damaged: {error}"
            ) from error


def _shared_get(transaction: lmdb.Transaction) -> Callable[[bytes], memoryview | None]:
    """Returns `get` of a transaction, for use by any number of threads."""
    lock = threading.Lock()

    def get(key: bytes) -> memoryview | None:
        with lock:
            return transaction.get(key)

    return get


def _record(
    get: Callable[[bytes], memoryview | None], places: dict[str, int], name: str
) -> tuple[memoryview, np.ndarray]:
    if name not in places:
        raise KeyError(f"the LMDB file has no video {name!r}")
    record = get(b"%09d" % places[name])
    if record is None:
        raise KeyError(f"the LMDB file lists {name!r} but has no record of it")
    spans = msgpack_spans(record)
    if len(record) >= 2**32:
        raise ValueError(f"expected a record below 4 GiB, got {len(record)} bytes")
    return record, spans.astype(np.uint32)


_opened: dict[Path, Records] = {}
_opening = threading.Lock()


def open_records(file: Path) -> Records:
    """Returns the file, opened once per process, as LMDB requires. Raises InputError if it is not an LMDB file of
    records."""
    with _opening:
        if file not in _opened:
            resolved = file.resolve()
            _opened[file] = _opened[resolved] = _opened.get(resolved) or Records(resolved)
        return _opened[file]


def forget_records(file: Path) -> None:
    """Makes the next `open_records` open a file again, because it was replaced."""
    with _opening:
        for path in [path for path in _opened if path.resolve() == file.resolve()]:
            del _opened[path]


def record_lengths(get: Callable[[bytes], memoryview | None], names: Sequence[str]) -> dict[str, int]:
    """Returns the number of frames of every video that has a record; `get` reads a key.

    They come from __vlen__ if the file has it, else from the headers of the records.
    """
    keys, lengths = get(b"__keys__"), get(b"__vlen__")
    if keys is not None and lengths is not None:
        keys, lengths = (msgpack.unpackb(value, raw=True) for value in (keys, lengths))
        return {names[int(key)]: length for key, length in zip(keys, lengths, strict=True)}
    records = ((name, get(b"%09d" % place)) for place, name in enumerate(names))
    return {name: len(msgpack_spans(record)) for name, record in records if record is not None}


def decoded_names(names: object) -> list[str]:
    """Returns the names of the key __order__ as text, decoded from either msgpack encoding. Raises TypeError for what
    is not a list of names, UnicodeDecodeError for names that are not UTF-8."""
    if not isinstance(names, list):
        raise TypeError(f"{type(names).__name__} instead of a list")
    for name in names:
        if not isinstance(name, bytes | str):
            raise TypeError(f"{type(name).__name__} instead of a name")
    return [name.decode() if isinstance(name, bytes) else name for name in names]
