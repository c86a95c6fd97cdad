"""The index: one CSV row per video. `cpr_fast.data.index.build` writes it for a data set.

    path,label,source,split,num_frames,fps,width,height,flow_path

`path` and `flow_path` are relative to the folder of the CSV file, and may be records of an LMDB file,
FILE.lmdb#CLASS/VIDEO (see `cpr_fast.data.storage`); `label` is the class name; `source` names the source video that a
clip was cut from, so clips of equal `source` are *siblings*; `num_frames` counts the frames that really decode (or, of
a very large data set, the packets), not what the header claims; `fps` is frames per second, `width` and `height` are
pixels.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from cpr_fast.data.storage.media import exists
from cpr_fast.errors import InputError

COLUMNS = ("path", "label", "source", "split", "num_frames", "fps", "width", "height", "flow_path")


class IndexFileError(InputError):
    """An index is not as expected; says where, what came and what was expected."""


@dataclass(frozen=True)
class Video:
    path: Path
    label: str  # class name; "" where unlabelled
    source: str  # equal for siblings
    split: str
    num_frames: int
    fps: float
    width: int  # pixels
    height: int
    flow_path: Path | None = None


class Index(Sequence[Video]):
    """An immutable list of videos; a video's position is its id.

    `classes` are the class names in order of first appearance (so the official order where the rows follow it);
    a selection keeps the classes of the index it was taken from, so that labels agree between train and test.
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
        """The videos of one split, numbered from 0. Raises IndexFileError where the split holds none."""
        chosen = [video for video in self if video.split == split]
        if not chosen:
            splits = ", ".join(map(repr, _distinct(video.split for video in self)))
            raise IndexFileError(f"split {split!r}: the index holds no such video; its splits are {splits}")
        return Index(chosen, self.classes)

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

    @classmethod
    def load(cls, path: str | Path, *, require_flow: bool = True, skipped: list[IndexFileError] | None = None) -> Index:
        """Reads an index. Raises IndexFileError naming file, line, column, what came and what was expected.

        Every file named must be there; with `require_flow` False a flow file that is not there counts as none. With
        `skipped` a bad row is left out and its error added to that list.
        """
        path = Path(path)
        try:
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.reader(file, strict=True)
                header = _checked_header(path, next(reader, []))
                # a quoted field may span lines: line_num is where the row ends
                rows = [(f"{path}:{reader.line_num}", row) for row in reader if row]
        except FileNotFoundError:
            raise IndexFileError(f"index {str(path)!r} does not exist") from None
        except (csv.Error, UnicodeDecodeError, IsADirectoryError) as error:
            raise IndexFileError(f"{path}: expected a UTF-8 CSV file, got {error}") from None
        if not rows:
            raise IndexFileError(f"{path}: expected at least one video below the header, got none")
        first_line: dict[Path, str] = {}
        videos = []
        for line, row in rows:
            try:
                video = _parse_row(line, header, row, path.parent, require_flow)
                if video.path in first_line:
                    raise IndexFileError(f"{line}, column path: {row[header.index('path')]!r} repeats line "
                                         f"{first_line[video.path].rpartition(':')[2]}")  # fmt: skip
            except IndexFileError as error:
                if skipped is None:
                    raise
                skipped.append(error)
                continue
            first_line[video.path] = line
            videos.append(video)
        return cls(videos)

    def save(self, path: str | Path) -> None:
        """Writes the index; the file appears, or is replaced, in one step."""
        path = Path(path)
        rows = []
        for v in self:
            flow = "" if v.flow_path is None else _relative(v.flow_path, path)
            rows.append((_relative(v.path, path), v.label, v.source, v.split, v.num_frames, f"{v.fps:.6g}", v.width,
                         v.height, flow))  # fmt: skip
        _write_csv(path, COLUMNS, rows)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        raise IndexFileError(f"{line}: expected {len(header)} fields, got {len(row)}")
    fields = dict(zip(header, row, strict=True))

    def number(column: str, kind: type) -> int | float:
        try:
            value = kind(fields[column])
            if not 0 < value < float("inf"):
                raise ValueError
        except ValueError:
            expected = "a positive whole number" if kind is int else "a positive number"
            raise IndexFileError(f"{line}, column {column}: expected {expected}, got {fields[column]!r}") from None
        return value

    def file(column: str) -> Path:
        path = folder / fields[column]
        if not exists(path):
            raise IndexFileError(f"{line}, column {column}: file {str(path)!r} does not exist")
        return path

    flow_there = fields["flow_path"] and (require_flow or exists(folder / fields["flow_path"]))
    return Video(
        path=file("path"),
        label=fields["label"],
        source=fields["source"] or fields["path"],  # no source given: a source of its own
        split=fields["split"],
        num_frames=number("num_frames", int),
        fps=number("fps", float),
        width=number("width", int),
        height=number("height", int),
        flow_path=file("flow_path") if flow_there else None,
    )


def _relative(path: Path, csv_path: Path) -> str:
    return os.path.relpath(path, csv_path.parent)


def _distinct(names: Iterable[str]) -> list[str]:
    """In order of first appearance."""
    return list(dict.fromkeys(names))
