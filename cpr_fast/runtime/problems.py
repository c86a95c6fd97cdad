"""Problems of many files, grouped by kind. One line per kind gives the number of files and the names of the first
ones."""

from __future__ import annotations

from pathlib import Path

from cpr_fast.wording import printable

NAMED = 3  # files named in a line


class Problems:
    """Counts problems by kind. If a mount is lost, for example, this gives one line instead of one line per file."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, kind: str, name: str | Path) -> None:
        """Adds a file; `kind` says in a few words what is wrong with it, such as "does not exist"."""
        self._names.setdefault(kind, []).append(str(name))

    def __len__(self) -> int:
        return sum(map(len, self._names.values()))

    def counts(self) -> dict[str, int]:
        """Returns the number of files of each kind, the most frequent kind first."""
        return {kind: len(names) for kind, names in sorted(self._names.items(), key=lambda item: -len(item[1]))}

    def lines(self) -> list[str]:
        """Returns one line per kind: "4 files: does not exist: a.mp4, b.mp4, c.mp4 and 1 more"."""
        return [problem_line(kind, self._names[kind]) for kind in self.counts()]


def problem_line(kind: str, names: list[str]) -> str:
    """Returns the line of one kind of problem. Names that are not valid Unicode are printed with escapes."""
    first = [printable(name) for name in names[:NAMED]]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} {'file' if len(names) == 1 else 'files'}: {kind}: {', '.join(first)}{more}"
