"""How known data sets lie on disk: which videos there should be, with their class, source and split.

A layout is a function of (root, splits folder, split number); it does not open the videos.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cpr_fast.errors import InputError

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})


class Listed(NamedTuple):
    path: Path
    label: str
    source: str
    split: str


def _list_folders(root: Path, splits: Path | None, split: int) -> tuple[list[Listed], list[tuple[Path, str]]]:
    if splits is not None:
        raise InputError(f"splits: layout 'folders' reads the split from the folders, got {str(splits)!r}")
    listed = []
    for path in _video_files(root):
        parents = path.relative_to(root).parts[:-1]
        if len(parents) not in (1, 2):
            raise InputError(f"{path}: expected ROOT/<class>/<video> or ROOT/<split>/<class>/<video>")
        source = re.sub(r"_c\d+$", "", path.stem)
        listed.append(Listed(path, parents[-1], f"{parents[-1]}/{source}", parents[0] if len(parents) == 2 else ""))
    return sorted(listed, key=lambda item: (item.label, item.split, item.path)), []


def _list_ucf101(root: Path, splits: Path | None, split: int) -> tuple[list[Listed], list[tuple[Path, str]]]:
    if splits is None:
        raise InputError("splits: layout 'ucf101' needs the folder of classInd.txt and the train and test lists")
    classes = [row[1] for _, row in _list_rows(splits / "classInd.txt", fields=(2,), expected="<number> <class>")]
    files: dict[str, Path] = {}
    for path in _video_files(root):
        files.setdefault(path.stem.lower(), path)  # folder HandstandPushups holds files v_HandStandPushups_*
    listed, absent = [], []
    for name, file in (("train", f"trainlist{split:02d}.txt"), ("test", f"testlist{split:02d}.txt")):
        for where, row in _list_rows(splits / file, fields=(1, 2), expected="<class>/<video> [<number>]"):
            label, _, video = row[0].partition("/")
            if label not in classes:
                raise InputError(f"{where}: class {label!r} is not one of the {len(classes)} in classInd.txt")
            stem = Path(video).stem
            path = files.get(stem.lower())
            if path is None:
                absent.append((root / row[0], f"listed in {file}, not found"))
            else:
                listed.append(Listed(path, label, re.sub(r"_c\d+$", "", stem), name))
    return sorted(listed, key=lambda item: classes.index(item.label)), absent


def _video_files(root: Path) -> list[Path]:
    """All videos below `root` but flow files, sorted."""
    files = (path for path in root.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    return sorted(path for path in files if not path.name.endswith(".flow.mp4"))


def _list_rows(path: Path, fields: Sequence[int], expected: str) -> Iterator[tuple[str, list[str]]]:
    """("file:line", words) of every non-empty line of a split list."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"split list {str(path)!r} does not exist") from None
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if words and len(words) not in fields:
            raise InputError(f"{path}:{number}: expected {expected}, got {line!r}")
        if words:
            yield f"{path}:{number}", words


LAYOUTS: dict[str, Callable[[Path, Path | None, int], tuple[list[Listed], list[tuple[Path, str]]]]] = {
    "folders": _list_folders,
    "ucf101": _list_ucf101,
}
