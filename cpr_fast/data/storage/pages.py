"""Checks the pages of an LMDB file before it is mapped into memory.

LMDB trusts its file. Where a page is missing, as after a copy that was interrupted, or where a damaged page leads out
of the file, the operating system ends the process (SIGBUS) without a message. Only the pages of the trees are read, not
the records: for 240,000 videos about 13,000 pages of 4 KiB, which every epoch reads anyway.

Source of the layout: struct MDB_page, MDB_node, MDB_db and MDB_meta of LMDB 0.9 (mdb.c), for 64 bits, little-endian.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpr_fast.errors import InputError

MAGIC, VERSION = 0xBEEFC0DE, 1
HEADER = 16  # bytes at the start of a page, and of an overflow record
META = np.dtype(
    [
        ("page", "<u8"), ("pad", "<u2"), ("flags", "<u2"), ("size", "<u4"), ("magic", "<u4"), ("version", "<u4"),
        ("address", "<u8"), ("map_size", "<u8"),
        ("trees", [("pad", "<u4"), ("flags", "<u2"), ("depth", "<u2"), ("counts", "<u8", 4), ("root", "<u8")], 2),
        ("last_page", "<u8"), ("transaction", "<u8"),
    ]
)  # fmt: skip
BRANCH, LEAF = 1, 2  # flags of a page
BIG = 1  # flag of a node whose value is in pages of its own
NO_ROOT = 2**64 - 1  # of an empty tree
DEEPEST = 32  # levels that LMDB can follow


class _Damage(Exception):
    """The message says what is wrong with the file."""


class _Pages(NamedTuple):
    """The file of LMDB, whose pages have `size` bytes."""

    descriptor: int
    size: int
    file_bytes: int

    def read(self, number: int) -> np.ndarray:
        """Returns a page, uint8 [size]."""
        data = os.pread(self.descriptor, self.size, number * self.size) if number < 2**40 else b""
        if len(data) < self.size:
            raise _Damage(f"it needs page {number}, which is beyond its end")
        return np.frombuffer(data, np.uint8)


def require_intact(file: Path, advice: str) -> None:
    """Raises InputError if a file of LMDB is truncated or its pages are damaged.

    A page at the end that was freed at once is never written, so a complete file may be shorter than LMDB's header
    says. What is no file of LMDB at all is left to LMDB to refuse.

    Args:
        advice: What to do about it; the end of the error.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # a file system without advice
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        size = os.fstat(descriptor).st_size
        meta = _meta(descriptor)
        if meta is None:
            return
        page_bytes = int(meta["trees"][0]["pad"])
        expected = (int(meta["last_page"]) + 1) * page_bytes
        try:
            seen: set[int] = set()
            for number, tree in enumerate(meta["trees"]):
                _check_tree(_Pages(descriptor, page_bytes, size), tree, seen, ordered=number == 1)
        except _Damage as damage:
            what = f"truncated: expected {expected:,} bytes, got {size:,}" if size < expected else f"damaged: {damage}"
            raise InputError(f"LMDB {str(file)!r} is {what}; {advice}") from None
    finally:
        os.close(descriptor)


def _meta(descriptor: int) -> np.ndarray | None:
    """Returns the newer of the two headers, or None if the file has none that LMDB accepts."""
    found = []
    for number in range(2):
        at = number * int(found[0]["trees"][0]["pad"]) if number else 0
        data = os.pread(descriptor, META.itemsize, at)
        if len(data) < META.itemsize:
            return None
        meta = np.frombuffer(data, META)[0]
        size = int(meta["trees"][0]["pad"])
        if (meta["magic"], meta["version"]) != (MAGIC, VERSION) or size not in (2**n for n in range(8, 17)):
            return None
        found.append(meta)
    return max(found, key=lambda meta: meta["transaction"])  # of equal ones the first, as LMDB


def _check_tree(pages: _Pages, tree: np.ndarray, seen: set[int], *, ordered: bool) -> None:
    """Checks all pages of a tree, level by level and in the order of the file. `seen` receives their numbers."""
    level, depth = [int(tree["root"])], int(tree["depth"])
    if level == [NO_ROOT]:
        return
    if not 0 < depth <= DEEPEST:
        raise _Damage(f"its tree has {depth} levels")
    for height in reversed(range(depth)):
        below: list[int] = []
        for number in sorted(level):
            if number < 2 or number in seen:
                raise _Damage(f"page {number} has two meanings")
            seen.add(number)
            children = _check_page(pages, number, is_leaf=not height, ordered=ordered)
            below += children
        level = below


def _check_page(pages: _Pages, number: int, *, is_leaf: bool, ordered: bool) -> list[int]:
    """Checks that the nodes of a page, and the values of a leaf, are inside the page and the file, and that its keys
    ascend if `ordered`. Returns the pages that the nodes of a branch lead to."""
    page = pages.read(number)
    words = page.view("<u2")
    own, flags, lower, upper = page[:8].view("<u8")[0], words[5], int(words[6]), int(words[7])
    count = (lower - HEADER) // 2
    if own != number or flags != (LEAF if is_leaf else BRANCH) or not HEADER < lower <= upper <= pages.size:
        raise _Damage(f"page {number} is no {'leaf' if is_leaf else 'branch'} of its tree")
    at = words[8 : 8 + count].astype(np.int64)
    if (at % 2).any() or at.min() < upper or at.max() > pages.size - 8:
        raise _Damage(f"a node of page {number} is outside the page")
    low, high, kind, key_bytes = (words[at // 2 + i].astype(np.int64) for i in range(4))
    values, length = at + 8 + key_bytes, low | high << 16
    big = (kind & BIG).astype(bool) if is_leaf else np.zeros(count, bool)
    if (values + (np.where(big, 8, length) if is_leaf else 0)).max() > pages.size:
        raise _Damage(f"a node of page {number} is larger than the page")
    if ordered:
        keys = [bytes(page[a:b]) for a, b in zip((at + 8).tolist(), values.tolist(), strict=True)]
        keys = keys if is_leaf else keys[1:]  # the first key of a branch has no meaning
        if any(a >= b for a, b in zip(keys, keys[1:], strict=False)):
            raise _Damage(f"the keys of page {number} are not in order")
    if not is_leaf:
        return (length | kind << 32).tolist()
    if big.any():
        first = page[values[big, None] + np.arange(8)].view("<u8")[:, 0]
        ends = first.astype(np.float64) * pages.size + HEADER + length[big]  # no overflow; exact below 2**53
        if first.min() < 2 or ends.max() > pages.file_bytes:
            raise _Damage(f"a value of page {number} is outside the file")
    return []
