"""Finds the videos below a folder, or in an LMDB file, and looks them up by class and name."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from cpr_fast.data.files.names import is_remote
from cpr_fast.data.files.remote import remote_files
from cpr_fast.data.storage.records import MARK, open_records, record_path, split_record
from cpr_fast.runtime.files import TEMPORARY

VIDEO_SUFFIXES = frozenset((
    ".264", ".265", ".3g2", ".3gp", ".asf", ".avi", ".divx", ".dv", ".f4v", ".flv", ".gxf", ".h264", ".h265", ".hevc",
    ".ismv", ".ivf", ".m1v", ".m2ts", ".m2v", ".m4v", ".mj2", ".mjpeg", ".mjpg", ".mk3d", ".mkv", ".mov", ".mp4",
    ".mpe", ".mpeg", ".mpg", ".mpv", ".mts", ".mxf", ".nut", ".obu", ".ogm", ".ogv", ".qt", ".rm", ".rmvb", ".ts",
    ".vob", ".webm", ".wmv", ".wtv", ".y4m",
))  # fmt: skip
# These files are not opened to check whether they hold a video: data sets may have millions of them.
OTHER_SUFFIXES = frozenset((
    ".apng", ".avif", ".bmp", ".csv", ".db", ".gif", ".gz", ".heic", ".ini", ".jpeg", ".jpg", ".json", ".jsonl",
    ".lmdb", ".md", ".mp3", ".npy", ".npz", ".pdf", ".pickle", ".pkl", ".png", ".pt", ".py", ".srt", ".tar", ".tif",
    ".tiff", ".toml", ".txt", ".vtt", ".wav", ".webp", ".xml", ".yaml", ".yml", ".zip",
))  # fmt: skip
UNFINISHED_SUFFIXES = frozenset({".crdownload", ".download", ".part", ".partial", ".tmp"})
# Folders in which file managers and file systems keep copies, previews and lost files.
SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "lost+found"})


class Problem(NamedTuple):
    """A problem with a file or folder, as the report of an index lists it; `cpr_fast.data.index.summary.KINDS` lists
    the kinds."""

    path: Path
    kind: str
    reason: str


class Catalogue:
    """The videos below `root`, sorted by path.

    Attributes:
        paths: The videos: files with the suffix of a video, and other files whose first bytes are those of a video.
        problems: Files and folders that were skipped although they may hold videos.
        others: Number of other files by suffix.
    """

    def __init__(self, root: Path, exclude: Path | None = None) -> None:
        """Follows symbolic links to folders. `exclude` is a folder that is skipped."""
        self.root, self.problems, self.others = root, [], Counter()
        self._exclude = None if exclude is None else exclude.resolve()
        if root.suffix == ".lmdb":
            self.paths = [record_path(root, name) for name in sorted(open_records(root).names)]
        else:
            self.paths = self._remote() if is_remote(root) else sorted(self._visit(root, ()))
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        self._folded: dict[str, list[Path]] = defaultdict(list)
        for path in self.paths:
            name = path.name if root.suffix == ".lmdb" else path.stem
            self._by_name[name].append(path)
            self._folded[_folded(name)].append(path)

    def folders(self, path: Path) -> tuple[str, ...]:
        """Returns the names of the folders between the root and a video; for a record, the folders in its name."""
        record = split_record(path) if self.root.suffix == ".lmdb" else None
        return tuple(record[1].split("/")[:-1]) if record else path.relative_to(self.root).parts[:-1]

    def find(self, label: str, file: str, split: str, classes: Collection[str], *, fold: bool = True) -> list[Path]:
        """Returns the videos that a list may mean by `file` (its suffix does not matter) of a class, the best first.

        Videos in a folder of that class are preferred; those in the folder of another of the `classes` are never
        taken, because equal names in two classes denote different videos. Among equals the folder of the split and the
        listed suffix decide. With `fold` names may differ in case, as v_HandStandPushups_* in UCF101's folder
        HandstandPushups, and in how Unicode composes letters, as macOS stores them.
        """
        name = without_suffix(file)
        found = self._by_name.get(name) or (self._folded.get(_folded(name), []) if fold else [])
        others = {plain(other) for other in classes} - {plain(label)}
        own = [path for path in found if plain(label) in map(plain, self.folders(path))]
        found = own or [path for path in found if not others & set(map(plain, self.folders(path)))]
        return sorted(found, key=lambda path: (split not in self.folders(path), path.name != file, path))

    def _remote(self) -> list[Path]:
        """Returns the videos below a prefix of a server; objects are videos by their suffixes."""
        found = remote_files(self.root)
        videos = [path for path in found if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".")]
        self.others.update(path.suffix.lower() or path.name for path in set(found) - set(videos))
        return videos

    def _visit(self, folder: Path, ancestors: tuple[tuple[int, int], ...]) -> list[Path]:
        """Returns the videos below a folder; `ancestors` are the identities of its parent folders."""
        try:
            facts = os.stat(folder)
            with os.scandir(folder) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self.problems.append(Problem(folder, "unreadable_folder", error.strerror or str(error)))
            return []
        here = (facts.st_dev, facts.st_ino)
        if here in ancestors:
            self.problems.append(Problem(folder, "link_loop", "is a symbolic link to a folder that contains it"))
            return []
        before = len(self.problems)
        found = [path for entry in entries for path in self._entry(folder / entry.name, entry, (*ancestors, here))]
        if not found and ancestors and not any(p.kind != "empty_folder" for p in self.problems[before:]):
            del self.problems[before:]  # one line for a folder whose subfolders are empty as well
            self.problems.append(Problem(folder, "empty_folder", "holds no video"))
        return found

    def _entry(self, path: Path, entry: os.DirEntry, ancestors: tuple[tuple[int, int], ...]) -> list[Path]:
        if os.path.isdir(path):  # DirEntry.is_dir raises for links in a circle, or into a folder without permission
            if entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS:
                self.problems.append(Problem(path, "hidden", "is a hidden or system folder"))
                return []
            if self._exclude is not None and path.resolve() == self._exclude:
                return []
            return self._visit(path, ancestors)
        return [path] if self._is_video(path, entry) else []

    def _is_video(self, path: Path, entry: os.DirEntry) -> bool:
        suffix = path.suffix.lower()
        if entry.name.startswith(TEMPORARY) or entry.name.startswith(".") and suffix == ".lock":
            return False  # of this command or of `cpr-fast flow`
        if entry.name.endswith(".flow.mp4"):  # written by `cpr-fast flow`
            self.others[".flow.mp4"] += 1
            return False
        if suffix not in VIDEO_SUFFIXES and not self._looks_like_one(path, suffix, entry):
            return False
        problem = None
        if entry.name.startswith("."):
            problem = ("hidden", "is a hidden file")
        elif not os.path.isfile(path):
            problem = ("missing", _broken_link(path) if entry.is_symlink() else "is not a file")
        elif any("\ud800" <= sign <= "\udfff" for sign in str(path.relative_to(self.root))):
            problem = ("unreadable_name", "its name is not UTF-8; rename it (for example with convmv)")
        elif MARK in str(path):
            problem = ("unreadable_name", f"{MARK!r} in a path stands for a record of an LMDB file; rename it")
        if problem is not None:
            self.problems.append(Problem(path, *problem))
        return problem is None

    def _looks_like_one(self, path: Path, suffix: str, entry: os.DirEntry) -> bool:
        """Returns whether a file with another suffix begins like a video."""
        if suffix in UNFINISHED_SUFFIXES and Path(path.stem).suffix.lower() in VIDEO_SUFFIXES:
            self.problems.append(Problem(path, "unfinished", "is an unfinished download or copy"))
            return False
        known = suffix in OTHER_SUFFIXES or entry.name.startswith(".") or not os.path.isfile(path)
        if not known and _begins_as_video(path):
            return True
        self.others[suffix or entry.name] += 1
        return False


def walked(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yields what `os.walk` does, through symbolic links too, except those to a folder that contains them."""
    for place, folders, names in os.walk(root, followlinks=True):
        folder = Path(place)
        above = [folder, *folder.parents][: len(folder.relative_to(root).parts) + 1]
        folders[:] = [
            name for name in folders
            if not (folder / name).is_symlink() or not any(os.path.samefile(folder / name, other) for other in above)
        ]  # fmt: skip
        yield folder, folders, names


