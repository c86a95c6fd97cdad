"""The files of a disk cache: slots of one block each, and a record of what every slot holds.

    DIR/process-0/blocks   slot s is the BLOCK bytes from s * BLOCK on
    DIR/process-0/records  what slot s holds, RECORD, from s * RECORD.itemsize on

Each process has a folder of its own, which it locks. A block is written before its record, and the digest in the record
covers the name and the version of the object, the number of the block, and its bytes. Whatever a process left that was
killed in between, or a disk that lost or changed bytes, therefore does not match its record and is fetched again.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpr_fast.data.files.remote import Version
from cpr_fast.errors import InputError

BLOCK = 2**14  # bytes; a clip needs two or three ranges of bytes, each of which is rounded to whole blocks
FAR = 2**16  # blocks, 1 GiB: the memory for the state of an object with a block beyond it is more than 1 MiB
MOST_PROCESSES = 4096  # that share a folder
THIS_PROCESS = os.urandom(16)  # so that no other process has the same keys
RECORD = np.dtype(
    [("object", "V16"), ("version", "V8"), ("block", "<u4"), ("length", "<u4"), ("digest", "V16")]
)  # 48 bytes; `length` 0: the slot is empty


class Key(NamedTuple):
    """Names an object in the state in which it is now."""

    object: bytes  # 16 bytes, digest of its path
    version: bytes  # 8 bytes, digest of its size and of the tag or time that the server states

    @classmethod
    def of(cls, path: str, version: Version) -> Key:
        """Returns the key of an object. With a size alone, which does not tell two versions apart, the key is that of
        this process only."""
        more = b"" if any(version[1:]) else THIS_PROCESS
        return cls(object_key(path), _digest(8, repr(version).encode(), more))


def object_key(path: str) -> bytes:
    """Returns the digest of the path of an object, 16 bytes."""
    return _digest(16, path.encode("utf-8", "surrogateescape"))


def _digest(size: int, *parts: bytes) -> bytes:
    made = blake2b(digest_size=size)
    for part in parts:
        made.update(part)
    return made.digest()


def _block_digest(key: Key, block: int, data: bytes) -> bytes:
    """Returns the digest of a record, 16 bytes."""
    return _digest(16, *key, block.to_bytes(4, "little"), data)


class BlockStore:
    """Slots on a disk; safe to use from several threads, of which one at a time may write a slot."""

    def __init__(self, folder: Path, slots: int) -> None:
        """Locks a folder below `folder` that no other process uses, and reads the records of an earlier process.

        `slots` is how many blocks there may be, and no more than the disk has room for; those of an earlier process
        beyond that are removed. Raises InputError if the files cannot be created.
        """
        try:
            self.folder, self._lock = _locked(folder)
            self._blocks, self._records = (
                os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                for name in ("blocks", "records")
            )
            slots = min(slots, shutil.disk_usage(self.folder).total // BLOCK)
            for file, size in ((self._blocks, BLOCK), (self._records, RECORD.itemsize)):
                if os.fstat(file).st_size > slots * size:
                    os.ftruncate(file, slots * size)
            held = os.pread(self._records, os.fstat(self._records).st_size, 0)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"data.disk_cache: cannot write to {str(folder)!r}: {reason}") from error
        self.records = np.zeros(slots, RECORD)
        earlier = np.frombuffer(held[: len(held) // RECORD.itemsize * RECORD.itemsize], RECORD)
        self.records[: len(earlier)] = np.where(earlier["length"] <= BLOCK, earlier, np.zeros((), RECORD))

    def is_plausible(self, slot: int) -> bool:
        """Returns whether the block number of a used record may be believed: one beyond FAR only if the block is as it
        was written. Otherwise a single bit that has changed would make the cache allocate gigabytes for the blocks
        before it."""
        record = self.records[slot]
        block, key = int(record["block"]), Key(bytes(record["object"]), bytes(record["version"]))
        return block < FAR or self.read(slot, key, block) is not None

    def close(self) -> None:
        """Closes the files and gives up the lock. Further calls have no effect."""
        for descriptor in (self._blocks, self._records, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._blocks = self._records = self._lock = -1

    def write(self, slot: int, key: Key, block: int, data: bytes) -> None:
        """Writes a block and then its record. Raises OSError, after which the slot may hold anything."""
        record = np.zeros((), RECORD)
        record["object"], record["version"] = np.void(key.object), np.void(key.version)
        record["block"], record["length"], record["digest"] = block, len(data), _block_digest(key, block, data)
        self.records[slot]["length"] = 0
        _write(self._blocks, data, slot * BLOCK)
        _write(self._records, record.tobytes(), slot * RECORD.itemsize)
        self.records[slot] = record

    def read(self, slot: int, key: Key, block: int) -> bytes | None:
        """Returns a block, or None if the slot does not hold it as it was written."""
        record = self.records[slot]
        length = int(record["length"])
        if not length:
            return None
        try:
            data = os.pread(self._blocks, length, slot * BLOCK)
        except OSError:  # a failing disk
            return None
        whole = len(data) == length and bytes(record["digest"]) == _block_digest(key, block, data)
        return data if whole else None


def _write(file: int, data: bytes, place: int) -> None:
    """Writes all bytes: near the limit of a disk, a first write may be a short one."""
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], place + done)


def _locked(folder: Path) -> tuple[Path, int]:
    """Returns the first folder `process-N` that no other process has locked, and the descriptor of its lock."""
    for number in itertools.count():
        own = folder / f"process-{number}"
        own.mkdir(parents=True, exist_ok=True)
        lock = os.open(own / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            if number < MOST_PROCESSES:
                continue
            raise
        except OSError:
            os.close(lock)
            raise
        return own, lock
    raise AssertionError("unreachable")
