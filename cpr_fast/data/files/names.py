"""The paths of an index: which of them are files, members of a tar file, extracted frames, or objects on a server.

    videos/a.mp4                                  a local file
    shard.tar#1536+88211/clips/a.mp4              88,211 bytes at byte 1,536 of a tar file: its member clips/a.mp4
    clips/a/img_%05d.jpg                          the pictures img_00000.jpg or img_00001.jpg, and those that follow
    https://host/videos/a.mp4, s3://bucket/a.mp4  an object that fsspec reads
    s3://bucket/shard.tar#1536+88211/clips/a.mp4  a member of a tar file that is such an object

They are all of type `pathlib.Path`, which writes `s3://` as `s3:/`; `text_of` restores the slash.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from cpr_fast.errors import InputError

_URL = re.compile(r"^([a-z][a-z0-9+.-]+):/+(?=[^/])")  # a name of one letter is not a protocol
_MEMBER = re.compile(r"(.*?\.tar(?:\?[^#]*)?)#(\d+)\+(\d+)/(.+)", re.DOTALL)
_FRAMES = re.compile(r"[^%]*%(?:0\d+)?d\.(?:jpe?g|png)", re.IGNORECASE)


class Member(NamedTuple):
    """A file in a tar file."""

    file: Path  # the tar file
    start: int  # of its first byte in the tar file
    size: int  # bytes
    name: str


def is_remote(path: str | Path) -> bool:
    """Returns whether a path is a URL, and not that of a file or of a member of a file on this machine."""
    return _URL.match(str(path)) is not None


def is_tar(path: str | Path) -> bool:
    """Returns whether the name of a file, or of a URL without its query, is that of a tar file."""
    return plain_name(path).endswith(".tar")


def plain_name(path: str | Path) -> str:
    """Returns a path as text, a URL without its query, which may hold a signature that expires."""
    return text_of(path).partition("?")[0] if is_remote(path) else str(path)


def text_of(path: str | Path) -> str:
    """Returns a path as it is written in an index or a message: a URL with both slashes behind its protocol."""
    return _URL.sub(r"\1://", str(path))


def is_frames(path: str | Path) -> bool:
    """Returns whether a path is that of extracted frames, whose name is a template such as img_%05d.jpg."""
    text = str(path)
    return "%" in text and _FRAMES.fullmatch(text.rpartition("/")[2]) is not None


def plain_path(path: Path) -> Path:
    """Returns a path after which another file can be named: FILE.tar/NAME for a member, HOST/NAME for a URL, without
    its query, and the folder of extracted frames."""
    path = path.parent if is_frames(path) else path
    member = member_of(path)
    plain = plain_name(path) if member is None else f"{plain_name(member.file)}/{member.name}"
    return Path(_URL.sub("", plain))


def path_of(url: str) -> Path:
    """Returns the path of a URL.

    Raises InputError if it would lose a part: two slashes in a row, a part `.`, or a slash at the end.
    """
    path = Path(url)
    if text_of(path) != text_of(url):
        what = "expected a URL without an empty part or a part '.'"
        raise InputError(f"{what}, got {url!r}; write a slash of a name as %2F")
    return path


def member_of(path: str | Path) -> Member | None:
    """Returns the member of a tar file that a path names, or None for any other path."""
    text = str(path)
    if "#" not in text or (found := _MEMBER.fullmatch(text)) is None:
        return None
    return Member(Path(found[1]), int(found[2]), int(found[3]), found[4])


def member_path(member: Member) -> Path:
    """Returns the path of a member of a tar file, FILE.tar#START+SIZE/NAME."""
    return Path(f"{member.file}#{member.start}+{member.size}/{member.name}")