def without_suffix(file: str) -> str:
    """Returns a video's file name without its suffix; other dots belong to the name."""
    return Path(file).stem if Path(file).suffix.lower() in VIDEO_SUFFIXES else file


def _broken_link(path: Path) -> str:
    """Returns why a symbolic link leads to no file."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return "is a symbolic link to a file that does not exist"
    except OSError as error:  # links in a circle, or a folder without permission
        return f"is a symbolic link that cannot be followed: {error.strerror}"
    return "is not a file"


def _begins_as_video(path: Path) -> bool:
    """Returns whether the first bytes are those of one of the containers below, MP4, AVI or MPEG-TS."""
    try:
        with path.open("rb") as file:
            head = file.read(377)
    except OSError:
        return False
    magic = (
        b"\x1a\x45\xdf\xa3",
        b"FLV\x01",
        b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",
        b".RMF",
        b"YUV4MPEG2 ",
        b"DKIF",
        b"\0\0\1\xba",
        b"\0\0\1\xb3",
    )
    return (
        head.startswith(magic)
        or head[4:8] in (b"ftyp", b"moov", b"mdat")
        or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
        or (len(head) == 377 and head[0] == head[188] == head[376] == 0x47)
    )


def plain(name: str) -> str:
    """Returns a class name in a normal form for comparison with folder names: case, blanks, hyphens and underscores are
    ignored."""
    return re.sub(r"[\s_\-()]+", "", _folded(name))


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).lower()
