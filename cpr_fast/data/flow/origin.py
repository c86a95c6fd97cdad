"""Identifies the video that a stored flow was computed from.

A complete flow file may still be wrong: the video may have been replaced or re-encoded since, or the flow of another
index that has a video of the same name may have been written to the same folder. Every stored flow therefore carries an
`Origin`, which is compared with the video before the flow is reused. Flow that older versions stored has no `Origin`
and is assumed to be current.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path

from cpr_fast.data.files.access import storage_of
from cpr_fast.data.files.names import is_frames
from cpr_fast.data.files.relative import lexical
from cpr_fast.data.storage.media import state_of
from cpr_fast.data.storage.pictures import count_pictures, read_pictures
from cpr_fast.data.storage.records import open_records, split_record
from cpr_fast.data.video.container import VideoError
from cpr_fast.errors import InputError

SAMPLE_BYTES = 2**16  # read at the start, middle and end of a video; a change of length is detected by the size


@dataclass(frozen=True)
class Origin:
    """The identity of a video: its location and a digest of its content."""

    place: str  # digest of the absolute path; for privacy the path itself is not stored
    size: int  # bytes; of extracted frames the number of pictures
    mtime_ns: int  # modification time; 0 for a record of an LMDB file, which has none
    content: str  # digest of samples of the bytes, or of some pictures

    @classmethod
    def of(cls, path: Path) -> Origin:
        """Returns the identity of a video file, a record or extracted frames. Raises VideoError where it cannot be
        read."""
        record = split_record(path)
        try:
            if record is not None:
                data = open_records(record[0]).record(record[1])[0]
                return cls(
                    place_of(path), len(data), 0, _digest(lambda start: data[start : start + SAMPLE_BYTES], len(data))
                )
            size, changed_ns = _size(path), state_of(path)[1]
            if is_frames(path):
                some = sorted({0, size // 2, size - 1})
                return cls(place_of(path), size, changed_ns, _hashed(read_pictures(path, some)))
            storage = storage_of(path)
            content = _digest(lambda start: storage.read_range(path, start, SAMPLE_BYTES), size)
            return cls(place_of(path), size, changed_ns, content)
        except OSError as error:
            raise VideoError(path, error.strerror or str(error)) from error
        except (KeyError, ValueError, InputError) as error:
            raise VideoError(path, str(error.args[0])) from error

    def describes(self, path: Path) -> bool:
        """Returns whether the video at `path` is unchanged. Its bytes are read only if its modification time
        differs."""
        if split_record(path) is None:
            try:
                size, changed_ns = _size(path), state_of(path)[1]
            except (OSError, VideoError):
                return True  # the video cannot be read now, so its flow is assumed to be current
            if size != self.size or changed_ns == self.mtime_ns:
                return size == self.size
        try:
            now = Origin.of(path)
        except VideoError:
            return True
        return (now.size, now.content) == (self.size, self.content)

    def is_foreign(self, path: Path, places: set[str]) -> bool:
        """Returns whether this video belongs to another index: when its flow was computed, its path was none of the
        `places` of this index, and its content is not that of the video at `path`."""
        return self.place not in places and not self.describes(path)

    def dump(self) -> str:
        """Returns the identity as one line of ASCII."""
        return json.dumps({"cpr_fast_origin": asdict(self)})

    @staticmethod
    def parse(text: str | bytes | None) -> Origin | None:
        """Returns the identity that `dump` wrote, or None for any other text."""
        try:
            return Origin(**json.loads(text)["cpr_fast_origin"])
        except (TypeError, ValueError, KeyError):
            return None


def place_of(path: Path) -> str:
    """Returns a digest of the absolute path, or of the URL."""
    return blake2b(os.fsencode(lexical(path)), digest_size=8).hexdigest()


def _size(path: Path) -> int:
    """Returns the number of bytes of a file, or of pictures of extracted frames. Raises OSError or VideoError."""
    return count_pictures(path)[0] if is_frames(path) else storage_of(path).size(path)


def _digest(sample: Callable[[int], bytes], size: int) -> str:
    starts = sorted({0, max(0, size // 2 - SAMPLE_BYTES // 2), max(0, size - SAMPLE_BYTES)})
    return _hashed(map(sample, starts))


def _hashed(parts: Iterable[bytes]) -> str:
    digest = blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
