"""Reads a large index in CSV as one in Parquet is read: by pyarrow, into columns, and in a twentieth of the time.

Only a file in which nothing is unusual, such as `cpr-fast index` writes it; any other is left to the reader that takes
tables as people save them and names what is wrong with a row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpr_fast.data.index.rows.columns import Columns, columns_of, plain_memory, schema
from cpr_fast.data.index.rows.video import COLUMNS
from cpr_fast.errors import InputError

LARGE = 2**23  # bytes, about 100,000 rows
BLOCK = 2**20  # bytes that are parsed at once


def large_columns(path: Path) -> Columns | None:
    """Returns the rows of a CSV file; None if the file is small, pyarrow is not installed, the file does not begin with
    the usual header or end with a line break, a value is not as expected, or a path is there twice."""
    try:
        if path.stat().st_size < LARGE:
            return None
        import pyarrow as pa
        import pyarrow.csv
    except (ImportError, OSError):
        return None
    with plain_memory(pa):
        try:
            with pa.OSFile(str(path)) as file:  # opened once: another process may replace the index meanwhile
                return columns_of(_Parsed(file), path.parent) if _is_usual(file) else None
        except (InputError, OSError, ValueError, pa.ArrowException):
            return None


def _is_usual(file: Any) -> bool:
    """Returns whether a file begins with the header that `cpr-fast index` writes, has no byte 0, and is whole."""
    header, block = f"{','.join(COLUMNS)}\n".encode(), b""
    if file.read(len(header)) != header:
        return False
    while more := file.read(BLOCK):
        if b"\0" in more:
            return False
        block = more
    return block.endswith(b"\n")


class _Parsed:
    """The columns of an open CSV file by name, each of which is handed out once.

    They are parsed in two passes, so that the paths and the other strings do not take memory at the same time.
    """

    def __init__(self, file: Any) -> None:
        self._file, self._columns = file, {}

    def __call__(self, name: str) -> Any:
        if name not in self._columns:
            self._columns |= self._pass([name] if name == "path" else [name for name in COLUMNS if name != "path"])
        return self._columns.pop(name)

    def _pass(self, names: list[str]) -> dict[str, Any]:
        import pyarrow as pa
        from pyarrow import csv

        kinds = {field.name: field.type for field in schema(pa)}
        kinds |= dict.fromkeys(("label", "split"), pa.dictionary(pa.int32(), pa.string()))
        self._file.seek(0)
        table = csv.read_csv(
            self._file,
            read_options=csv.ReadOptions(use_threads=False, block_size=BLOCK),
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(
                column_types=kinds, include_columns=names, null_values=[], strings_can_be_null=False
            ),
        )
        return {name: table.column(name) for name in names}
