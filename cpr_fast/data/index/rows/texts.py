"""A column of many strings in little memory: in compressed parts, of which one is unpacked when a string is asked for.

A million paths of members of tar files, with sources and paths of flow, take 100 MB as they are, and 14 MB in parts,
because neighbours differ in a few digits. To unpack a part takes 20 microseconds.

Letters: N strings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

PART = 512  # strings that are compressed together
CODEC = "zstd"


class _Unpacked(NamedTuple):
    """The strings of a part: its number, their bytes in UTF-8, and where each begins and ends in them, int32."""

    number: int
    data: bytes
    ends: np.ndarray

    def at(self, place: int) -> str:
        """Returns one string."""
        return self.data[self.ends[place] : self.ends[place + 1]].decode()


class Texts(Sequence[str]):
    """Strings that do not change; safe to use from several threads. It needs pyarrow."""

    def __init__(self, packed: bytes, places: np.ndarray, count: int, rows: np.ndarray | None = None) -> None:
        """Takes what `of` makes of `count` strings: parts, of which number p begins at `places[p, 0]` and is
        `places[p, 1]` bytes long when it is unpacked. `rows` is which of the strings each place holds, int32 [N]; None
        for all in their order."""
        self._packed, self._places, self._count, self._rows = packed, places, count, rows
        self._last = _Unpacked(-1, b"", np.zeros(1, np.int32))  # neighbours are asked for one after the other

    @classmethod
    def of(cls, values: Any) -> Texts:
        """Returns the strings of a chunked array of pyarrow, which has no null."""
        import pyarrow as pa

        codec, packed, places = pa.Codec(CODEC), bytearray(), []
        for begin in range(0, len(values), PART):
            ends, data = _buffers(values.slice(begin, PART).combine_chunks())
            plain = ends.tobytes() + data
            places.append((len(packed), len(plain)))
            packed += codec.compress(plain, asbytes=True)
        return cls(bytes(packed), np.array([*places, (len(packed), 0)]), len(values))

    def __len__(self) -> int:
        return self._count if self._rows is None else len(self._rows)

    def __getitem__(self, position: int) -> str:
        number, place = divmod(position if self._rows is None else int(self._rows[position]), PART)
        part = self._last
        if part.number != number:
            part = self._last = self._unpacked(number)
        return part.at(place)

    def __iter__(self) -> Iterator[str]:
        return (self[position] for position in range(len(self)))

    def taken(self, positions: np.ndarray) -> Texts:
        """Returns the strings at these positions, in the same memory."""
        rows = positions if self._rows is None else self._rows[positions]
        return Texts(self._packed, self._places, self._count, rows.astype(np.int32))

    def arrow(self) -> Any:
        """Returns all strings as an array of pyarrow, not compressed."""
        import pyarrow as pa

        parts = list(map(self._unpacked, range(len(self._places) - 1)))
        ends = np.zeros(self._count + 1, np.int32)
        np.cumsum(np.concatenate([np.diff(part.ends) for part in parts]), out=ends[1:])
        buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(part.data for part in parts))]
        values = pa.Array.from_buffers(pa.string(), self._count, buffers)
        return values if self._rows is None else values.take(pa.array(self._rows))

    def _unpacked(self, number: int) -> _Unpacked:
        import pyarrow as pa

        (begin, size), (end, _) = self._places[number : number + 2].tolist()
        plain = pa.Codec(CODEC).decompress(self._packed[begin:end], decompressed_size=size, asbytes=True)
        ends = np.frombuffer(plain, np.int32, min(PART, self._count - number * PART) + 1)
        return _Unpacked(number, plain[ends.nbytes :], ends)


def _buffers(values: Any) -> tuple[np.ndarray, bytes]:
    """Returns where each string of an array of pyarrow begins and ends, int32 [N + 1] from 0 on, and their bytes."""
    _, offsets, data = values.buffers()
    ends = np.frombuffer(offsets, np.int32)[values.offset : values.offset + len(values) + 1]
    return ends - ends[0], b"" if data is None else data[int(ends[0]) : int(ends[-1])].to_pybytes()
