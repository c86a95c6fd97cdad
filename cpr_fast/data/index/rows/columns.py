"""The columns of a large index in Parquet, from which a row is made when it is asked for.

A million rows of CSV take long to parse and more than a gigabyte as objects, on every rank. The columns of Parquet are
those of the CSV file, with the same meaning and the same relative paths.

Letters: N videos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cpr_fast.data.files.names import is_remote, path_of
from cpr_fast.data.index.listing import known_split
from cpr_fast.data.index.rows.video import COLUMNS, Video
from cpr_fast.errors import InputError

PARQUET = ".parquet"
NUMBERS = ("num_frames", "width", "height")
INSTALL = "reading and writing Parquet needs `pip install 'cpr-fast[parquet]'`"


def spread(count: int, most: int) -> range:
    """Returns at most `most` positions below `count`, evenly spread; all of them if there are not more."""
    return range(0, count, max(1, -(-count // most)))


class Columns(Sequence[Video]):
    """The rows of an index in Parquet; `table` is a table of pyarrow, and `folder` what relative paths begin at."""

    def __init__(self, table: Any, folder: Path) -> None:
        self._table, self._folder = table, folder

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, position: int) -> Video:
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        row = {name: self._table.column(name)[position % len(self)].as_py() for name in COLUMNS}
        row["source"] = row["source"] or row["path"]  # without a given source, the video is its own source
        row["path"] = self._path(row["path"])
        row["flow_path"] = self._path(row["flow_path"]) if row["flow_path"] else None
        return Video(**row)

    def __iter__(self) -> Iterator[Video]:
        return (self[position] for position in range(len(self)))

    def taken(self, positions: np.ndarray) -> Columns:
        """Returns the rows at these positions, int64."""
        return Columns(self._table.take(positions), self._folder)

    def names(self, column: str) -> list[str]:
        """Returns the different texts of a column, in order of first appearance."""
        return self._coded[column].dictionary.to_pylist()

    def codes(self, column: str) -> np.ndarray:
        """Returns the position in `names` of every row, int32 [N]."""
        return self._coded[column].indices.to_numpy(zero_copy_only=False)

    @cached_property
    def source_ids(self) -> np.ndarray:
        """Returns numbers that are equal for siblings, from 0 in order of first appearance, int64 [N]."""
        import pyarrow.compute as pc

        sources = self._table.column("source")
        empty = pc.equal(sources, "")
        if pc.all(empty).as_py():
            return np.arange(len(self))
        own = pc.if_else(empty, self._table.column("path"), sources)
        return own.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)

    def numbers(self, column: str) -> np.ndarray:
        """Returns a column of numbers, int64 [N]."""
        return self._table.column(column).to_numpy().astype(np.int64)

    def rates(self) -> np.ndarray:
        """Returns the frames per second of every row, float64 [N]."""
        return self._table.column("fps").to_numpy()

    def paths(self) -> list[str]:
        """Returns the paths as the file states them."""
        return self._table.column("path").to_pylist()

    @cached_property
    def has_flow(self) -> np.ndarray:
        """Whether each row has stored flow, bool [N]."""
        import pyarrow.compute as pc

        return pc.greater(pc.binary_length(self._table.column("flow_path")), 0).to_numpy()

    @cached_property
    def _coded(self) -> dict[str, Any]:
        return _Coded(self._table)

    def _path(self, text: str) -> Path:
        return path_of(text) if is_remote(text) else self._folder / text


class _Coded(dict):
    """The columns as dictionary arrays, made when they are asked for."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self._table = table

    def __missing__(self, column: str) -> Any:
        self[column] = coded = self._table.column(column).combine_chunks().dictionary_encode()
        return coded


