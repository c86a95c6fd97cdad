"""Members of tar files, which are read by ranges where the tar file is: on a disk or on a server."""

from __future__ import annotations

import errno
import posixpath
import tarfile
from collections import Counter
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import BinaryIO

from cpr_fast.data.files.local import LOCAL, LocalStorage
from cpr_fast.data.files.names import Member, is_remote, member_of, text_of
from cpr_fast.data.files.ranges import RangeFile
from cpr_fast.data.files.remote import REMOTE, RemoteStorage

BLOCK = 512  # bytes of a header; members begin at multiples of it
REMEMBERED = 2**17  # members that are known to be where their path says
AGAIN = "list the videos again with `cpr-fast index`"


class TarStorage:
    """Members of tar files, FILE.tar#START+SIZE/NAME (see `names`)."""

    def __init__(self) -> None:
        self._found: set[Hashable] = set()  # members whose header was read, with the version of the tar file

    def size(self, path: Path) -> int:
        """Returns the number of bytes of a member. Raises OSError if it is not where the path says."""
        self.version(path)
        return member_of(path).size

    def read_range(self, path: Path, start: int, length: int) -> bytes:
        """Returns the `length` bytes from `start` on, fewer only at the end of the member. Raises OSError."""
        member = member_of(path)
        length = max(0, min(length, member.size - start))
        if (data := self.held_range(path, start, length)) is not None:
            return data
        data = _holder(member.file).read_range(member.file, member.start + start, length)
        if len(data) < length:
            raise _cut_off(member)
        return data

    def held_range(self, path: Path, start: int, length: int) -> bytes | None:
        """Returns the same bytes if a disk cache, behind the header of the member, or the memory of this process holds
        all of them; else None."""
        cache, member = REMOTE.cache, member_of(path)  # another thread may close the cache meanwhile
        if cache is not None and is_remote(path) and (data := cache.read(path, BLOCK + start, length)) is not None:
            return data
        return _holder(member.file).held_range(member.file, member.start + start, length)

    def check(self, path: Path) -> None:
        """Reads the first and the last byte from where the tar file is. Raises OSError."""
        self.version(path)
        member = member_of(path)
        _holder(member.file).check_range(member.file, member.start, member.size)

    def open(self, path: Path) -> BinaryIO:
        """Returns the member as an open file. Raises OSError if it is not where the path says."""
        return RangeFile(self, path)

    def version(self, path: Path) -> Hashable:
        """Returns the version of the tar file, and where the member is in it. Raises OSError if it is not there."""
        member = member_of(path)
        storage = _holder(member.file)
        version = (storage.version(member.file), member.start, member.size)
        if (key := hash((str(path), version))) not in self._found:
            if member.start + member.size > storage.size(member.file):
                raise _cut_off(member)
            block = self.held_range(path, -BLOCK, BLOCK)
            _require_header(member, block or storage.read_range(member.file, member.start - BLOCK, BLOCK))
            if len(self._found) < REMEMBERED:
                self._found.add(key)
        return version


TAR = TarStorage()


def _holder(file: Path) -> LocalStorage | RemoteStorage:
    """Returns the storage of a tar file."""
    return REMOTE if is_remote(file) else LOCAL


def members(file: Path, others: Counter[str] | None = None) -> Iterator[Member]:
    """Yields the files in a tar file, in its order; reads their headers, not their content.

    Of tar files that were appended to one another, the members of all are listed.

    Args:
        others: If given, it counts the members that are links, devices or sparse files, which are not read.
    Raises:
        OSError: the file cannot be read, is no tar file, or is cut off. The members before that were yielded.
    """
    storage = _holder(file)
    size = storage.size(file)
    with storage.open(file) as data:
        place = 0
        while place is not None:
            data.seek(place)
            what = "is no tar file" if not place else "is damaged"
            try:
                with tarfile.open(fileobj=data, mode="r:") as archive:
                    what = "is cut off or damaged"
                    for entry in archive:
                        if entry.isreg() and not entry.issparse():
                            yield Member(file, entry.offset_data, entry.size, _plain(entry.name))
                        elif others is not None and not entry.isdir():
                            others["links and special members"] += 1
                    place = archive.offset
            except tarfile.TarError as error:
                if not size:
                    raise OSError(errno.EIO, "is empty") from error
                raise OSError(errno.EIO, f"{what}: {error}") from error
            place = _next_archive(data, place, size)


def _next_archive(data: BinaryIO, place: int, size: int) -> int | None:
    """Returns where another archive begins behind the end of one, or None. Raises OSError if the end has no mark."""
    data.seek(max(0, place - BLOCK))
    if place < BLOCK or any(data.read(BLOCK)):
        data.seek(place)
        if len(rest := data.read(BLOCK)) < BLOCK or any(rest):
            what = f"is cut off: it ends after {size:,} bytes without the mark of the end of a tar file"
            raise OSError(errno.EIO, what)
    data.seek(place)
    while block := data.read(BLOCK):
        if any(block):
            return place
        place += BLOCK
    return None


def _plain(name: str) -> str:
    """Returns the name of a member without `./` at its start and other parts that a path drops."""
    return posixpath.normpath(f"/{name.lstrip('/')}")[1:]


def _require_header(member: Member, block: bytes) -> None:
    """Raises OSError unless `block` is the header of the member."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        raise _moved(member, "no member begins there") from None
    if header.size != member.size:
        raise _moved(member, f"a member of {header.size:,} bytes is there")
    short = len(member.name) < 100 and member.name.isascii()  # another one may be in a header of its own
    if short and _plain(header.name) != member.name:
        raise _moved(member, f"{header.name!r} is there")


def _moved(member: Member, found: str) -> OSError:
    return OSError(
        errno.EIO,
        f"{text_of(member.file)} has changed since it was listed: expected {member.name!r} of {member.size:,} bytes at "
        f"byte {member.start:,}, but {found}; {AGAIN}",
    )


def _cut_off(member: Member) -> OSError:
    return OSError(
        errno.EIO,
        f"{text_of(member.file)} is cut off: it ends before the last of the {member.size:,} bytes from byte "
        f"{member.start:,} on; copy it again",
    )
