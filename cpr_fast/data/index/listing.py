"""The videos that a layout lists, with class, source and split (not yet opened), and checks for contradictions."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cpr_fast.data.index.catalogue import Problem, plain
from cpr_fast.wording import counted

# Names of splits, in lower case, and what they are called in an index.
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test", "val": "val", "valid": "val",
          "validate": "val", "validation": "val"}  # fmt: skip

_UCF101 = r"v_(?P<class>.+)_g\d+_c\d+"
_HMDB51 = r"_[a-z]_[a-z]{2}_np\w+_[a-z]{2}_[a-z]{3}_\d+"  # properties of a clip, after its film and class


class Row(NamedTuple):
    """A row of a list."""

    where: str  # "file:line"
    label: str
    file: str  # the video's name, with or without a suffix
    split: str
    number: str = ""  # of the class, if the list gives one

    @property
    def place(self) -> str:
        """`where` without the folder."""
        return short_place(self.where)


class Listed(NamedTuple):
    """A video that a layout lists; the file has not been opened yet."""

    path: Path
    label: str  # "" if unlabelled
    source: str  # equal for clips of one source video
    split: str  # "" if there is none
    flow_path: Path | None = None


class Listing(NamedTuple):
    """What a layout found: the videos, the classes, and problems of files and lists."""

    videos: list[Listed]
    classes: list[str]  # in the data set's own order
    problems: list[Problem]
    levels: str = ""  # how the levels of folders were interpreted
    others: dict[str, int] = {}  # number of files that are not read, by suffix


def short_place(where: str) -> str:
    """Returns the place of a line, "file:line", without the folder of the file."""
    return where.rpartition("/")[2]


def known_split(name: str) -> str:
    """Returns the name of a split without blanks around it, and in lower case if it is then one of SPLITS."""
    return name.strip().lower() if name.strip().lower() in SPLITS else name.strip()


def split_name(name: str) -> str:
    """Returns what a split is called in an index."""
    return SPLITS.get(name.strip().lower(), name.strip())


def split_in(name: str) -> str:
    """Returns the split that a word in the name of a file or folder names, "" if none or several do."""
    found = {SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLITS}
    return found.pop() if len(found) == 1 else ""


def clip_source(label: str, name: str) -> str:
    """Returns the source of a clip by its name in UCF101 (v_X_gNN_cMM), HMDB51 (MOVIE_class_properties_N) or Kinetics
    (YOUTUBEID_start_end); any other clip is its own source, identified by class and name, because equal names in two
    classes denote different videos.
    """
    if found := re.fullmatch(rf"(.+)_{re.escape(label)}{_HMDB51}", name):
        return f"{label}/{found[1]}"
    if found := re.fullmatch(r"(.{11})_\d{6}_\d{6}", name):
        return found[1]
    source = re.sub(r"_c\d+$", "", name)
    return source if source.lower().startswith(f"v_{label.lower()}_") else "/".join(filter(None, (label, source)))


def class_in_name(name: str, label: str, classes: Mapping[str, str]) -> str:
    """Returns the class that a file name in the style of UCF101 or HMDB51 (see `clip_source`) states: `label` if the
    name may mean it, else one of `classes`, which are by their plain names; "" if it states none of them."""
    if found := re.fullmatch(_UCF101, name, re.IGNORECASE):
        return classes.get(plain(found["class"]), "")
    if found := re.fullmatch(rf"(.+){_HMDB51}", name):  # of a film "x_draw", or of the class "draw_sword"
        stated = [other for other in classes.values() if found[1].endswith(f"_{other}")]
        return label if label in stated else max(stated, key=len, default="")
    return ""


def other_classes(paths: Mapping[Row, Path], numbers: Mapping[str, int], classes: Sequence[str]) -> list[Problem]:
    """Returns a problem for every row, found at a path, whose number or file name says another class than the list;
    `numbers` are those of the classes."""
    problems, wrong, by_name = [], _wrong_numbers(paths, numbers), {plain(label): label for label in classes}
    for row, path in paths.items():
        stated = class_in_name(path.stem, row.label, by_name)
        if reason := wrong.get(row) or (f"its name says {stated!r}" if stated not in ("", row.label) else ""):
            kept = f"is listed in class {row.label!r} ({row.place}), which the index says, but {reason}"
            problems.append(Problem(path, "other_class", kept))
    return problems


def _wrong_numbers(rows: Iterable[Row], numbers: Mapping[str, int]) -> dict[Row, str]:
    """Returns the rows whose number is not that of their class, with the reason.

    Lists that count from 0 where the list of classes counts from 1, or the reverse, are right.
    """
    away = {row: int(row.number) - numbers[row.label] for row in rows if row.number and row.label in numbers}
    if set(away.values()) in ({1}, {-1}) and len({row.label for row in away}) > 1:
        return {}
    names = {number: repr(label) for label, number in numbers.items()}
    return {row: f"its number {row.number} there is that of {names.get(int(row.number), 'no class')}"
            for row, off in away.items() if off}  # fmt: skip


def without_contradictions(listing: Listing) -> Listing:
    """Keeps one row for every video, and reports repeated and contradictory rows.

    A video that is listed with two classes is left out, because the correct class is unknown. A video that is listed in
    two splits is kept only in the evaluation split, so that no test video is used for training.
    """
    rows: dict[Path, list[Listed]] = defaultdict(list)
    for item in listing.videos:
        rows[item.path].append(item)
    videos, problems = [], list(listing.problems)
    for path, found in rows.items():
        labels = sorted({item.label for item in found})
        splits = sorted({item.split for item in found}, key=lambda name: (name != "test", name == "train", name))
        if len(labels) > 1:
            reason = f"is listed in classes {' and '.join(map(repr, labels))}"
            problems.append(Problem(path, "two_classes", reason))
            continue
        if len(splits) > 1:
            reason = f"is listed in splits {' and '.join(map(repr, splits))}; kept in {splits[0]!r} only"
            problems.append(Problem(path, "two_splits", reason))
        elif len(found) > 1:
            problems.append(Problem(path, "repeated", f"is listed {len(found)} times; kept once"))
        videos.append(next(item for item in found if item.split == splits[0]))
    return listing._replace(videos=videos, problems=problems + _leaks(videos) + _similar_classes(videos))


def _leaks(videos: list[Listed]) -> list[Problem]:
    """Returns a problem for every source that is in the training split and in another one."""
    splits: dict[str, dict[str, Path]] = defaultdict(dict)
    for item in videos:
        splits[item.source].setdefault(item.split, item.path)
    return [
        Problem(found["train"], "shared_source", f"source {source!r} is also in split {_names(set(found) - {'train'})}")
        for source, found in splits.items()
        if "train" in found and len(found) > 1
    ]


def _similar_classes(videos: list[Listed]) -> list[Problem]:
    """Returns a problem for every class whose name differs from a more frequent one only in case, blanks or hyphens."""
    groups: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for item in videos:
        groups[plain(item.label)][item.label].append(item.path)
    problems = []
    for group in groups.values():
        most, *others = sorted(group, key=lambda label: (-len(group[label]), label))
        for label in others:
            videos_of = counted(len(group[label]), "video")
            reason = f"class {label!r} of {videos_of} is spelled almost like {most!r}; they are two classes, as written"
            problems.append(Problem(group[label][0], "similar_classes", reason))
    return problems


def _names(names: set[str]) -> str:
    return " and ".join(map(repr, sorted(names)))