def load_columns(path: Path) -> Columns:
    """Reads an index in Parquet. As in a CSV file, a text may be empty, which null stands for as well, and names of
    splits are read in any case; other columns are not read.

    Raises:
        InputError: pyarrow is missing, the file is no such index, or a column does not hold what it should.
        OSError: the file cannot be read.
    """
    pa, pq = _pyarrow()
    try:
        with pq.ParquetFile(path) as file:
            if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
                raise InputError(f"missing column {', '.join(map(repr, missing))}; expected {', '.join(COLUMNS)}")
            table = file.read(columns=list(COLUMNS))
    except pa.ArrowInvalid as error:
        raise InputError(f"expected an index in Parquet, got a file that is none or is cut off: {error}") from error
    try:
        table = _as_in_csv(table.select(COLUMNS).cast(schema(pa)).combine_chunks())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise InputError(f"a column has another type than expected: {error}") from error
    _check(table)
    pa.default_memory_pool().release_unused()
    return Columns(table, path.parent)


def _as_in_csv(table: Any) -> Any:
    """Returns the table with its texts as a CSV file would hold them: "" for null, no blanks around names, and splits
    by their known names."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def replaced(name: str, values: Any) -> Any:
        return table.set_column(COLUMNS.index(name), name, values)

    for name in ("label", "source", "split", "flow_path"):
        texts = table.column(name)
        texts = pc.fill_null(texts, "") if texts.null_count else texts
        table = replaced(name, texts if name == "flow_path" else pc.utf8_trim_whitespace(texts))
    coded = table.column("split").combine_chunks().dictionary_encode()
    names = coded.dictionary.to_pylist()
    if (known := list(map(known_split, names))) != names:
        table = replaced("split", pa.array(known, pa.string()).take(coded.indices))
    return table.combine_chunks()


def _check(table: Any) -> None:
    """Raises InputError that names the row of a wrong value."""
    import pyarrow.compute as pc

    for name in COLUMNS:
        if table.column(name).null_count:
            raise InputError(f"row {_first(pc.is_null(table.column(name)))}, column {name}: expected a value, got none")
    for name in (*NUMBERS, "fps"):
        values = table.column(name)
        if (wrong := _first(pc.invert(pc.and_(pc.greater(values, 0), pc.is_finite(values))))) is not None:
            raise InputError(f"row {wrong}, column {name}: expected a positive number, got {values[wrong - 1]}")
    paths = table.column("path")
    if (wrong := _first(pc.equal(paths, ""))) is not None:
        raise InputError(f"row {wrong}, column path: expected a file, got ''")
    if len(pc.unique(paths)) < len(paths):
        first: dict[str, int] = {}
        for row, text in enumerate(paths.to_pylist(), start=1):
            if first.setdefault(text, row) != row:
                raise InputError(f"row {row}, column path: {text!r} repeats row {first[text]}")


def _first(mask: Any) -> int | None:
    """Returns the number, from 1, of the first row of a mask, None if there is none."""
    found = np.flatnonzero(mask.to_numpy())
    return int(found[0]) + 1 if len(found) else None


def save_columns(path: Path, videos: Iterable[Video], relative: Callable[[Path], str]) -> None:
    """Writes an index in Parquet; `relative` returns a path as it is stored. Raises InputError."""
    pa, pq = _pyarrow()
    rows: dict[str, list] = {name: [] for name in COLUMNS}
    for video in videos:
        for name in COLUMNS:
            rows[name].append(getattr(video, name))
        rows["path"][-1] = relative(video.path)
        rows["flow_path"][-1] = "" if video.flow_path is None else relative(video.flow_path)
    try:
        table = pa.table(rows, schema=schema(pa))
    except (UnicodeEncodeError, pa.ArrowInvalid) as error:
        raise InputError(f"--out: Parquet holds names in UTF-8 only: {error}; write a CSV file") from error
    pq.write_table(table, path, compression="zstd")


def schema(pa: Any) -> Any:
    """Returns the schema of an index in Parquet; `pa` is pyarrow."""
    kinds = dict.fromkeys(NUMBERS, pa.int32()) | {"fps": pa.float64()}
    return pa.schema([(name, kinds.get(name, pa.string())) for name in COLUMNS])


def require_parquet(option: str, path: Path) -> None:
    """Raises InputError that names the option if an index in Parquet is to be written and pyarrow is missing."""
    if path.suffix == PARQUET:
        try:
            _pyarrow()
        except InputError as error:
            raise InputError(f"{option}: {error}") from error


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{INSTALL}: {error}") from error
    return pyarrow, pyarrow.parquet
