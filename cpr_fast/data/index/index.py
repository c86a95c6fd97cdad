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
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np

from cpr_fast.config import DataConfig
from cpr_fast.data.files.relative import Relative, absolute
from cpr_fast.data.index.catalogue import VIDEO_SUFFIXES
from cpr_fast.data.index.listing import known_split
from cpr_fast.data.index.rows.columns import PARQUET, Columns, load_columns, save_columns, spread
from cpr_fast.data.index.rows.large import large_columns
from cpr_fast.data.index.rows.parsing import ADVICE, IndexFileError, NotAnIndexError, checked_header, parse_row
from cpr_fast.data.index.rows.video import COLUMNS, Video
from cpr_fast.data.index.tables import TableError, read_table, write_table
from cpr_fast.data.storage.copies import originals
from cpr_fast.data.storage.media import why_missing
from cpr_fast.data.storage.times import native_rate, sample_count
from cpr_fast.errors import InputError
from cpr_fast.runtime.files import one_writer, replacing
from cpr_fast.wording import counted, expected

# Rows whose files are looked for when an index is loaded, evenly spread: others are found missing when they are read. A
# look takes 2 us on a local disk, and a hundred times as long on a network disk. Fewer are looked for in Parquet and in
# a large CSV file.
LOOKED_FOR, LOOKED_FOR_IN_PARQUET = 10_000, 100
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


class Index(Sequence[Video]):
    """An immutable list of videos; a video's position is its id.

    `classes` are the class names in order of first appearance (which is the official order if the rows are in that
    order); a selection keeps the classes of the index it was taken from, so that labels agree between train and test.
    """

    def __init__(self, videos: Iterable[Video], classes: Sequence[str] | None = None) -> None:
        self._videos: Sequence[Video] = videos if isinstance(videos, Columns) else tuple(videos)
        if classes is None:
            labels = self._columns.names("label") if self._columns else (video.label for video in self._videos)
            classes = _distinct(filter(None, labels))
        self.classes = list(classes)

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, position: int) -> Video:
        return self._videos[position]

    def __iter__(self) -> Iterator[Video]:
        return iter(self._videos)

    def select(self, split: str) -> Index:
        """Returns the videos of one split, numbered from 0. Raises IndexFileError if the split has none."""
        name = known_split(split)
        chosen = self.chosen(np.flatnonzero(self._codes("split", name)))
        if not len(chosen) and not self.has_splits:
            raise IndexFileError(
                f"split {split!r}: the index has no splits, its column 'split' is empty. Fill it in, or use what needs "
                "none: `retrieve --protocol leave_source_out`, `pretrain --data.split ''`"
            )
        if not len(chosen):
            splits = ", ".join(map(repr, _distinct(video.split for video in self)))
            raise IndexFileError(f"split {split!r}: the index has no such video; its splits are {splits}")
        return chosen

    def chosen(self, positions: Iterable[int]) -> Index:
        """Returns the videos at these positions, numbered from 0."""
        if self._columns:
            return Index(self._columns.taken(np.fromiter(positions, np.int64)), self.classes)
        return Index((self[position] for position in positions), self.classes)

    @property
    def mostly_labelled(self) -> bool:
        """Whether at least half of the videos have a label, of two classes or more: fewer labels judge no network."""
        return 2 * int((self.labels >= 0).sum()) >= len(self) and self.class_count > 1

    def training(self) -> tuple[str, Index]:
        """Returns the split that pretraining reads by default and its videos: "train", or "" where there are no splits,
        which stands for all videos."""
        split = "train" if self.has_splits else ""
        return split, self.chosen(np.flatnonzero(self._codes("split", split))) if split else self

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
        frames = self.shared_frames(data)
        if data.short_videos != "drop" or not (left_out := frames <= most).any():
            return self
        if left_out.all():
            raise IndexFileError(
                f'data.short_videos: expected a video of more than {counted(most, "frame")}, as "drop" keeps none of '
                f"{most} or fewer, got {counted(len(self), 'video')} of at most "
                f"{frames.max()}"
            )
        short = np.flatnonzero(left_out)
        names = ", ".join(str(self[place].path) for place in short[:3].tolist()) + ", ..." * (len(short) > 3)
        log.info("%d of %s are left out, because they have %s or fewer (data.short_videos): %s",
                 len(short), counted(len(self), "video"), counted(most, "frame"), names)  # fmt: skip
        return self.chosen(np.flatnonzero(~left_out))

    @property
    def has_splits(self) -> bool:
        """Whether any video names a split."""
        return any(self._columns.names("split") if self._columns else (video.split for video in self))

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [N]: position in `classes`, -1 where unlabelled."""
        number = {name: i for i, name in enumerate(self.classes)} | {"": -1}
        if self._columns:
            return np.array([number[name] for name in self._columns.names("label")], np.int64)[
                self._columns.codes("label")
            ]
        return np.array([number[video.label] for video in self], dtype=np.int64)

    @cached_property
    def source_ids(self) -> np.ndarray:
        """int64 [N]: equal for siblings; numbered from 0 in order of first appearance."""
        if self._columns:
            return self._columns.source_ids
        number = {name: i for i, name in enumerate(_distinct(video.source for video in self))}
        return np.array([number[video.source] for video in self], dtype=np.int64)

    def numbers(self, column: str) -> np.ndarray:
        """Returns the column "num_frames", "width" or "height", int32 or int64 [N], not to be changed."""
        if self._columns:
            return self._columns.numbers(column)
        return np.array([getattr(video, column) for video in self], np.int64)

    @property
    def has_flow(self) -> np.ndarray:
        """Whether each video has stored flow, bool [N]."""
        return self._columns.has_flow if self._columns else np.array([v.flow_path is not None for v in self], bool)

    def shared_frames(self, data: DataConfig | None = None) -> np.ndarray:
        """Returns `Video.shared_frames` of every video, int32 or int64 [N]. Raises InputError as that does."""
        computed = data is not None and data.flow != "stored"
        frames, has_flow = self.numbers("num_frames"), computed | self.has_flow
        frames = frames - has_flow if has_flow.any() else frames
        if data is None or not data.fps:
            return frames
        if self._columns:
            rows = zip(self._columns.paths(), self._columns.rates(), strict=True)
        else:
            rows = ((video.path, video.fps) for video in self)
        each = (native_rate(path, listed, data.pictures_fps) for path, listed in rows)
        rates = np.fromiter(each, np.float64, len(self))
        return sample_count(frames, rates, data.fps)

    @property
    def _columns(self) -> Columns | None:
        """The columns of a large index, whose videos are made when they are asked for."""
        videos = getattr(self, "_videos", None)  # the clips of a store have none
        return videos if isinstance(videos, Columns) else None

    def _codes(self, column: str, name: str) -> np.ndarray:
        """Returns which videos have this name in the column, bool [N]."""
        if self._columns:
            names = self._columns.names(column)
            return self._columns.codes(column) == (names.index(name) if name in names else -1)
        return np.array([getattr(video, column) == name for video in self], bool)

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
            path: The CSV file, with or without byte-order mark; the columns may be separated by `,`, `;` or tab. Or a
                Parquet file (.parquet), of which no row is made into a `Video` before it is asked for; nor is one of a
                large CSV file in which nothing is unusual (see `rows.large`).
            require_flow: Every flow file that is named must exist. If False, a missing one counts as no flow. Where no
                row is made before it is asked for, a missing one is found when it is read.
            skipped: If given, a bad row is left out and its error is appended to this list.
        Raises:
            IndexFileError: states the file, line, column, what was found and what was expected.
            NotAnIndexError: the file is something else; states what it is.
        """
        path = Path(path)
        if path.suffix == PARQUET:
            return cls(_loaded_columns(path))
        if (columns := _usual_columns(path)) is not None:
            return cls(columns)
        try:
            header, rows = read_table(path, COLUMNS, "index")
        except TableError as error:
            if kind_of(path):
                raise _not_an_index(path, kind_of(path)) from None
            raise IndexFileError(str(error)) from None
        if not set(header) & set(COLUMNS):
            begins = f"a text file that begins with {','.join(header)[:40]!r}" if header else "an empty file"
            raise _not_an_index(path, kind_of(path) or begins)
        header = checked_header(path, header)
        if not rows:
            raise IndexFileError(f"{path}: expected at least one video below the header, got none")
        first_line: dict[str, str] = {}  # by absolute path: a video may be named in several ways
        videos = []
        looked_for = set(spread(len(rows), LOOKED_FOR))
        for number, (line, row) in enumerate(rows):
            try:
                video = parse_row(line, header, row, path.parent, require_flow, look=number in looked_for)
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
        if path.suffix == PARQUET:
            with replacing(path) as temporary:
                save_columns(temporary, self, Relative(path.parent))
            return
        relative = Relative(path.parent)
        for v in self:
            flow = "" if v.flow_path is None else relative(v.flow_path)
            rows.append((relative(v.path), v.label, v.source, v.split, v.num_frames, f"{v.fps:.6g}", v.width, v.height,
                         flow))  # fmt: skip
        write_table(path, COLUMNS, rows)


