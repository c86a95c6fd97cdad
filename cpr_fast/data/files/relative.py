"""Paths relative to the folder of an index, and absolute ones."""

from __future__ import annotations

import os
from pathlib import Path

from cpr_fast.data.files.names import is_remote, member_of, member_path, text_of


class Relative:
    """Paths relative to a folder, which may be a symbolic link: `..` then leads to the parent of the link's target.

    URLs stay as they are.
    """

    def __init__(self, folder: Path) -> None:
        self._lexical, self._real = os.path.abspath(folder), os.path.realpath(folder)
        self._prefixes: dict[str, str] = {}  # by the folder of a video

    def __call__(self, path: Path) -> str:
        if is_remote(path):
            return text_of(path)
        if (member := member_of(path)) is not None:
            return str(member_path(member._replace(file=Path(self(member.file)))))
        folder, name = os.path.split(absolute(path))
        if folder not in self._prefixes:
            self._prefixes[folder] = self._relative(folder)
        return os.path.normpath(os.path.join(self._prefixes[folder], name))

    def _relative(self, folder: str) -> str:
        real = os.path.realpath(folder)
        named, resolved = os.path.relpath(folder, self._lexical), os.path.relpath(real, self._real)
        if os.path.realpath(os.path.join(self._real, named)) != real:  # a `..` in it follows a link
            named = os.path.relpath(folder, self._real)
        # a path without `..` remains valid if the index and the videos are moved together
        return resolved if named.startswith("..") and not resolved.startswith("..") else named


def path_in(folder: Path, text: str) -> Path:
    """Returns the path that `Relative(folder)` wrote as `text`."""
    return Path(text) if is_remote(text) else folder / text


def lexical(path: Path) -> str:
    """Returns the absolute path, with every `..` removed without looking at the disk, or a URL."""
    return text_of(path) if is_remote(path) else os.path.abspath(path)


def absolute(path: Path) -> str:
    """Returns the absolute path, with symbolic links resolved only as far as a `..` follows them, or a URL."""
    if is_remote(path):
        return text_of(path)
    head, up, tail = os.path.join(os.getcwd(), path).rpartition("/../")
    return os.path.join(os.path.realpath(head + up), tail) if up else os.path.abspath(path)
