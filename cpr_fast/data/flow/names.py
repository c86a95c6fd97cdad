"""Names of stored flow: one for every video of an index, never shared by two.

A video's flow is stored as CLASS/VIDEO.flow.mp4 or, as CoCLR names its records, "CLASS/VIDEO". Videos that would share
such a name (equal stems in different folders, or names that differ only in suffix or in case, which some file systems
ignore) are named by their whole path with its suffix. If these names still differ only in case, a digest of the path is
added.
"""

from __future__ import annotations

import os
import re
import shlex
import unicodedata
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from cpr_fast.data.files.names import is_remote, plain_path, text_of
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.storage.records import split_record
from cpr_fast.errors import InputError

SUFFIX = ".flow.mp4"
LONGEST_NAME = 255  # bytes of a file name on common file systems


def file_names(index: Index, folder: Path) -> list[Path]:
    """Returns the path of every video's flow file below OUT: the path of the video relative to `folder`, the folder of
    the index."""
    choices = []
    for video in index:
        whole, below = _below(video, folder)
        names = [f"{below.stem}{SUFFIX}", f"{below.name}{SUFFIX}", distinct_name(below.name, whole, SUFFIX)]
        short = [name for name in names if len(os.fsencode(name)) <= LONGEST_NAME]
        choices.append([str(below.with_name(name)) for name in short])
    return [Path(name) for name in _without_sharing(choices)]


def record_names(index: Index, folder: Path) -> list[str]:
    """Returns the name of every video's flow record: the last two parts of its path or, if the video is itself a
    record, the name of that record."""
    choices = []
    for video in index:
        record = split_record(video.path)
        whole, below = _below(video, folder)
        path = plain_path(video.path)
        plain = f"{path.parent.name}/{path.stem}" if record is None else record[1]
        names = [plain, below.as_posix(), distinct_name(below.as_posix(), whole, "")]
        choices.append([utf8_name(name) for name in names])
    return _without_sharing(choices)


def flow_command(index_csv: Path, index: Index) -> str:
    """Returns the `cpr-fast flow` command that computes the flow that videos of an index lack, into the folder or LMDB
    file that holds the flow of the others."""
    command = f"cpr-fast flow {shlex.quote(str(index_csv))}"
    for video, name in zip(index, file_names(index, index_csv.parent), strict=True):
        if video.flow_path is None:
            continue
        if (record := split_record(video.flow_path)) is not None:
            whole = re.sub(r"\.\d+-of-\d+(?=\.lmdb$)", "", str(record[0]))  # of the file of a shard
            return f"{command} --out {shlex.quote(os.path.normpath(whole))} --storage lmdb"
        if video.flow_path.parts[-len(name.parts) :] == name.parts:
            out = Path(*video.flow_path.parts[: -len(name.parts)])
            return f"{command} --out {shlex.quote(os.path.normpath(out))}"
    return f"{command} --out flow"


def require_place(out: Path, storage: str) -> None:
    """Raises InputError if flow cannot be stored in `out`: "video" needs a folder, "lmdb" the name of an LMDB file."""
    if storage == "video" and out.exists() and not out.is_dir():
        raise InputError(f"--out: expected a folder for the flow files, got the file {str(out)!r}")
    if storage == "lmdb" and (out.suffix != ".lmdb" or out.is_dir()):
        raise InputError(f"--out: expected the name of a file that ends in .lmdb, got {str(out)!r}")


def utf8_name(text: str) -> str:
    """Returns a name as it is stored in an LMDB file: in UTF-8, with escapes for bytes of a path that are not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _below(video: Video, folder: Path) -> tuple[str, Path]:
    """Returns the path of a video relative to the folder of the index, or its URL, which no other video has, and a path
    after which its flow is named, without leading `..`."""
    whole, plain = text_of(video.path), plain_path(video.path)
    if not is_remote(video.path):
        whole, plain = os.path.relpath(video.path, folder), Path(os.path.relpath(plain, folder))
    return whole, Path(*(part for part in plain.parts if part != ".."))


def distinct_name(name: str, path: str, suffix: str) -> str:
    """Returns the file name, a digest of the path and the suffix, short enough for a file system."""
    digest = blake2b(os.fsencode(path), digest_size=6).hexdigest()
    room = LONGEST_NAME - len(os.fsencode(f".{digest}{suffix}"))
    return f"{os.fsencode(name)[:room].decode(errors='surrogateescape')}.{digest}{suffix}"


def _without_sharing(choices: Sequence[Sequence[str]]) -> list[str]:
    """Returns the first name of every video's choices that no other video has, ignoring letter case and Unicode
    normalisation form; the last choice is always unique."""
    chosen = [0] * len(choices)
    while True:
        names = [choice[place] for choice, place in zip(choices, chosen, strict=True)]
        keys = [unicodedata.normalize("NFC", name).casefold() for name in names]
        count = Counter(keys)
        shared = [i for i, key in enumerate(keys) if count[key] > 1 and chosen[i] + 1 < len(choices[i])]
        if not shared:
            return names
        for i in shared:
            chosen[i] += 1