def _loaded_columns(path: Path) -> Columns:
    """Returns the rows of an index in Parquet. Raises IndexFileError, also if one of a few files looked for is
    missing."""
    if not path.is_file():
        raise IndexFileError(expected("an index", path))
    try:
        columns = load_columns(path)
    except (InputError, OSError, ValueError) as error:
        raise IndexFileError(f"{path}: {error}") from error
    if not len(columns):
        raise IndexFileError(f"{path}: expected at least one video, got none")
    for place in spread(len(columns), LOOKED_FOR_IN_PARQUET):
        if reason := why_missing(columns[place].path):
            raise IndexFileError(f"{path}, row {place + 1}, column path: file {str(columns[place].path)!r} {reason}"
                                 f"{ADVICE * (reason == 'does not exist')}")  # fmt: skip
    return columns


def _usual_columns(path: Path) -> Columns | None:
    """Returns the rows of a large index in CSV, see `large_columns`; None also if one of a few files looked for is
    missing."""
    columns = large_columns(path)
    for place in () if columns is None else spread(len(columns), LOOKED_FOR_IN_PARQUET):
        video = columns[place]
        if any(why_missing(file) for file in (video.path, video.flow_path) if file is not None):
            return None
    return columns


@contextmanager
def changing(path: str | Path) -> Iterator[None]:
    """Lets one process at a time read an index, change it and save it, so that no change of another one is lost."""
    path = Path(path)
    with one_writer(path.with_name(f".{path.name}.lock"), None):
        yield


def previous_path(path: Path) -> Path:
    """Returns the path under which the index that `path` replaces is kept."""
    return path.with_suffix(f".old{path.suffix}")


def keep_previous(path: Path) -> None:
    """Copies an index that will be replaced to `previous_path(path)`, in one step."""
    with replacing(previous_path(path)) as temporary:
        shutil.copyfile(path, temporary)


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


def numbered(values: np.ndarray) -> np.ndarray:
    """Returns numbers that are equal where the values [N] are, from 0 in order of first appearance, int64 [N]."""
    _, first, numbers = np.unique(values, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[numbers]


def _distinct(names: Iterable[str]) -> list[str]:
    """Returns the names without repeats, in order of first appearance."""
    return list(dict.fromkeys(names))
