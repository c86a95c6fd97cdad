"""Reads and writes the index of a data set: a CSV file with one row per video, made by `cpr_fast.data.index.build`.

    path,label,source,split,num_frames,fps,width,height,flow_path

- `path` and `flow_path` are relative to the folder of the CSV file. They may be records of an LMDB file,
  FILE.lmdb#CLASS/VIDEO (see `cpr_fast.data.storage`).
- `label` is the name of the class; empty if unlabelled.
- `source` names the source video that a clip was cut from. Clips of equal `source` are *siblings*.
- `split` is "train", "test" or any other name; empty if there is none. Names of splits that are known (see `SPLITS`)
  are read in any case.
- `num_frames` counts the frames that decode (or, in a very large data set, the packets), not what the header of
  the file claims; `fps` is frames per second; `width` and `height` are pixels.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cpr_fast.config import DataConfig
from cpr_fast.data.files.names import is_remote, path_of
from cpr_fast.data.files.relative import Relative, absolute
from cpr_fast.data.index.catalogue import VIDEO_SUFFIXES
from cpr_fast.data.index.listing import known_split
from cpr_fast.data.index.tables import TableError, read_table, require_utf8, table_text
from cpr_fast.data.storage.copies import originals
from cpr_fast.data.storage.media import exists, why_missing
from cpr_fast.errors import InputError
from cpr_fast.runtime.files import one_writer, replacing
from cpr_fast.wording import counted

COLUMNS = ("path", "label", "source", "split", "num_frames", "fps", "width", "height", "flow_path")
MIN_VIDEOS = 8  # least number of training videos; with fewer, nothing remains to compare a batch with
MIN_SOURCES = 2  # videos of one source are never negatives or positives of each other


log = logging.getLogger(__name__)


def too_few(videos: int, sources: int, split: str, splits: Iterable[str] = ()) -> str:
    """Returns why nothing useful is learnt from this number of training videos and of their sources, or "" if enough is
    there. `split` is the split that they are of; "" where the index has none. `splits` are those of the index, which
    are named if none of their videos is in `split`."""
    if videos >= MIN_VIDEOS and sources >= MIN_SOURCES:
        return ""
    others = ", ".join(map(repr, filter(None, splits)))
    return (
        f"expected at least {MIN_VIDEOS} training videos of at least {MIN_SOURCES} sources, got "
        f"{counted(videos, 'video')} of {counted(sources, 'source')}"
        + (f" in split {split!r}" if split else "")
        + (f"; the splits are {others}" if others and not videos else "")
    )


class IndexFileError(TableError):
    """An index is not as expected; the message states the place, what was found and what was expected."""


class NotAnIndexError(IndexFileError):
    """A file is something else than an index; the message states what it is."""


@dataclass(frozen=True)
class Video:
    """A row of an index, see the docstring of the module; its paths can be opened from the working directory."""

    path: Path
    label: str  # class name; "" where unlabelled
    source: str  # equal for siblings
    split: str
    num_frames: int
    fps: float
    width: int  # pixels
    height: int
    flow_path: Path | None = None

    def shared_frames(self, data: DataConfig | None = None) -> int:
        """Returns the number of frames that all views have: flow has one less than RGB. With `data.flow = "on_the_fly"`
        every video has flow."""
        computed = data is not None and data.flow == "on_the_fly"
        return self.num_frames - (computed or self.flow_path is not None)


class Index(Sequence[Video]):
    """An immutable list of videos; a video's position is its id.

    `classes` are the class names in order of first appearance (which is the official order if the rows are in that
    order); a selection keeps the classes of the index it was taken from, so that labels agree between train and test.
    """

    def __init__(self, videos: Iterable[Video], classes: Sequence[str] | None = None) -> None:
        self._videos = tuple(videos)
        self.classes = list(classes) if classes is not None else _distinct(v.label for v in self._videos if v.label)

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, position: int) -> Video:
        return self._videos[position]

    def __iter__(self) -> Iterator[Video]:
        return iter(self._videos)

    def select(self, split: str) -> Index:
        """Returns the videos of one split, numbered from 0. Raises IndexFileError if the split has none."""
        name = known_split(split)
        chosen = [video for video in self if video.split == name]
        if not chosen and not self.has_splits:
            raise IndexFileError(
                f"split {split!r}: the index has no splits, its column 'split' is empty. Fill it in, or use what needs "
                "none: `retrieve --protocol leave_source_out`, `pretrain --data.split ''`"
            )
        if not chosen:
            splits = ", ".join(map(repr, _distinct(video.split for video in self)))
            raise IndexFileError(f"split {split!r}: the index has no such video; its splits are {splits}")
        return Index(chosen, self.classes)

    def chosen(self, positions: Iterable[int]) -> Index:
        """Returns the videos at these positions, numbered from 0."""
        return Index((self[position] for position in positions), self.classes)

    @property
    def mostly_labelled(self) -> bool:
        """Whether at least half of the videos have a label, of two classes or more: fewer labels judge no network."""
        return 2 * int((self.labels >= 0).sum()) >= len(self) and self.class_count > 1

    def training(self) -> tuple[str, list[Video]]:
        """Returns the split that pretraining reads by default and its videos: "train", or "" where there are no splits,
        which stands for all videos."""
        split = "train" if self.has_splits else ""
        return split, [video for video in self if not split or video.split == split]

    def select_for_training(self, split: str) -> Index:
        """Returns the videos of one split, or all videos if the index has no splits at all, which is logged."""
        if self.has_splits or not split:
            return self.select(split)
        log.info("the index has no splits (its column 'split' is empty): all %s are used", counted(len(self), "video"))
        return self

    def long_enough(self, data: DataConfig) -> Index:
        """Returns the videos that `data.short_videos` keeps, numbered from 0; those left out are logged.

        As in CoCLR's code, "drop" leaves out videos of which a clip would repeat the first frame for half its length.
        The frames that all views have count. Raises IndexFileError if no video is left.
        """
        most = data.frames // 2 * data.stride + 1
        short = [video for video in self if video.shared_frames(data) <= most] if data.short_videos == "drop" else []
        if not short:
            return self
        if len(short) == len(self):
            raise IndexFileError(
                f'data.short_videos: expected a video of more than {counted(most, "frame")}, as "drop" keeps none of '
                f"{most} or fewer, got {counted(len(self), 'video')} of at most "
                f"{max(video.shared_frames(data) for video in self)}"
            )
        names = ", ".join(str(video.path) for video in short[:3]) + ", ..." * (len(short) > 3)
        log.info("%d of %s are left out, because they have %s or fewer (data.short_videos): %s",
                 len(short), counted(len(self), "video"), counted(most, "frame"), names)  # fmt: skip
        left_out = set(short)
        return Index((video for video in self if video not in left_out), self.classes)

    @property
    def has_splits(self) -> bool:
        """Whether any video names a split."""
        return any(video.split for video in self)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [N]: position in `classes`, -1 where unlabelled."""
        number = {name: i for i, name in enumerate(self.classes)} | {"": -1}
        return np.array([number[video.label] for video in self], dtype=np.int64)

    @cached_property
    def source_ids(self) -> np.ndarray:
        """int64 [N]: equal for siblings; numbered from 0 in order of first appearance."""
        number = {name: i for i, name in enumerate(_distinct(video.source for video in self))}
        return np.array([number[video.source] for video in self], dtype=np.int64)

    @property
    def source_count(self) -> int:
        """The number of different sources."""
        return len(np.unique(self.source_ids))

    @property
    def class_count(self) -> int:
        """The number of different classes that videos have; `classes` may name others."""
        return len(np.unique(self.labels[self.labels >= 0]))

    def originals(self) -> list[int]:
        """Returns for each video the position of the first one whose file holds the same bytes, which is its own unless
        it is an exact copy; see `cpr_fast.data.storage.copies`."""
        return originals([v.path for v in self], [(v.num_frames, v.fps, v.width, v.height) for v in self])

    @classmethod
    def load(cls, path: str | Path, *, require_flow: bool = True, skipped: list[IndexFileError] | None = None) -> Index:
        """Reads an index.

        Args:
            path: The CSV file, with or without byte-order mark; the columns may be separated by `,`, `;` or tab.
            require_flow: Every flow file that is named must exist. If False, a missing one counts as no flow.
            skipped: If given, a bad row is left out and its error is appended to this list.
        Raises:
            IndexFileError: states the file, line, column, what was found and what was expected.
            NotAnIndexError: the file is something else; states what it is.
        """
        path = Path(path)
        try:
            header, rows = read_table(path, COLUMNS, "index")
        except TableError as error:
            if kind_of(path):
                raise _not_an_index(path, kind_of(path)) from None
            raise IndexFileError(str(error)) from None
        if not set(header) & set(COLUMNS):
            begins = f"a text file that begins with {','.join(header)[:40]!r}" if header else "an empty file"
            raise _not_an_index(path, kind_of(path) or begins)
        header = _checked_header(path, header)
        if not rows:
            raise IndexFileError(f"{path}: expected at least one video below the header, got none")
        first_line: dict[str, str] = {}  # by absolute path: a video may be named in several ways
        videos = []
        for line, row in rows:
            try:
                video = _parse_row(line, header, row, path.parent, require_flow)
                if row is rows[-1][1] and video.flow_path is None and row[header.index("flow_path")].strip():
                    _require_last_line(path, line, row[header.index("flow_path")])
                if (name := absolute(video.path)) in first_line:
                    raise IndexFileError(f"{line}, column path: {row[header.index('path')]!r} repeats line "
                                         f"{first_line[name].rpartition(':')[2]}")  # fmt: skip
            except IndexFileError as error:
                if skipped is None:
                    raise
                skipped.append(error)
                continue
            first_line[name] = line
            videos.append(video)
        return cls(videos)

    def save(self, path: str | Path) -> None:
        """Writes the index; the file appears, or is replaced, in one step."""
        path, rows = Path(path), []
        relative = Relative(path.parent)
        for v in self:
            flow = "" if v.flow_path is None else relative(v.flow_path)
            rows.append((relative(v.path), v.label, v.source, v.split, v.num_frames, f"{v.fps:.6g}", v.width, v.height,
                         flow))  # fmt: skip
        _write(path, table_text(COLUMNS, rows))


