"""Reads the header and the rows of an index in CSV."""

from __future__ import annotations

import math
import re
from pathlib import Path

from cpr_fast.data.files.names import is_remote, path_of
from cpr_fast.data.index.listing import known_split
from cpr_fast.data.index.rows.video import COLUMNS, Video
from cpr_fast.data.index.tables import TableError, require_utf8
from cpr_fast.data.storage.media import exists, why_missing
from cpr_fast.errors import InputError
from cpr_fast.wording import counted

ADVICE = (
    "; relative paths begin at the folder of the index: move it back if it was moved, or list the videos again with "
    "`cpr-fast index`"
)


class IndexFileError(TableError):
    """An index is not as expected; the message states the place, what was found and what was expected."""


class NotAnIndexError(IndexFileError):
    """A file is something else than an index; the message states what it is."""


def checked_header(path: Path, header: list[str]) -> list[str]:
    """Returns the names of the columns. Raises IndexFileError if one is missing, repeated or unknown."""
    if missing := [name for name in COLUMNS if name not in header]:
        raise IndexFileError(f"{path}:1: missing column {', '.join(map(repr, missing))}; "
                             f"expected the header {','.join(COLUMNS)}, got {','.join(header)!r}")  # fmt: skip
    if len(header) != len(COLUMNS):
        unknown = [name for name in header if name not in COLUMNS] or "a repeated column"
        raise IndexFileError(f"{path}:1: expected the header {','.join(COLUMNS)}, got {unknown} besides")
    return header


def parse_row(line: str, header: list[str], row: list[str], folder: Path, require_flow: bool, *, look: bool) -> Video:
    """Returns a row as a video; `line` is its place. With `look` its files have to exist. Raises IndexFileError."""
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
        if look and (reason := why_missing(path)):  # or blanks after a comma, or a path that was written on Windows
            others = {fields[column].strip(), fields[column].strip().replace("\\", "/")} - {fields[column]}
            if found := [folder / name for name in sorted(others) if not why_missing(folder / name)]:
                return found[0]
            raise IndexFileError(
                f"{line}, column {column}: file {str(path)!r} {reason}{ADVICE * (reason == 'does not exist')}"
            )
        return path

    for column in ("label", "source", "split"):
        try:
            require_utf8(f"{line}, column {column}", fields[column])
        except TableError as error:
            raise IndexFileError(str(error)) from None
    flow_there = fields["flow_path"].strip() and (require_flow or not look or exists(folder / fields["flow_path"]))
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
