"""Formats the report of an index as text: counts, kinds of problems with their first names, the next command, and the
command that writes the index again."""

from __future__ import annotations

import json
import os
import shlex
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cpr_fast.config.recipes import init_command
from cpr_fast.data.files.names import is_remote
from cpr_fast.data.index.index import Video, too_few
from cpr_fast.data.index.rows.columns import PARQUET
from cpr_fast.data.storage.media import container
from cpr_fast.wording import counted, printable

# kind of a problem -> (whether the video is in the index, what the kind means)
KINDS: dict[str, tuple[bool, str]] = {
    "missing": (False, "listed or linked, but not found"),
    "broken": (False, "not decodable"),
    "empty": (False, "file without content"),
    "unreadable": (False, "could not be read"),
    "unreadable_folder": (False, "folder that could not be read"),
    "unreadable_name": (False, "name that cannot be used"),
    "unfinished": (False, "unfinished download or copy"),
    "hidden": (False, "hidden file or folder"),
    "empty_folder": (False, "folder without a video"),
    "link_loop": (False, "link back to its own folder"),
    "unreadable_shard": (False, "tar file that could not be read"),
    "no_video": (False, "key of a tar file without a video"),
    "two_classes": (False, "listed in two classes"),
    "rotated": (False, "stored rotated"),
    "too_short": (False, "fewer frames than --min-frames"),
    "failed": (False, "flow not computed"),
    "not_listed": (False, "only in the previous index"),
    "damaged_shard": (True, "tar file that is cut off; its whole members are listed"),
    "repeated_key": (True, "key of an earlier sample of the tar files"),
    "bad_text": (True, "JSON or text beside the video that cannot be used"),
    "damaged": (True, "frames missing or decoded with errors"),
    "size_change": (True, "frame size changes; kept up to the change"),
    "several_streams": (True, "one of several video streams is read"),
    "short": (True, "short for clips of 32 frames"),
    "variable_rate": (True, "variable frame rate"),
    "no_rate": (True, "frame rate not stated"),
    "no_class": (True, "beside the class folders"),
    "repeated": (True, "listed more than once"),
    "ambiguous": (True, "same name as another file"),
    "two_splits": (True, "listed in two splits"),
    "shared_source": (True, "source in the training split and in another one"),
    "same_file": (True, "same file as another one, by a link"),
    "same_content": (True, "copy of another file, byte by byte"),
    "other_class": (True, "number or name of another class than that of the list"),
    "similar_classes": (True, "class spelled almost like another one"),
    "empty_list": (True, "split list that names no video"),
    "missing_flow": (True, "no flow that can be read"),
    "flow_length": (True, "flow of another length; kept as far as it reaches"),
    "flow_dropped": (True, "flow of the previous index does not fit any more"),
    "replaced": (True, "other class, source or split in the previous index"),
}
# What to do about videos of which the index lists copies; the page of similar videos and docs/data.md say the same.
COPIES = (
    "Exact copies whose sources differ count as different videos. Delete the row of one of them from the index, or "
    "give both the same source."
)
LARGE = 100_000  # videos, from which on an index in Parquet is worth its package
FIRST = 3  # number of names printed per kind of problem


def report_path(out: Path) -> Path:
    """Returns the path of the report of an index."""
    return out.with_suffix(".report.json")


def index_command(index: Path, videos: Iterable[Video] = (), **changes: str) -> str:
    """Returns the command that lists the videos of an index again, with the options that its report records; without a
    report, for the folder that all `videos` share, and without these "" where the folder is not known.

    `changes` are options by name, such as min_frames="2"; "" stands for a switch.
    """
    try:
        report = json.loads(report_path(index).read_text(encoding="utf-8"))
        root, options = report["root"], dict(report["options"])
    except (OSError, ValueError, KeyError, TypeError):
        if any(is_remote(video.path) for video in videos):
            return ""
        folders = [os.path.dirname(os.path.abspath(container(video.path))) for video in videos]
        if not folders:
            return ""
        root, options = os.path.commonpath(folders), {}
    if "verify" in changes:
        options.pop("no_verify", None)
    return command_of(root, index, options | changes)


