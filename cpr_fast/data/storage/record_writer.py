"""Writes LMDB files of JPEG records in the format that `records` reads; a file whose writing was interrupted is
continued."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import lmdb
import msgpack
import numpy as np

from cpr_fast.data.storage.pages import require_intact
from cpr_fast.data.storage.records import (
    CHECKSUMS,
    META,
    ORIGIN,
    decoded_names,
    forget_records,
    open_records,
    record_lengths,
    split_record,
)
from cpr_fast.errors import InputError
from cpr_fast.runtime.files import naming, one_writer

BEGIN_AGAIN = "remove it, and the same command begins again"
OUTSIDE = 2040  # bytes from which LMDB keeps a value out of the tree, whose pages are all read when a file is opened
MAP_BYTES = 2**30  # first size of the memory map, which limits the file; it is doubled when it is full


class RecordWriter:
    """Writes FILE.lmdb: call `put` for every video inside a `with` block.

    The file appears under its name when the block ends without an exception. Until then it is FILE.lmdb.part, which a
    later writer continues. If the file exists already, the first `put` makes a copy that is continued, so that readers
    of the file are not affected. `num_frames` holds the frames of every video written so far, by name. Raises
    InputError if the name does not end in .lmdb, if another process is writing the file, or if the disk is full or the
    address space too small: the videos that `put` has written are then kept.
    """

    _WRITTEN = b"~"  # ~%09d holds [name, frames] of a video until the file is complete

    def __init__(self, file: Path) -> None:
        if split_record(f"{file}#") is None or file.is_dir():
            raise InputError(f"expected the name of a file that ends in .lmdb, got {str(file)!r}")
        self._file, self._part, self._copied = file, Path(f"{file}.part"), Path(f"{file}.copy")
        self._lock = one_writer(file.with_name(f".{file.name}.lock"), f"another process is writing {str(file)!r}")
        self._environment: lmdb.Environment | None = None
        self.num_frames: dict[str, int] = {}
        with ExitStack() as stack:
            stack.enter_context(self._lock)
            self._copied.unlink(missing_ok=True)  # of a process that was killed
            if self._part.exists() or not file.exists():
                self._open()
            else:
                records = open_records(file)
                self._number(dict.fromkeys(records.names, 0) | records.num_frames())
            stack.pop_all()  # the lock is held until the end of the `with` block

    def put(self, name: str, jpegs: Sequence[bytes | memoryview], origin: str | None = None) -> None:
        """Adds or replaces a video, which is on the disk when this returns. `jpegs` are its frames in order.

        `origin` is a line of ASCII that identifies what the video was made from. It is stored under a separate key,
        which readers of CoCLR's format ignore; `Records.origin` returns it.
        """
        if self._environment is None:
            self._copy()
            self._open()
        place = self._places.setdefault(name, len(self._places))
        said = {ORIGIN + b"%09d" % place: None if origin is None else origin.encode()}
        said[CHECKSUMS + b"%09d" % place] = (
            np.array([zlib.crc32(jpeg) for jpeg in jpegs], "<u4").tobytes().ljust(OUTSIDE, b"\0")
        )
        self._commit({b"%09d" % place: msgpack.packb(list(jpegs))} | self._note(place, name, len(jpegs)) | said)
        self.num_frames[name] = len(jpegs)

    def origin(self, name: str) -> str | None:
        """Returns the `origin` that `put` received for a video that is written, or None."""
        if self._environment is None:
            return open_records(self._file).origin(name)
        with self._environment.begin() as transaction:
            value = transaction.get(ORIGIN + b"%09d" % self._places[name])
        return None if value is None else value.decode(errors="replace")

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *raised: object) -> None:
        try:
            if self._environment is not None:
                try:
                    if kind is None:
                        self._complete()
                finally:
                    self._environment.close()
                if not self.num_frames and not self._file.exists():
                    self._part.unlink()  # nothing is stored that the same command could continue
                elif kind is None:
                    with naming(self._file, self._kept()):
                        os.replace(self._part, self._file)
                    forget_records(self._file)
        finally:
            self._lock.__exit__(kind, *raised)

    def _open(self) -> None:
        """Opens the unfinished file.

        A complete file is marked as unfinished again. It is either a copy, or a file whose process was killed before it
        could rename it.
        """
        if self._part.exists():
            require_intact(self._part, BEGIN_AGAIN)
        with self._errors_named():
            self._environment = lmdb.open(str(self._part), subdir=False, map_size=MAP_BYTES, lock=False, meminit=False)
        try:
            written, is_complete = self._stored()
        except (ValueError, TypeError, LookupError) as error:
            self._environment.close()
            raise InputError(f"LMDB {str(self._part)!r} is damaged: {error}; {BEGIN_AGAIN}") from error
        self._number(written)
        if is_complete:
            notes = (self._note(place, *item) for place, item in enumerate(written.items()))
            self._commit({key: value for note in notes for key, value in note.items()} | dict.fromkeys(META))

    def _stored(self) -> tuple[dict[str, int], bool]:
        """Returns the number of frames of every video in the unfinished file by name, and whether it is complete."""
        with self._environment.begin(buffers=True) as transaction, transaction.cursor() as cursor:
            rows = cursor.iternext() if cursor.set_range(self._WRITTEN) else ()
            written = dict(msgpack.unpackb(value) for _, value in rows)
            order = transaction.get(b"__order__")
            if order is None:
                return written, False
            names = decoded_names(msgpack.unpackb(order, raw=True))
            return dict.fromkeys(names, 0) | record_lengths(transaction.get, names), True

    def _number(self, num_frames: dict[str, int]) -> None:
        self.num_frames = num_frames  # of every video that is written, by name
        self._places = {name: place for place, name in enumerate(num_frames)}

    def _note(self, place: int, name: str, frames: int) -> dict[bytes, bytes]:
        return {self._WRITTEN + b"%09d" % place: msgpack.packb([name, frames])}

    def _copy(self) -> None:
        try:
            with naming(self._copied, f"{self._file.name!r} is untouched"):
                shutil.copyfile(self._file, self._copied)
                os.replace(self._copied, self._part)
        finally:
            self._copied.unlink(missing_ok=True)

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        """Converts LMDB's errors of the disk and of the memory map, which limits the file, to one sentence."""
        try:
            yield
        except lmdb.Error as error:
            reason = str(error).rpartition(": ")[2]
            raise InputError(f"could not write {str(self._part)!r}: {reason}; {self._kept()}") from error

    def _kept(self) -> str:
        count = len(self.num_frames)
        videos = f"{count} {'video is' if count == 1 else 'videos are'}"
        before = f", {self._file.name!r} is untouched" if self._file.exists() else ""
        return f"{videos} complete in it{before}, and the same command continues after them"

    def _complete(self) -> None:
        keys = [b"%09d" % place for place in range(len(self.num_frames))]
        meta = (keys, len(keys), list(self.num_frames), list(self.num_frames.values()))
        notes = {self._WRITTEN + key: None for key in keys}
        self._commit({key: msgpack.packb(value) for key, value in zip(META, meta, strict=True)} | notes)

    def _commit(self, entries: dict[bytes, bytes | None]) -> None:
        """Writes all entries in one transaction; a value of None deletes its key.

        If they do not fit, the memory map, which limits the size of the file, is doubled.
        """
        with self._errors_named():
            while True:
                try:
                    with self._environment.begin(write=True) as transaction:
                        for key, value in entries.items():
                            transaction.delete(key) if value is None else transaction.put(key, value)
                    return
                except lmdb.MapFullError:
                    self._environment.set_mapsize(2 * self._environment.info()["map_size"])
