"""Objects on HTTP servers and object stores, which fsspec reads by ranges.

Credentials, endpoints and proxies are those of fsspec: environment variables such as FSSPEC_S3_ENDPOINT_URL, the files
of ~/.config/fsspec, and the usual files and variables of each store. A request that fails for a reason that may pass is
made again; every error names the object and says what the server answered.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from cpr_fast.data.files.cached.recent import RecentRanges
from cpr_fast.data.files.names import path_of, text_of
from cpr_fast.data.files.ranges import MOST_BYTES, RangeFile
from cpr_fast.data.files.storage import HeldRanges
from cpr_fast.errors import InputError

PAUSES_S = (0.5, 1.0, 2.0)  # before each further attempt
CONNECT_S, ANSWER_S = 10.0, 30.0  # how long a server may take to accept a connection, and be silent in an answer
WHOLE_S = 300.0  # how long a request of at most MOST_BYTES may take: a server may send a byte now and then
PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers of a server that may be another one a little later
REFUSED = (401, 403)
REMEMBERED = 2**17  # objects whose size and version are kept: about 300 bytes each
NO_RANGES = "the server ignores requests for ranges of bytes, so each clip would read the whole file; copy it here"

T = TypeVar("T")
Version = tuple[int, *tuple[str, ...]]  # of an object: its size, its tag and the times of its last change


class RemoteStorage:
    """The `Storage` of URLs. An object is taken to stay the same while a process reads it."""

    def __init__(self) -> None:
        self._facts: dict[str, Version] = {}  # by URL
        self._recent = RecentRanges()
        self.cache: HeldRanges | None = None  # of this process, while a loader that fetches ahead is open

    def size(self, path: Path) -> int:
        """Returns the number of bytes of an object. Raises OSError."""
        return self.version(path)[0]

    def read_range(self, path: Path, start: int, length: int) -> bytes:
        """Returns the `length` bytes from `start` on, fewer only at the end of the object. Raises OSError."""
        size = self.size(path)
        end = min(start + length, size)
        if start >= end:
            return b""
        cache = self.cache  # another thread may close it meanwhile
        if cache is not None and (data := cache.read(path, start, end - start)) is not None:
            return data

        def fetch(first: int, last: int) -> bytes:
            data = self.fetch_range(path, first, last - first)
            if cache is not None:
                cache.count(fetched_unplanned=len(data))
            return data

        return self._recent.read(str(path), start, end, fetch)

    def held_range(self, path: Path, start: int, length: int) -> bytes | None:
        """Returns the same bytes if a disk cache on this machine, or the memory of this process, holds all of them,
        else None."""
        cache = self.cache
        data = None if cache is None else cache.read(path, start, length)
        return self._recent.held(str(path), start, start + length) if data is None else data

    def fetch_range(self, path: Path, start: int, length: int) -> bytes:
        """Returns `length` bytes, which the object has, from the server. Raises OSError."""
        parts = (
            self._fetch(path, begin, min(begin + MOST_BYTES, start + length))
            for begin in range(start, start + length, MOST_BYTES)
        )
        return b"".join(parts)

    def _fetch(self, path: Path, start: int, end: int) -> bytes:
        """Returns the bytes [start, end) from the server, in one request that is repeated if it fails."""
        size = self.size(path)

        def read(system: Any, url: str) -> bytes:
            if url.startswith("http"):  # `cat_file` would read the whole object from a server that ignores ranges
                with system.open(url, size=size, cache_type="none") as file:
                    file.seek(start)
                    data = file.read(end - start)
            else:
                data = system.cat_file(url, start=start, end=end, **_limit(system))
            if len(data) < end - start:
                raise ConnectionError(f"the server sent {len(data):,} of {end - start:,} bytes")
            return data

        return _repeated(path, read)

    def check(self, path: Path) -> None:
        """Reads the first and the last byte from the server. Raises OSError."""
        self.check_range(path, 0, self.size(path))

    def check_range(self, path: Path, start: int, length: int) -> None:
        """Reads the first and the last of `length` bytes from the server. Raises OSError."""
        if length > 0:
            for place in (start, start + length - 1):
                self.fetch_range(path, place, 1)

    def open(self, path: Path) -> BinaryIO:
        """Returns the object as an open file. Raises OSError."""
        return RangeFile(self, path)

    def version(self, path: Path) -> Version:
        """Returns the size, and the tag and the times of the last change that the server states, "" for those that it
        does not. Raises OSError."""
        url = str(path)
        if (known := self._facts.get(url)) is None:
            facts = _repeated(path, lambda system, url: system.info(url, **_limit(system)))
            if facts.get("type") == "directory":
                raise OSError(errno.EISDIR, "is a folder")
            if facts.get("size") is None or facts.get("partial") is False:
                raise OSError(errno.EIO, NO_RANGES if facts.get("size") else "the server does not state its size")
            marks = [str(facts.get(key, "")) for key in ("ETag", "Last-Modified", "LastModified", "mtime")]
            if not any(marks):  # Azure, WebDAV and others have names of their own
                others = (facts.get(key) for key in ("etag", "last_modified", "modified"))
                marks = [str(mark) for mark in others if mark] or marks
            known = (facts["size"], *marks)
            if len(self._facts) < REMEMBERED:
                self._facts[url] = known
        return known


REMOTE = RemoteStorage()


def file_system(path: Path) -> tuple[Any, str]:
    """Returns the file system of fsspec for a URL, and the name of the object in it. Raises InputError if fsspec, or
    its part for this protocol, is not installed."""
    url = text_of(path)
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url, **_timeouts(url))
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: reading it needs `pip install fsspec aiohttp s3fs`: {error}") from error


def _timeouts(url: str) -> dict[str, Any]:
    """Returns the options that limit how long a request waits for a server, unless the user's own do it."""
    from fsspec.config import conf

    protocol = url.partition(":")[0]
    if protocol in ("http", "https") and "client_kwargs" not in conf.get(protocol, {}):
        from aiohttp import ClientTimeout

        limits = ClientTimeout(total=WHOLE_S, sock_connect=CONNECT_S, sock_read=ANSWER_S)
        return {"client_kwargs": {"timeout": limits}}
    if protocol in ("s3", "s3a") and "config_kwargs" not in conf.get(protocol, {}):
        return {"config_kwargs": {"connect_timeout": CONNECT_S, "read_timeout": ANSWER_S}}
    return {}