def command_of(root: str | Path, out: str | Path, options: dict[str, str], *further: str) -> str:
    """Returns the command that lists the videos of `root` in the index `out`; `options` are those of
    `IndexOptions.given`, and `further` are words that follow."""
    words = ["cpr-fast", "index", _from_here(str(root)), "--out", str(out)]
    for name, value in options.items():
        shown = _from_here(value) if os.path.isabs(value) else value
        words += [f"--{name.replace('_', '-')}", *([shown] if shown else [])]
    return shlex.join([*words, *further])


def _from_here(path: str) -> str:
    """Returns an absolute path relative to the working directory if it is inside it."""
    here = os.path.relpath(path)
    return path if here.split(os.sep)[0] == ".." else here


def summary(report: dict[str, Any], others: str = "") -> list[str]:
    """Returns the report of `write_index` as lines of text; `others` names the other shards, if there are any."""
    if report["index"] is None:
        shards = f"run the other shards ({others}), or " if others else ""
        return [
            f"{counted(report['probed'], 'video')} probed. {report['left']:,} have no result yet: {shards}run this "
            "command again for those that could not be read."
        ]
    counts = (counted(report["videos"], "video"), _classes(report["classes"]),
              counted(report["sources"], "source"), splits_of(report["splits"]))  # fmt: skip
    lines = [f"{report['index']}: {', '.join(counts)}"]
    if report["levels"]:
        lines.append(f"  {report['levels']}")
    if report["sources"] == report["videos"]:
        lines.append("  every video is a source (the recording that clips were cut from) of its own")
    else:
        lines.append("  a source is the recording that videos were cut from: those of one are never compared")
    if report["unlabelled"] and report["classes"]:
        lines.append(f"  {counted(report['unlabelled'], 'video')} without a class")
    lines += _problems(report["problems"])
    if report["other_files"]:
        named = ", ".join(f"{count:,} {suffix}" for suffix, count in _largest(report["other_files"]))
        lines.append(f"Other files, not read: {named}")
    if report["problems"]:
        lines.append(f"All problems: {report_path(Path(report['index']))}")
    if missing := _too_few(report):
        lines.append(f"Too few videos for pretraining: {missing}.")
    elif set(report["splits"]) <= {""}:
        lines.append("Without splits pretraining reads all videos, and in `cpr-fast retrieve` every video queries "
                     "those of all other sources.")  # fmt: skip
    if report["videos"] > LARGE and not report["index"].endswith(PARQUET):
        lines.append(
            f"Every command opens an index of more than {LARGE:,} videos faster from Parquet: --out index.parquet"
        )
    if report["without_flow"] and not missing:
        flow = f"cpr-fast flow {shlex.quote(report['index'])} --out flow"
        lines.append(f"Optional before the next step: `{flow}` computes optical flow, the published second view, "
                     "which takes long.")  # fmt: skip
    return lines


def _too_few(report: dict[str, Any]) -> str:
    """Returns why the index has too few videos for pretraining, or "" if it has enough."""
    return too_few(*(report["training"][key] for key in ("videos", "sources", "split")), report["splits"])


def grouped(problems: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Returns the problems by kind, in the order of `KINDS`: videos that are left out come first."""
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
        first = "; ".join(f"{printable(problem['path'])}: {printable(problem['reason'])}" for problem in found[:FIRST])
        more = f"; and {len(found) - FIRST:,} more" if len(found) > FIRST else ""
        lines.append(f"  {len(found):,} {kind} ({says}): {first}{more}")
        if kind in ("same_file", "same_content"):
            lines.append(f"    {COPIES}")
    return lines


def _classes(number: int) -> str:
    return counted(number, "class", "classes") if number else "no classes (pretraining needs none)"


def splits_of(splits: Mapping[str, int]) -> str:
    """Returns the numbers of videos by split: "train 20, test 5, 19 videos without a split"."""
    if set(splits) <= {""}:
        return "no splits"
    without = [f"{counted(splits[''], 'video')} without a split"] if splits.get("") else []
    return ", ".join([f"{name} {count:,}" for name, count in splits.items() if name] + without)


def _largest(counts: dict[str, int], most: int = 6) -> list[tuple[str, int]]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ordered[most:])
    return [(printable(name), count) for name, count in ordered[:most]] + ([("others", rest)] if rest else [])


def next_step(report: dict[str, Any]) -> str:
    """Returns the command that a user may want to run next, or "" while no index is written."""
    if report["index"] is None:
        return ""
    if _too_few(report):
        return "add videos to pretrain on, and run this command again"
    return init_command(report["index"])
