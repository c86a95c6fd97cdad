"""Reports videos that cannot be read: one line per kind of problem, and an error if the disk itself is no longer
available."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from cpr_fast.data.files.access import storage_of
from cpr_fast.data.files.names import is_remote, text_of
from cpr_fast.data.storage.media import container
from cpr_fast.errors import InputError
from cpr_fast.runtime.problems import problem_line
from cpr_fast.wording import counted

REPLACED = "replaced by other videos"  # what happens in training to a file that cannot be read
SAMPLED = 64  # number of files checked for existence before the storage is considered lost
SAMPLED_REMOTE = 8  # likewise where they are on a server, each of which takes seconds if the server is lost

log = logging.getLogger(__name__)


class Unreadable:
    """The files that could not be read so far; safe to use from several threads.

    `add` logs a warning for the 1st, 10th, 100th, ... file of every kind of problem. Otherwise a network mount that is
    lost would produce one line per file.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """`files` are all files that the run reads."""
        step = max(1, len(files) // SAMPLED)
        self._sample = [container(path) for path in files[::step]]
        self._lock, self._looking = threading.Lock(), threading.Lock()
        self._lost = ""  # why the run ends
        self.files: list[tuple[Path, str]] = []  # (path, reason), once per file
        self._seen: set[Path] = set()
        self._count: dict[str, int] = defaultdict(int)  # by kind
        self._missing = 0

    def add(self, path: Path, reason: str, verb: str = "skipped") -> None:
        """Adds a file. Raises InputError if most of the files of the run have disappeared."""
        gone = not _is_there(container(path))
        with self._lock:
            if path in self._seen:
                return
            self._seen.add(path)
            self.files.append((path, reason))
            self._missing += gone
            missing = self._missing
            kind = kind_of(reason)
            self._count[kind] += 1
            count = self._count[kind]
        if count == 1:
            log.warning("%s %s: %s", verb, text_of(path), reason)
        if gone:
            with self._looking:  # other threads wait to be told whether the storage is lost
                if not self._lost and missing & (missing - 1) == 0:  # 1, 2, 4, ...
                    self._lost = self._lost_storage(path, reason)
            if self._lost:
                raise InputError(self._lost)
        if count > 1 and str(count).strip("0") == "1":  # 10, 100, ...
            log.warning("%s %d files so far for this reason: %s (the last: %s)", verb, count, reason, text_of(path))

    def _lost_storage(self, path: Path, reason: str) -> str:
        """Returns what to say if most of a sample of the files have disappeared, else ""."""
        remote = [file for file in self._sample if is_remote(file)]
        sample = remote[:: max(1, len(remote) // SAMPLED_REMOTE)] or self._sample
        lost = sum(not _is_there(file) for file in sample)
        if 2 * lost > len(sample):
            return (
                f"{lost} of {counted(len(sample), 'file')} looked for can no longer be opened, "
                f"for example {text_of(path)!r} "
                f"({reason}): is the disk or network mount or the server that holds them still there? When it is "
                "back, run the same command again; `pretrain` continues with --resume"
            )
        return ""


def kind_of(reason: str) -> str:
    """Returns the reason without the numbers and names in it, equal for problems of one kind."""
    return re.sub(r"'[^']*'|\d+", "*", reason)


def by_kind(files: Iterable[tuple[Path | str, str]]) -> list[str]:
    """Returns one line for each kind of problem of (path, reason): how many files, the reason of the first, and the
    first names. The most frequent kind comes first."""
    kinds: dict[str, list[tuple[Path | str, str]]] = defaultdict(list)
    for path, reason in files:
        kinds[kind_of(reason)].append((path, reason))
    found = sorted(kinds.values(), key=len, reverse=True)
    return [problem_line(members[0][1], [text_of(path) for path, _ in members]) for members in found]


def not_read(files: Collection[tuple[Path | str, str]], happened: str) -> str:
    """Returns a sentence without a full stop about files (path, reason) that could not be read: their number, what
    happened to them, such as "left out", and the kinds of problems with the first names."""
    were = "were" if len(files) > 1 else "was"
    return f"{counted(len(files), 'file')} could not be read and {were} {happened}: {'; '.join(by_kind(files))}"


def _is_there(path: Path) -> bool:
    try:
        if is_remote(path):
            storage_of(path).check(path)
        else:
            os.stat(path)
    except OSError:
        return False
    return True
