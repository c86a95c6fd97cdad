"""The columns of a large index, from which a row is made when it is asked for.

A million rows of CSV take 30 s to parse row by row, and two gigabytes as objects, on every rank. The columns of Parquet
are those of the CSV file, with the same meaning and the same relative paths; see `large` for CSV.

Letters: N videos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cpr_fast.data.files.names import is_remote, path_of
from cpr_fast.data.index.listing import known_split
from cpr_fast.data.index.rows.texts import Texts
from cpr_fast.data.index.rows.video import COLUMNS, Video
from cpr_fast.errors import InputError

PARQUET = ".parquet"
TEXTS, CODED, NUMBERS = ("path", "source", "flow_path"), ("label", "split", "fps"), ("num_frames", "width", "height")
AT_ONCE = 2**14  # strings that are Python's at the same time
INSTALL = "reading and writing Parquet needs `pip install pyarrow`"


def spread(count: int, most: int) -> range:
    """Returns at most `most` positions below `count`, evenly spread; all of them if there are not more."""
    return range(0, count, max(1, -(-count // most)))


class Columns(Sequence[Video]):
    """The rows of a large index.

    Attributes:
        texts: "path", "source" and "flow_path"; a column of empty strings is None.
        coded: "label", "split" and "fps".
        values: "num_frames", "width" and "height", int32 [N].
        folder: what relative paths begin at.
    """

    def __init__(
        self, texts: dict[str, Texts | None], coded: dict[str, Coded], values: dict[str, np.ndarray], folder: Path
    ) -> None:
        self.texts, self.coded, self.values, self.folder = texts, coded, values, folder

    def __len__(self) -> int:
        return len(self.texts["path"])

    def __getitem__(self, position: int) -> Video:
        if not -len(self) <= position < len(self):
            raise IndexError(position)
        position %= len(self)
        texts = {name: "" if column is None else column[position] for name, column in self.texts.items()}
        return Video(
            path=self._path(texts["path"]),
            source=texts["source"] or texts["path"],  # without a given source, the video is its own source
            flow_path=self._path(texts["flow_path"]) if texts["flow_path"] else None,
            **{name: column.names[column.codes[position]] for name, column in self.coded.items()},
            **{name: column[position].item() for name, column in self.values.items()},
        )

    def __iter__(self) -> Iterator[Video]:
        return (self[position] for position in range(len(self)))

    def taken(self, positions: np.ndarray) -> Columns:
        """Returns the rows at these positions, int64."""
        if np.array_equal(positions, np.arange(len(self))):  # such as a split that holds all rows: no copy
            return self
        return Columns(
            {name: None if column is None else column.taken(positions) for name, column in self.texts.items()},
            {name: column.taken(positions) for name, column in self.coded.items()},
            {name: column[positions] for name, column in self.values.items()},
            self.folder,
        )

    def names(self, column: str) -> list[str]:
        """Returns the different texts of the column "label" or "split", in the order of their first rows in the file,
        but for ""."""
        return self.coded[column].names

    def codes(self, column: str) -> np.ndarray:
        """Returns the position in `names` of every row, integers [N]."""
        return self.coded[column].codes

    @cached_property
    def source_ids(self) -> np.ndarray:
        """Returns numbers that are equal for siblings, from 0 in order of first appearance, int64 [N]."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if self.texts["source"] is None:
            return np.arange(len(self))
        with plain_memory(pa):  # the table of the encoding takes 67 MiB for 540,000 sources
            own = self.texts["source"].arrow()
            without = pc.equal(own, "")
            if pc.any(without).as_py():
                own = pc.if_else(without, self.texts["path"].arrow(), own)
            return own.dictionary_encode().indices.to_numpy().astype(np.int64)

    def numbers(self, column: str) -> np.ndarray:
        """Returns a column of whole numbers, int32 [N], not to be changed."""
        return self.values[column]

    def rates(self) -> np.ndarray:
        """Returns the frames per second of every row, float64 [N]."""
        return np.array(self.coded["fps"].names)[self.coded["fps"].codes]

    def paths(self) -> Iterator[str]:
        """Yields the paths as the file states them."""
        return iter(self.texts["path"])

    @cached_property
    def has_flow(self) -> np.ndarray:
        """Whether each row has stored flow, bool [N]."""
        import pyarrow.compute as pc

        if self.texts["flow_path"] is None:
            return np.zeros(len(self), bool)
        return pc.not_equal(self.texts["flow_path"].arrow(), "").to_numpy(zero_copy_only=False)

    def _path(self, text: str) -> Path:
        return path_of(text.strip()) if is_remote(text.strip()) else self.folder / text


class Coded(NamedTuple):
    """A column of which many values are equal: the different ones, and the position in them of every row, the smallest
    integers that are large enough [N]."""

    names: list
    codes: np.ndarray

    @classmethod
    def of(cls, codes: np.ndarray, names: Sequence[Any]) -> Coded:
        """Returns a column whose row i is `names[codes[i]]`; names may be equal, or be those of no row. Its own names
        have their order."""
        used = dict.fromkeys(names[code] for code in np.unique(codes).tolist())
        number = {name: place for place, name in enumerate(used)}
        places = np.array([number.get(name, 0) for name in names], np.min_scalar_type(len(number)))
        return cls(list(used), places[codes])

    def taken(self, positions: np.ndarray) -> Coded:
        """Returns the rows at these positions."""
        return Coded.of(self.codes[positions], self.names)