def _limit(system: Any) -> dict[str, float]:
    """Returns the argument that limits how long a call of a file system of fsspec takes, if fsspec makes the call in a
    thread of its own, as those of HTTP, S3, GCS and Azure; no other one takes it."""
    return {"timeout": WHOLE_S} if getattr(system, "async_impl", False) else {}


def remote_files(path: Path) -> list[Path]:
    """Returns the objects below a prefix of an object store, sorted. Raises InputError if they cannot be listed."""
    try:
        found = _repeated(path, lambda system, name: [system.unstrip_protocol(name) for name in system.find(name)])
    except OSError as error:
        raise InputError(f"{text_of(path)}: {error.strerror}") from error
    return sorted(path_of(url) for url in found)


def _repeated(path: Path, call: Callable[[Any, str], T]) -> T:
    """Returns call(file system, name), made again after failures that may pass. Raises OSError with a sentence."""
    system, name = file_system(path)
    for pause in (*PAUSES_S, None):
        try:
            return call(system, name)
        except Exception as error:  # each store has its own exceptions
            failure = _explained(error)
            if failure.errno != errno.EAGAIN or pause is None:
                raise failure from error
        time.sleep(pause)
    raise AssertionError("unreachable")


def _explained(error: Exception) -> OSError:
    """Returns the error with a sentence; its number is EAGAIN if the request may succeed later."""
    status = _status(error)
    if status in REFUSED or isinstance(error, PermissionError):
        answer = f" ({status})" if status else ""
        return OSError(errno.EACCES, f"the server refuses it{answer}: has the URL expired, or are credentials missing?")
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error
    if status == 404 or (status is None and isinstance(cause, FileNotFoundError)):
        return OSError(errno.ENOENT, "does not exist on the server")
    if status is not None and status not in PASSING:
        return OSError(errno.EIO, f"the server answered {status}")
    if isinstance(cause, ValueError) and "range requests" in str(cause):
        return OSError(errno.EIO, NO_RANGES)
    said = f"{type(cause).__name__}: {cause}"
    if status:
        said = f"the server answered {status}"
    elif isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__:  # botocore has exceptions of its own
        said = f"no answer in {ANSWER_S:g} s, or no whole one in {WHOLE_S:g} s"
    return OSError(errno.EAGAIN, f"could not be read in {len(PAUSES_S) + 1} attempts; the last: {said}")


def _status(error: BaseException | None) -> int | None:
    """Returns the status of HTTP that an exception, or one that it came from, carries; None if there is none."""
    while error is not None:
        status = getattr(error, "status", None)
        if status is None:
            response = getattr(error, "response", None)  # of botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None
