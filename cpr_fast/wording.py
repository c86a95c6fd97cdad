"""Words of messages: numbers with their nouns, lists, and names that any terminal can print."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

# Unicode categories that break a line or change what a terminal shows: control characters, lone surrogates (bytes of
# file names that are not UTF-8), line and paragraph separators.
_ESCAPED = ("Cc", "Cs", "Zl", "Zp")


def counted(number: int, noun: str, plural: str = "") -> str:
    """Returns a number with its noun: "1 video", "9,537 videos", or with `plural`: "2 classes"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def ordinal(number: int) -> str:
    """Returns a number with its ending: "2nd", "3rd", "11th"."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def listed(words: Sequence[str]) -> str:
    """Returns words in a sentence: "a", "a and b", "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def printable(text: str) -> str:
    """Returns the text on one line that any terminal can print.

    Control characters, and the bytes of file names that are not UTF-8, are escaped as `repr` does, which most messages
    apply to names.
    """
    return "".join(ascii(sign)[1:-1] if unicodedata.category(sign) in _ESCAPED else sign for sign in text)
