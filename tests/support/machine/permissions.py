"""The permissions of an ordinary user, for tests that run as root."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VERSION = 0x20080522  # of the two system calls, capget(2)
OVERRIDES = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: root may read and write every file


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Within the block the permissions of files apply to this thread and those it starts, even if it is root's."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (
        (ctypes.c_uint32 * 2)(VERSION, 0),
        (ctypes.c_uint32 * 6)(),
    )  # effective, permitted, inheritable, twice
    assert libc.capget(header, data) == 0
    before = data[0]
    data[0] = before & ~OVERRIDES
    assert libc.capset(header, data) == 0
    try:
        yield
    finally:
        data[0] = before
        assert libc.capset(header, data) == 0


@contextmanager
def without_permission(*paths: Path, mode: int = 0) -> Iterator[None]:
    """Within the block files and folders have this mode, and it applies to this process."""
    before = [path.stat().st_mode & 0o7777 for path in paths]
    for path in reversed(paths):
        path.chmod(mode)
    try:
        with ordinary_user():
            yield
    finally:
        for path, old in zip(paths, before, strict=True):
            path.chmod(old)
