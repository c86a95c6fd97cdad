"""How known data sets lie on disk: which videos there should be, with their class, source and split.

A layout is a function of (root, splits folder, split number); it does not open the videos. Its videos may lie in files
below `root` or, if `root` is an LMDB file, in its records.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from cpr_fast.data.storage.records import open_records, record_path
from cpr_fast.errors import InputError

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})

# The order of the labels in CoCLR's and CPR's HMDB51 checkpoints; IIC's are alphabetical.
HMDB51_CLASSES = [
    "brush_hair", "chew", "climb_stairs", "dribble", "fall_floor", "golf", "hug", "kick_ball", "pick", "punch",
    "ride_bike", "shake_hands", "shoot_gun", "smile", "stand", "sword_exercise", "turn", "cartwheel", "clap", "dive",
    "drink", "fencing", "handstand", "jump", "kiss", "pour", "push", "ride_horse", "shoot_ball", "sit", "smoke",
    "swing_baseball", "talk", "walk", "catch", "climb", "draw_sword", "eat", "flic_flac", "hit", "kick", "laugh",
    "pullup", "pushup", "run", "shoot_bow", "situp", "somersault", "sword", "throw", "wave",
]  # fmt: skip


class Listed(NamedTuple):
    path: Path
    label: str
    source: str
    split: str
    flow_path: Path | None = None


class Problem(NamedTuple):
    """What the index report says of a video."""

    path: Path
    # missing | missing_flow | broken | empty | damaged | too_short | short | variable_rate | rotated; of flow: failed
    kind: str
    reason: str


class Listing(NamedTuple):
    videos: list[Listed]
    classes: list[str]  # in the data set's own order
    problems: list[Problem]


class Catalogue:
    """The videos that are there, by file name without suffix or by the last part of a record's name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        if root.suffix == ".lmdb":
            self.paths = [record_path(root, name) for name in sorted(open_records(root).names)]
        else:
            files = (path for path in root.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
            self.paths = sorted(path for path in files if not path.name.endswith(".flow.mp4"))
        self._exact: dict[str, Path] = {}
        for path in self.paths:
            self._exact.setdefault(path.name if root.suffix == ".lmdb" else path.stem, path)
        self._folded = {name.lower(): path for name, path in reversed(self._exact.items())}

    def find(self, name: str, *, fold: bool = True) -> Path | None:
        """`fold`: a name that differs in case alone will do, such as v_HandStandPushups_* in HandstandPushups."""
        return self._exact.get(name) or (self._folded.get(name.lower()) if fold else None)


def list_videos(
    layout: str, root: Path, splits: Path | None, split: int, *, class_order: str, flow_lmdb: Path | None
) -> Listing:
    """The videos of a data set, classes in the data set's order ("official") or in alphabetical order."""
    if not root.exists() or (root.suffix != ".lmdb" and not root.is_dir()):
        raise InputError(f"root: expected a folder or an LMDB file, got {str(root)!r}")
    if layout == "lmdb" and root.suffix != ".lmdb":
        raise InputError(f"root: layout 'lmdb' expects a file that ends in .lmdb, got {str(root)!r}")
    videos, classes, problems = LAYOUTS[layout](root, splits, split)
    if class_order == "alphabetical":
        classes = sorted(classes)
    place = {label: i for i, label in enumerate(classes)} | {"": len(classes)}
    videos = sorted(videos, key=lambda item: place[item.label])
    if flow_lmdb is not None:
        flow = Catalogue(flow_lmdb)
        name = (lambda path: path.name) if root.suffix == ".lmdb" else (lambda path: path.stem)
        videos = [item._replace(flow_path=flow.find(name(item.path))) for item in videos]
        problems += [Problem(item.path, "missing_flow", f"not in {flow_lmdb.name}") for item in videos
                     if item.flow_path is None]  # fmt: skip
    return Listing(videos, classes, problems)


def clip_source(label: str, name: str) -> str:
    """The source video of a clip by its name in UCF101 (v_X_gNN_cMM), HMDB51 (MOVIE_class_properties_N) or Kinetics
    (YOUTUBEID_start_end); the name itself where it is none of these. Siblings have one class."""
    if found := re.fullmatch(rf"(.+)_{re.escape(label)}_[a-z]_[a-z]{{2}}_np\w+_[a-z]{{2}}_[a-z]{{3}}_\d+", name):
        return f"{label}/{found[1]}"
    if found := re.fullmatch(r"(.{11})_\d{6}_\d{6}", name):
        return found[1]
    return re.sub(r"_c\d+$", "", name)


def _list_folders(root: Path, splits: Path | None, split: int) -> Listing:
    if splits is not None:
        raise InputError(f"splits: layout 'folders' reads the split from the folders, got {str(splits)!r}")
    listed = []
    for path in Catalogue(root).paths:
        parents = path.relative_to(root).parts[:-1]
        if len(parents) not in (1, 2):
            raise InputError(f"{path}: expected ROOT/<class>/<video> or ROOT/<split>/<class>/<video>")
        source = re.sub(r"_c\d+$", "", path.stem)
        listed.append(Listed(path, parents[-1], f"{parents[-1]}/{source}", parents[0] if len(parents) == 2 else ""))
    listed.sort(key=lambda item: (item.label, item.split, item.path))
    return Listing(listed, sorted({item.label for item in listed}), [])


def _list_ucf101(root: Path, splits: Path | None, split: int) -> Listing:
    splits = _required(splits, "ucf101", "classInd.txt and the train and test lists")
    classes = [row[1] for _, row in _list_rows(splits / "classInd.txt", fields=(2,), expected="<number> <class>")]
    rows = []
    for name, file in (("train", f"trainlist{split:02d}.txt"), ("test", f"testlist{split:02d}.txt")):
        for where, row in _list_rows(splits / file, fields=(1, 2), expected="<class>/<video> [<number>]"):
            label, _, video = row[0].partition("/")
            rows.append((where, label, Path(video).stem, name))
    return _find(Catalogue(root), rows, classes)


def _list_hmdb51(root: Path, splits: Path | None, split: int) -> Listing:
    splits = _required(splits, "hmdb51", "the 51 files <class>_test_splitN.txt")
    suffix, rows = f"_test_split{split}.txt", []
    for file in sorted(splits.glob(f"*{suffix}")):
        for where, (video, use) in _list_rows(file, fields=(2,), expected="<video> <0, 1 or 2>"):
            if use not in ("0", "1", "2"):
                raise InputError(f"{where}: expected 0 (unused), 1 (train) or 2 (test), got {use!r}")
            if use != "0":
                label = file.name.removesuffix(suffix)
                rows.append((where, label, Path(video).stem, "train" if use == "1" else "test"))
    if not rows:
        raise InputError(f"splits: expected files <class>{suffix} in {str(splits)!r}, got none")
    return _find(Catalogue(root), rows, HMDB51_CLASSES)


def _list_kinetics(root: Path, splits: Path | None, split: int) -> Listing:
    """Rows of every csv file in `splits`; the classes follow the smallest label map (*label_map*.txt) that has them."""
    splits = _required(splits, "kinetics", "the csv files of Kinetics (label,youtube_id,time_start,time_end,split)")
    catalogue, listed, problems, labels = Catalogue(root), [], [], set()
    for file in sorted(splits.glob("*.csv")):
        for where, row in _csv_rows(file, ("youtube_id", "time_start", "time_end")):
            try:
                clip = f"{row['youtube_id']}_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
            except ValueError:
                raise InputError(f"{where}: expected seconds in time_start and time_end, got {row}") from None
            label = row.get("label") or ""
            labels |= {label} - {""}
            path = catalogue.find(clip, fold=False) or catalogue.find(row["youtube_id"], fold=False)
            if path is None:
                problems.append(Problem(root / clip, "missing", f"listed in {where}, not found"))
                continue
            part = (row.get("split") or file.stem.rpartition("_")[-1]).replace("validate", "val")
            listed.append(Listed(path, label, row["youtube_id"], part))
    return Listing(listed, _kinetics_classes(splits, labels), problems)


def _kinetics_classes(splits: Path, labels: set[str]) -> list[str]:
    maps = [file.read_text(encoding="utf-8").splitlines() for file in splits.glob("*label_map*.txt")]
    if not maps:
        return sorted(labels)
    whole = [names for names in maps if labels <= set(names)]
    if not whole:
        unknown = min((labels - set(names) for names in maps), key=len)
        raise InputError(f"splits: no label map in {str(splits)!r} has the classes {', '.join(sorted(unknown)[:3])}")
    return min(whole, key=len)


def _list_coclr(root: Path, splits: Path | None, split: int) -> Listing:
    """Rows `…/<class>/<video>/,<frames>` of <split>_splitNN.csv or <split>_split.csv; ClassInd.txt if it is there."""
    splits = _required(splits, "coclr", "CoCLR's train_splitNN.csv and test_splitNN.csv")
    rows = []
    for name in ("train", "val", "test"):
        for file in (splits / f"{name}_split{split:02d}.csv", splits / f"{name}_split.csv"):
            for where, line in _lines(file) if file.exists() else ():
                parts = line.rpartition(",")[0].split("/")
                if len(parts) < 3 or parts[-1]:
                    raise InputError(f"{where}: expected <folders>/<class>/<video>/,<frames>, got {line!r}")
                rows.append((where, parts[-3], parts[-2], name))
    if not rows:
        raise InputError(f"splits: expected train_split{split:02d}.csv or test_split{split:02d}.csv in {str(splits)!r}")
    file = splits / "ClassInd.txt"
    named = [re.sub(r"^\d+[ ,]+", "", line).strip() for _, line in _lines(file)] if file.exists() else []
    return _find(Catalogue(root), rows, named or sorted({row[1] for row in rows}))


def _list_lmdb(root: Path, splits: Path | None, split: int) -> Listing:
    """The records by whichever lists lie in `splits`; without any, all of them, in one split."""
    if splits is not None:
        kinds = {"classInd.txt": "ucf101", f"*_test_split{split}.txt": "hmdb51", "*_split*.csv": "coclr"}
        kind = next((layout for pattern, layout in kinds.items() if any(splits.glob(pattern))), "kinetics")
        return LAYOUTS[kind](root, splits, split)
    names = sorted(open_records(root).names)
    pairs = [(name.rpartition("/")[0].rpartition("/")[-1], name.rpartition("/")[-1], name) for name in names]
    videos = [Listed(record_path(root, name), label, clip_source(label, clip), "") for label, clip, name in pairs]
    return Listing(videos, sorted({label for label, _, _ in pairs}), [])


def _find(catalogue: Catalogue, rows: list[tuple[str, str, str, str]], classes: Sequence[str]) -> Listing:
    """Rows ("file:line", class, name, split) of a list, as far as their videos are there."""
    listed, problems, known = [], [], set(classes)
    for where, label, name, split in rows:
        if label not in known:
            raise InputError(f"{where}: class {label!r} is not one of the {len(known)} of the data set")
        path = catalogue.find(name)
        if path is None:
            problem = f"listed in {Path(where.rpartition(':')[0]).name}, not found"
            problems.append(Problem(catalogue.root / label / name, "missing", problem))
        else:
            listed.append(Listed(path, label, clip_source(label, name), split))
    return Listing(listed, list(classes), problems)


def _required(splits: Path | None, layout: str, what: str) -> Path:
    if splits is None:
        raise InputError(f"splits: layout {layout!r} needs the folder of {what}")
    return splits


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """("file:line", line) of every non-empty line of a list."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"split list {str(path)!r} does not exist") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{path}:{number}", line.strip()


def _list_rows(path: Path, fields: Sequence[int], expected: str) -> Iterator[tuple[str, list[str]]]:
    """("file:line", words) of every non-empty line of a split list."""
    for where, line in _lines(path):
        words = line.split()
        if len(words) not in fields:
            raise InputError(f"{where}: expected {expected}, got {line!r}")
        yield where, words


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise InputError(f"{path}:1: missing column {', '.join(missing)}, got {reader.fieldnames}")
        for row in reader:
            yield f"{path}:{reader.line_num}", row


LAYOUTS: dict[str, Callable[[Path, Path | None, int], Listing]] = {
    "folders": _list_folders,
    "ucf101": _list_ucf101,
    "hmdb51": _list_hmdb51,
    "kinetics": _list_kinetics,
    "coclr": _list_coclr,
    "lmdb": _list_lmdb,
}