def load_columns(path: Path) -> Columns:
    """Reads an index in Parquet. As in a CSV file, a text may be empty, which null stands for as well, and names of
    splits are read in any case; other columns are not read.

    The columns are read one after the other, by one thread, so that little memory is needed beside them.

    Raises:
        InputError: pyarrow is missing, the file is no such index, or a column does not hold what it should.
        OSError: the file cannot be read.
    """
    pa, pq = _pyarrow()
    with plain_memory(pa):
        try:
            with pq.ParquetFile(path) as file:
                if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
                    raise InputError(f"missing column {', '.join(map(repr, missing))}; expected {', '.join(COLUMNS)}")
                read = lambda name: file.read(columns=[name], use_threads=False).column(name)  # noqa: E731
                return columns_of(read, path.parent)
        except pa.ArrowInvalid as error:
            raise InputError(f"expected an index in Parquet, got a file that is none or is cut off: {error}") from error


def columns_of(read: Callable[[str], Any], folder: Path) -> Columns:
    """Returns the rows of which `read` returns each column by its name, once, as a chunked array of pyarrow. Raises
    InputError that names the column and the row of a value that is not as expected."""
    pa, found = _pyarrow()[0], {}
    for field in schema(pa):
        found[field.name] = _column(field.name, read(field.name), field.type)
        pa.default_memory_pool().release_unused()  # before the next column is read
    parts = ({name: found[name] for name in names} for names in (TEXTS, CODED, NUMBERS))
    return Columns(*parts, folder)


@contextmanager
def plain_memory(pa: Any) -> Iterator[None]:
    """Lets pyarrow allocate by malloc, which returns large blocks to the system when they are freed, and all unused
    ones at the end."""
    usual, plain = pa.default_memory_pool(), pa.system_memory_pool()
    pa.set_memory_pool(plain)
    try:
        yield
    finally:
        plain.release_unused()
        pa.set_memory_pool(usual)


def _column(name: str, values: Any, kind: Any) -> Any:
    """Returns a column as `Columns` holds it. Raises InputError that names the row of a wrong value."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        values = values.cast(kind)
        values = values if name in TEXTS else values.combine_chunks()  # of long strings there is no second copy
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise InputError(f"a column has another type than expected: column {name}: {error}") from error
    if name in ("label", "split"):
        return _coded(values.dictionary_encode(), known_split if name == "split" else str)
    if name not in TEXTS:
        return _numbers(name, values)
    if name == "path":
        _require_values(name, values)
        _require_different(values)
        return Texts.of(values)
    values = pc.fill_null(values, "") if values.null_count else values
    values = pc.utf8_trim_whitespace(values) if name == "source" else values
    return None if pc.all(pc.equal(values, "")).as_py() else Texts.of(values)


def _coded(values: Any, known: Callable[[str], str]) -> Coded:
    """Returns a column of names without blanks around them, an array of dictionaries in which null is ""; `known`
    returns a name as it is known."""
    names = [known((text or "").strip()) for text in (*values.dictionary.to_pylist(), "")]
    return Coded.of(values.indices.fill_null(len(names) - 1).to_numpy(), names)


def _numbers(name: str, values: Any) -> np.ndarray | Coded:
    _require_values(name, values)
    column = values.to_numpy()
    wrong = np.flatnonzero(~((column > 0) & np.isfinite(column)))
    if len(wrong):
        got = column[wrong[0]].item()
        raise InputError(f"row {wrong[0] + 1}, column {name}: expected a positive number, got {got}")
    if name in NUMBERS:
        return column
    rates, codes = np.unique(column, return_inverse=True)
    return Coded.of(codes, rates.tolist())


def _require_values(name: str, values: Any) -> None:
    if values.null_count:
        raise InputError(f"row {_first(values.is_null())}, column {name}: expected a value, got none")


def _require_different(paths: Any) -> None:
    """Raises InputError that names the row of a path that is empty or is that of another row."""
    import pyarrow.compute as pc

    if (wrong := _first(pc.equal(paths, ""))) is not None:
        raise InputError(f"row {wrong}, column path: expected a file, got ''")
    hashes = np.fromiter(map(hash, _strings(paths)), np.int64, len(paths))
    hashes.sort()
    if (hashes[1:] == hashes[:-1]).any():  # nearly always equal paths
        first: dict[str, int] = {}
        for row, text in enumerate(_strings(paths), start=1):
            if first.setdefault(text, row) != row:
                raise InputError(f"row {row}, column path: {text!r} repeats row {first[text]}")


def _strings(texts: Any) -> Iterator[str]:
    """Yields the strings of an array of pyarrow, made in parts: all of them would need several times its memory."""
    begins = range(0, len(texts), AT_ONCE)
    return chain.from_iterable(texts.slice(begin, AT_ONCE).to_numpy(zero_copy_only=False) for begin in begins)


def _first(mask: Any) -> int | None:
    """Returns the number, from 1, of the first row of a mask, None if there is none."""
    found = np.flatnonzero(mask)
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