@contextmanager
def changing(path: str | Path) -> Iterator[None]:
    """Lets one process at a time read an index, change it and save it, so that no change of another one is lost."""
    path = Path(path)
    with one_writer(path.with_name(f".{path.name}.lock"), None):
        yield


def _require_last_line(path: Path, line: str, flow: str) -> None:
    """Raises IndexFileError if the last line, whose flow file does not exist, has no line break: it was cut off."""
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read() not in b"\r\n":
            raise IndexFileError(
                f"{line}, column flow_path: got {flow!r}, which does not exist, at the end of a file without a final "
                "line break, as after a copy that was interrupted; copy it again, list the videos again with "
                "`cpr-fast index`, or end the line if the file is whole"
            )


def _write(path: Path, text: str) -> None:
    """Replaces a file in one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def _not_an_index(path: Path, what: str) -> NotAnIndexError:
    return NotAnIndexError(
        f"{path}: expected an index (a CSV file written by `cpr-fast index`, whose first line is {','.join(COLUMNS)}), "
        f"got {what}"
    )


def kind_of(path: Path) -> str:
    """Returns what a file is by its suffix, or "" if the suffix does not tell or there is no such file."""
    kinds = {".toml": "a TOML file, such as a recipe", ".json": "a JSON file", ".lmdb": "an LMDB file",
             ".pt": "a checkpoint", ".npz": "NumPy arrays", **dict.fromkeys(VIDEO_SUFFIXES, "a video")}  # fmt: skip
    return kinds.get(path.suffix.lower(), "") if path.is_file() else ""


def _checked_header(path: Path, header: list[str]) -> list[str]:
    if missing := [name for name in COLUMNS if name not in header]:
        raise IndexFileError(f"{path}:1: missing column {', '.join(map(repr, missing))}; "
                             f"expected the header {','.join(COLUMNS)}, got {','.join(header)!r}")  # fmt: skip
    if len(header) != len(COLUMNS):
        unknown = [name for name in header if name not in COLUMNS] or "a repeated column"
        raise IndexFileError(f"{path}:1: expected the header {','.join(COLUMNS)}, got {unknown} besides")
    return header


def _parse_row(line: str, header: list[str], row: list[str], folder: Path, require_flow: bool) -> Video:
    if len(row) != len(header):
        raise IndexFileError(f"{line}: expected {counted(len(header), 'field')}, got {len(row)}")
    fields = dict(zip(header, row, strict=True))
    for column in ("label", "source", "split"):  # people write blanks after a comma
        fields[column] = fields[column].strip()

    def number(column: str, kind: type) -> int | float:
        try:
            if kind is int and re.fullmatch(r"\s*\d{1,3}(,\d{3})+\s*", fields[column]):  # 1,000 is a thousand, not one
                raise ValueError
            value = float(fields[column].replace(",", "."))  # a spreadsheet may write 25,0
            if not 0 < value < (2**31 if kind is int else math.inf) or kind(value) != value:
                raise ValueError
        except ValueError:
            expected = "a positive whole number below 2,147,483,648" if kind is int else "a positive number"
            raise IndexFileError(f"{line}, column {column}: expected {expected}, got {fields[column]!r}") from None
        return kind(value)

    def file(column: str) -> Path:
        if not fields[column].strip():
            raise IndexFileError(f"{line}, column {column}: expected a file, got {fields[column]!r}")
        if is_remote(fields[column].strip()):
            try:
                return path_of(fields[column].strip())
            except InputError as error:
                raise IndexFileError(f"{line}, column {column}: {error}") from None
        path = folder / fields[column]
        if reason := why_missing(path):  # or blanks after a comma, or a path that was written on Windows
            others = {fields[column].strip(), fields[column].strip().replace("\\", "/")} - {fields[column]}
            if found := [folder / name for name in sorted(others) if not why_missing(folder / name)]:
                return found[0]
            advice = "; relative paths begin at the folder of the index: move it back if it was moved, or list the "
            advice += "videos again with `cpr-fast index`"
            raise IndexFileError(
                f"{line}, column {column}: file {str(path)!r} {reason}{advice * (reason == 'does not exist')}"
            )
        return path

    for column in ("label", "source", "split"):
        try:
            require_utf8(f"{line}, column {column}", fields[column])
        except TableError as error:
            raise IndexFileError(str(error)) from None
    flow_there = fields["flow_path"].strip() and (require_flow or exists(folder / fields["flow_path"]))
    return Video(
        path=file("path"),
        label=fields["label"],
        source=fields["source"] or fields["path"],  # without a given source, the video is its own source
        split=known_split(fields["split"]),
        num_frames=number("num_frames", int),
        fps=number("fps", float),
        width=number("width", int),
        height=number("height", int),
        flow_path=file("flow_path") if flow_there else None,
    )


def _distinct(names: Iterable[str]) -> list[str]:
    """Returns the names without repeats, in order of first appearance."""
    return list(dict.fromkeys(names))
