"""Tells what a file is that no demultiplexer takes for a video, from its bytes."""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import BinaryIO

from cpr_fast.data.files.access import storage_of

_FIRST = 4096  # bytes at the start of a file that are looked at
_KINDS = {b"PK\3\4": "a ZIP archive", b"\x1f\x8b": "a gzip archive", b"\xff\xd8\xff": "a JPEG picture",
          b"\x89PNG": "a PNG picture", b"%PDF": "a PDF document", b"\x89HDF": "an HDF5 file",
          b"\0\5\x16\7": "the macOS metadata of another file (AppleDouble)"}  # fmt: skip
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
_MOST_BOXES = 1000


def what_it_is(path: str | Path) -> str:
    """Returns what a file is that cannot be opened as a video, as the end of a sentence that begins with "it", such as
    "is a text that begins with '<!DOCTYPE html>'"; "" if its bytes do not tell or cannot be read."""
    try:
        with storage_of(path).open(Path(path)) as file:
            return _told(file)
    except OSError:
        return ""


def _told(file: BinaryIO) -> str:
    head = file.read(_FIRST)
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS; `git lfs pull` downloads the video"
    if head and not head.strip(b"\0"):
        return "begins with zero bytes, as an unfinished download or copy"
    if kind := next((kind for magic, kind in _KINDS.items() if head.startswith(magic)), ""):
        return f"is {kind}"
    if head[4:8] in _BOXES:
        return "" if _has_frame_table(file) else "is an MP4 or QuickTime file without its table of frames (moov), as " \
                                                 "after a recording, download or copy that was cut short"  # fmt: skip
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head).strip()  # a character may be cut in two
    except UnicodeDecodeError:
        return ""
    if not text or not all(sign.isprintable() or sign.isspace() for sign in text):
        return ""
    return f"is a text that begins with {text.splitlines()[0][:40]!r}"


def _has_frame_table(file: BinaryIO) -> bool:
    """Returns whether a file of the MP4 family has a box `moov`, or has too many boxes to say."""
    end, place = file.seek(0, os.SEEK_END), 0
    for _ in range(_MOST_BOXES):
        file.seek(place)
        head = file.read(16)
        if len(head) < 8:
            return False
        size, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if kind in (b"moov", b"moof"):
            return True
        if size == 1:  # the size follows in 64 bits
            size = int.from_bytes(head[8:16], "big")
        if size < 8 or place + size >= end:  # 0: up to the end of the file
            return False
        place += size
    return True
