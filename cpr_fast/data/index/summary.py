"""The report of an index as text for people: counts, kinds of problems with their first names, the next command."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

# kind of a problem -> (whether the video is in the index, what the summary says of it)
KINDS: dict[str, tuple[bool, str]] = {
    "missing": (False, "listed or linked, but not found"),
    "broken": (False, "do not decode"),
    "empty": (False, "are empty files"),
    "unreadable": (False, "could not be read"),
    "unreadable_folder": (False, "are folders that could not be read"),
    "unreadable_name": (False, "have a name that cannot be used"),
    "unfinished": (False, "are unfinished downloads"),
    "hidden": (False, "are hidden"),
    "empty_folder": (False, "are folders without a video"),
    "link_loop": (False, "are links that lead back to their own folder"),
    "two_classes": (False, "are listed in two classes"),
    "rotated": (False, "are stored rotated"),
    "too_short": (False, "have fewer frames than --min-frames"),
    "failed": (False, "have no flow, which could not be computed"),
    "damaged": (True, "are damaged"),
    "size_change": (True, "change their frame size, and are kept up to the change"),
    "several_streams": (True, "have several video streams"),
    "short": (True, "are short for clips of 32 frames"),
    "variable_rate": (True, "have a variable frame rate"),
    "no_class": (True, "lie beside the class folders and have no class"),
    "repeated": (True, "are listed more than once"),
    "ambiguous": (True, "share their name with another file"),
    "two_splits": (True, "are listed in two splits"),
    "shared_source": (True, "have clips of their source in the training split and in another one"),
    "same_file": (True, "are the same file as another one, by a link"),
    "missing_flow": (True, "have no record in --flow-lmdb"),
    "flow_dropped": (True, "had flow in the previous index, which does not fit any more"),
    "replaced": (True, "had another class, source or split in the previous index"),
}
FIRST = 3  # names per kind


def summary(report: dict[str, Any]) -> str:
    """Returns the report of `write_index` as lines of text."""
    if report["index"] is None:
        return (
            f"{report['probed']:,} videos probed. {report['left']:,} have no result yet: run the other shards, "
            "or run this command again for those that could not be read."
        )
    counts = (_count(report["videos"], "video"), _count(report["classes"], "class", "classes"),
              _count(report["sources"], "source"), _splits(report["splits"]))  # fmt: skip
    lines = [f"{report['index']}: {', '.join(counts)}"]
    if report["levels"]:
        lines.append(f"  {report['levels']}")
    if report["unlabelled"] and report["classes"]:
        lines.append(f"  {_count(report['unlabelled'], 'video')} without a class")
    lines += _problems(report["problems"])
    if report["other_files"]:
        named = ", ".join(f"{count:,} {suffix}" for suffix, count in _largest(report["other_files"]))
        lines.append(f"Not taken for videos: {named}")
    if report["problems"]:
        lines.append(f"All problems: {Path(report['index']).with_suffix('.report.json')}")
    return "\n".join([*lines, *_next(report)])


def grouped(problems: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Returns the problems by kind, in the order of `KINDS`: what is left out comes first."""
    groups = defaultdict(list)
    for problem in problems:
        groups[problem["kind"]].append(problem)
    order = list(KINDS)
    return dict(sorted(groups.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _problems(problems: list[dict[str, str]]) -> list[str]:
    lines, title = [], None
    for kind, found in grouped(problems).items():
        kept, says = KINDS.get(kind, (True, kind))
        if title != (title := "Listed, with a remark:" if kept else "Left out:"):
            lines.append(title)
        first = "; ".join(f"{_shown(problem['path'])}: {_shown(problem['reason'])}" for problem in found[:FIRST])
        more = f"; and {len(found) - FIRST:,} more" if len(found) > FIRST else ""
        lines.append(f"  {len(found):,} {says} ({kind}): {first}{more}")
    return lines


def _shown(text: str) -> str:
    """Returns a text that any terminal prints on one line: names may hold line breaks or bytes that are not UTF-8."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def _splits(splits: dict[str, int]) -> str:
    if set(splits) <= {""}:
        return "no splits"
    return ", ".join(f"{name or 'no split'} {count:,}" for name, count in splits.items())


def _largest(counts: dict[str, int], most: int = 6) -> list[tuple[str, int]]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ordered[most:])
    return [(_shown(name), count) for name, count in ordered[:most]] + ([("others", rest)] if rest else [])


def _next(report: dict[str, Any]) -> list[str]:
    lines = []
    if "train" not in report["splits"] and set(report["splits"]) <= {""}:
        lines.append("The index has no splits: pretraining reads all videos; evaluate with "
                     "`cpr-fast retrieve --protocol leave_source_out`.")  # fmt: skip
    return [*lines, f"Next: cpr-fast doctor {report['index']}", f"      cpr-fast flow {report['index']} --out flow"]


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
