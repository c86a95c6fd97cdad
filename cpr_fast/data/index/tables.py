"""Reads text lists and CSV tables as people and spreadsheets save them; every such file is read through this module.

A byte-order mark is dropped; columns may be separated by comma, semicolon or tab; lines may end in LF, CRLF or CR; the
names of columns are read in any case; a header that is repeated, as in joined files, is read once. Blank lines above
the header, Excel's line `sep=;`, and empty columns at the right, which spreadsheets append, are skipped.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from cpr_fast.errors import InputError
from cpr_fast.runtime.files import replacing
from cpr_fast.wording import expected

DELIMITERS = ",;\t"
_LINE_END = r"\r\n|\r|\n"
# What spreadsheets write above a header: lines that are blank or hold only separators, and Excel's `sep=;`.
_ABOVE = re.compile(rf"(?:[ ,;\t]*(?:{_LINE_END}))*(?:\"?sep=[^\r\n]?\"?[ ,;\t]*(?:{_LINE_END}))?", re.IGNORECASE)


class TableError(InputError):
    """A list or table is not as expected; the message states the place, what was found and what was expected."""


def read_text(path: Path, what: str = "file") -> str:
    """Returns a UTF-8 text without its byte-order mark.

    Bytes that are not UTF-8 are kept as surrogates, as in file names. `what` names the kind of file in errors.
    Raises TableError if the file is missing, not readable or in another encoding.
    """
    if not os.path.isfile(path):  # a pipe may have no writer, and /dev/zero no end
        article = "an" if what[0] in "aeiou" else "a"
        raise TableError(expected(f"{article} {what}", path))
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise TableError(f"{path}: expected a UTF-8 {what}, got {error}") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise TableError(f"{path}: expected a UTF-8 {what}, got UTF-16; save it again as UTF-8 (Excel: 'CSV UTF-8')")
    if b"\0" in data:
        raise TableError(f"{path}: expected a UTF-8 {what}, got a binary file")
    return data.decode("utf-8-sig", "surrogateescape")


def read_lines(path: Path, what: str = "split list") -> Iterator[tuple[str, str]]:
    """Yields ("file:line", line without surrounding blanks) for every line that is not blank."""
    for number, line in enumerate(re.split(_LINE_END, read_text(path, what)), start=1):
        if line.strip():
            yield f"{path}:{number}", line.strip()


def read_table(
    path: Path, columns: Collection[str], what: str = "CSV file"
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Returns the header and, for every row that is not empty, ("file:line", fields).

    `columns` are names that the header is expected to have; they decide which character separates the columns. The
    caller checks the header and the number of fields. "file:line" is where a row ends, as quoted fields may span lines.
    """
    text = read_text(path, what)
    above = _ABOVE.match(text).group()
    skipped, text = len(re.findall(_LINE_END, above)), text[len(above) :]
    known = {name.lower(): name for name in columns}
    header, rows, last = [], [], skipped
    try:
        header, delimiter = max(
            ((next(csv.reader(io.StringIO(text, newline=""), delimiter=sign), []), sign) for sign in DELIMITERS),
            key=lambda found: len({name.strip().lower() for name in found[0]} & set(known)),
        )
        width = max((i for i, name in enumerate(header, start=1) if name.strip()), default=0)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        next(reader, [])
        last += reader.line_num
        for row in reader:
            last = skipped + reader.line_num
            if not _is_empty(row) and row != header:
                rows.append((f"{path}:{last}", row if any(row[width:]) else row[:width]))
    except csv.Error as error:
        raise TableError(
            f"{path}:{last + 1}: expected a UTF-8 {what}, got {error} in the row that begins here; is a quotation mark "
            "missing or too many?"
        ) from None
    return [known.get(name.strip().lower(), name.strip()) for name in header[:width]], rows


def require_utf8(where: str, text: str) -> None:
    """Raises TableError if a text of `read_text` has bytes that are not UTF-8; `where` is its place."""
    if not text.isascii() and any("\ud800" <= sign <= "\udfff" for sign in text):
        raise TableError(f"{where}: expected UTF-8, got {os.fsencode(text)!r}")


def _is_empty(row: list[str]) -> bool:
    """Returns whether a row has no content: no or only empty fields, or a line of blanks."""
    return not any(row) or (len(row) == 1 and not row[0].strip())


def table_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a CSV text that `read_table` reads back exactly, whatever characters the fields hold."""
    lines = (",".join(map(_quoted, map(str, row))) for row in (header, *rows))
    return "".join(f"{line}\n" for line in lines)


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a CSV file of `table_text`; it appears, or is replaced, in one step."""
    text = table_text(header, rows)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def _quoted(field: str) -> str:
    # csv.writer of Python 3.11 does not quote a lone carriage return, which every reader takes for the end of a row
    return '"{}"'.format(field.replace('"', '""')) if re.search(r'[,;\t"\r\n]', field) else field
