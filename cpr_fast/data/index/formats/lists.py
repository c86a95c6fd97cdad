"""Lists the videos that a text file names, one a line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cpr_fast.data.files.names import is_frames, is_remote, is_tar, path_of, plain_name
from cpr_fast.data.index.catalogue import Problem, without_suffix
from cpr_fast.data.index.formats.frames import frames_in
from cpr_fast.data.index.formats.shards import of_shards
from cpr_fast.data.index.listing import Listed, Listing, clip_source, short_place, split_in
from cpr_fast.data.index.tables import read_lines, require_utf8
from cpr_fast.data.storage.media import why_missing
from cpr_fast.errors import InputError


class Line(NamedTuple):
    """A line of a list."""

    where: str  # "file:line"
    path: Path
    flow: Path | None  # beside extracted frames
    name: str  # as it is listed, without the query of a URL
    label: str  # "" if the line names none
    split: str


def list_lines(root: Path) -> Listing:
    """Lists the videos of text files with one path or URL a line, or a path, blanks, a comma or a tab, and a class.

    Paths are relative to the folder of the list. A line that names a tar file stands for the videos in it. A list whose
    name has the word train, test or val is that split. Lines that begin with `#` are left out.

    Args:
        root: The list, or a folder of lists (.txt).
    Raises:
        InputError: no list names a video, or a line is not as expected.
    """
    files = sorted(root.glob("*.txt")) if root.is_dir() else [root]
    lines = [line for file in files for line in read_list(file)]
    if not lines:
        raise InputError(f"ROOT: expected a list that names videos (.txt), one a line, got none in {str(root)!r}")
    shards = [line.path for line in lines if is_tar(line.path)]
    packed = of_shards(shards, root) if shards else Listing([], [], [])
    videos, problems = list(packed.videos), list(packed.problems)
    for line in lines:
        if is_tar(line.path):
            continue
        if reason := why_missing(line.path):
            problems.append(Problem(line.path, "missing", f"listed in {short_place(line.where)}, {reason}"))
            continue
        videos.append(Listed(line.path, line.label, _source(line), line.split, line.flow))
    labels = _ordered({item.label for item in videos} - {""})
    levels = "the class is that of the list" if labels else "the list names no class"
    return Listing(videos, labels, problems, levels, packed.others)


def read_list(file: Path) -> Iterator[Line]:
    """Yields the lines of a list. Raises InputError."""
    split = split_in(file.stem)
    for where, text in read_lines(file, "list of videos"):
        if text.startswith("#"):
            continue
        require_utf8(where, text)
        name, path, label = _divided(where, text, file.parent)
        yield Line(where, *_frames_of(path), name, label, split)


def _divided(where: str, text: str, folder: Path) -> tuple[str, Path, str]:
    """Returns the name, the path and the class of a line. As a path may hold blanks, the longest part that is a file is
    taken."""
    if is_remote(text):
        url, _, label = text.partition(" ")
        try:
            return plain_name(url), path_of(url), label.strip()
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    if (found := re.fullmatch(r"(.+?)[ \t]+\d+[ \t]+(\S+)", text)) and (folder / found[1]).is_dir():
        return found[1], folder / found[1], found[2]  # of MMAction2 and TSN: folder, frames, class
    text = text.strip('"')
    if not why_missing(folder / text) or (folder / text).is_dir():
        return text, folder / text, ""
    for sign in ("\t", ",", " "):
        head, found, label = text.rpartition(sign)
        head = head.strip().strip('"')
        if found and not why_missing(folder / head):
            return head, folder / head, label.strip()
    return text, folder / text, ""


def _frames_of(path: Path) -> tuple[Path, Path | None]:
    """Returns the extracted frames that a path names by their template or their folder, and the flow beside them; any
    other path as it is."""
    if is_frames(path):
        return path, frames_in(path.parent)[1]
    frames, flow = frames_in(path) if path.is_dir() else (None, None)
    return frames or path, flow


def _source(line: Line) -> str:
    """Returns the source that the name of a file states, as in UCF101, HMDB51 and Kinetics; else its whole path."""
    name = without_suffix(line.name.rpartition("/")[2])
    source = clip_source(line.label, name)
    return line.name if source == "/".join(filter(None, (line.label, name))) else source


def _ordered(labels: set[str]) -> list[str]:
    """Returns classes sorted by name, or by number if all are numbers."""
    return sorted(labels, key=int) if all(label.isdecimal() for label in labels) else sorted(labels)
