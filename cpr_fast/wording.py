"""Words of messages: numbers with their nouns, lists, and names that any terminal can print."""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

# Unicode categories that break a line or change what a terminal shows: control characters, lone surrogates (bytes of
# file names that are not UTF-8), line and paragraph separators.
_ESCAPED = ("Cc", "Cs", "Zl", "Zp")
MOST_NAMES = 1000  # names of a folder among which a similar one is sought; 1,000 take 4 ms (one Zen 4 thread)


def counted(number: int, noun: str, plural: str = "") -> str:
    """Returns a number with its noun: "1 video", "9,537 videos", or with `plural`: "2 classes"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def three_digits(number: float) -> str:
    """Returns a number in three digits, or as a whole number with all of its digits from 1,000 on."""
    return f"{number:,.0f}" if abs(number) >= 999.5 else f"{number:.3g}"


def ordinal(number: int) -> str:
    """Returns a number with its ending: "2nd", "3rd", "11th"."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def listed(words: Sequence[str]) -> str:
    """Returns words in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def not_a_file(path: str | Path) -> str:
    """Returns what a path is that is not a regular file, as the end of a sentence, such as "is a folder", or
    "cannot be reached: Permission denied"."""
    try:
        os.stat(path)
    except PermissionError as error:  # os.path treats such a file as one that does not exist
        return f"cannot be reached: {error.strerror}"
    except (OSError, ValueError):
        pass
    if os.path.isdir(path):
        return "is a folder"
    if os.path.exists(path):
        return "is a pipe, a device or a socket"
    if os.path.islink(path):
        return f"is a link to {os.readlink(path)!r}, which leads to no file"
    return "does not exist"


def expected(what: str, path: str | Path, state: str = "") -> str:
    """Returns the sentence about a path that a user named and that is not what a command expects.

    For example "expected a file, but 'six.csv' does not exist; did you mean 'set.csv'?". `state` says what the path is
    instead, by default `not_a_file`.
    """
    state = state or not_a_file(path)
    sentence = f"expected {what}, but {str(path)!r} {state}"
    if state != "does not exist":
        return sentence
    if close := similar_path(path):
        return f"{sentence}; did you mean {close!r}?"
    folder = os.path.dirname(path)
    return sentence if not folder or os.path.exists(folder) else f"{sentence}, nor does the folder {folder!r}"


def similar_path(path: str | Path) -> str:
    """Returns an existing path of a name that is similar to one that does not exist, or "" if there is none.

    Similar are names of the same suffix, or of one that is spelled almost like it, in the same folder, and paths below
    a folder of a similar name.
    """
    folder, name = os.path.split(str(path).rstrip("/"))
    if not name:
        return ""
    folders = [folder]
    if folder and not os.path.isdir(folder):
        folders = [similar_path(folder)]
        if not folders[0]:
            return ""
        if os.path.exists(os.path.join(*folders, name)):
            return os.path.join(*folders, name)
    try:
        names = os.listdir(folders[0] or ".")
    except (OSError, ValueError):
        return ""
    stem, suffix = os.path.splitext(name)
    alike = [suffix, *difflib.get_close_matches(suffix, {os.path.splitext(other)[1] for other in names} - {suffix})]
    for ending in alike:
        stems = {os.path.splitext(other)[0]: other for other in names if os.path.splitext(other)[1] == ending}
        close = difflib.get_close_matches(stem, stems, n=1) if len(stems) <= MOST_NAMES else []
        if close:
            return os.path.join(folders[0], stems[close[0]])
    return ""


def printable(text: str) -> str:
    """Returns the text on one line that any terminal can print.

    Control characters, and the bytes of file names that are not UTF-8, are escaped as `repr` does, which most messages
    apply to names.
    """
    return "".join(ascii(sign)[1:-1] if unicodedata.category(sign) in _ESCAPED else sign for sign in text)
