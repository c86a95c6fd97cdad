"""The layouts of known data sets: which videos the official lists name, with their class, source and split.

A layout is a function of (catalogue, folder of the lists, number of the split) that does not open the videos. They are
files below a folder or, if the root is an LMDB file, its records.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from cpr_fast.data.files.names import is_remote, text_of
from cpr_fast.data.index.catalogue import Catalogue, Problem, plain, without_suffix
from cpr_fast.data.index.formats.folders import list_folders
from cpr_fast.data.index.formats.frames import list_frames
from cpr_fast.data.index.formats.lists import list_lines
from cpr_fast.data.index.formats.shards import list_shards
from cpr_fast.data.index.listing import (
    Listed,
    Listing,
    Row,
    clip_source,
    other_classes,
    split_name,
    without_contradictions,
)
from cpr_fast.data.index.tables import read_lines, read_table, require_utf8
from cpr_fast.data.storage.records import split_record
from cpr_fast.errors import InputError
from cpr_fast.wording import counted

# The order of the labels in CoCLR's and CPR's HMDB51 checkpoints; IIC's are alphabetical.
HMDB51_CLASSES = [
    "brush_hair", "chew", "climb_stairs", "dribble", "fall_floor", "golf", "hug", "kick_ball", "pick", "punch",
    "ride_bike", "shake_hands", "shoot_gun", "smile", "stand", "sword_exercise", "turn", "cartwheel", "clap", "dive",
    "drink", "fencing", "handstand", "jump", "kiss", "pour", "push", "ride_horse", "shoot_ball", "sit", "smoke",
    "swing_baseball", "talk", "walk", "catch", "climb", "draw_sword", "eat", "flic_flac", "hit", "kick", "laugh",
    "pullup", "pushup", "run", "shoot_bow", "situp", "somersault", "sword", "throw", "wave",
]  # fmt: skip

# The name of a video in a list, which may be quoted; with blanks in it, it ends in a suffix.
_VIDEO = r'"?([^\s"]+?|[^"]+?\.\w{2,5})"?'


# The lists that a layout needs.
LISTS = {
    "ucf101": "classInd.txt and the train and test lists",
    "hmdb51": "the 51 files <class>_test_splitN.txt",
    "kinetics": "the csv files of Kinetics (label,youtube_id,time_start,time_end,split)",
    "coclr": "CoCLR's train_splitNN.csv and test_splitNN.csv",
}


def require_splits(layout: str, splits: Path | None) -> None:
    """Raises InputError if the folder of the split lists is missing, or is given for a layout that has none. Takes no
    time: looking for videos on a large disk takes minutes."""
    if splits is None and layout in LISTS:
        raise InputError(f"--splits: layout {layout!r} needs the folder of {LISTS[layout]}")
    if splits is not None and layout in ("folders", *FORMATS):
        where = "the lists" if layout == "list" else "the tar files" if layout == "tar" else "the folders"
        raise InputError(f"--splits: layout {layout!r} reads the split from {where}, got {str(splits)!r}")
    if splits is not None and not splits.is_dir():
        raise InputError(f"--splits: expected the folder of the split lists, got {str(splits)!r}")


def list_videos(
    layout: str,
    root: Path,
    splits: Path | None,
    split: int,
    *,
    class_order: str,
    flow_lmdb: Path | None,
    exclude: Path | None = None,
    classes: bool = True,
) -> Listing:
    """Lists the videos of a data set, sorted by class in the data set's order ("official") or by "alphabetical" order.

    `exclude` is a folder below the root that is skipped; without `classes` no video gets one. Raises InputError if the
    root or a list does not match the layout.
    """
    _require_root(layout, root)
    require_splits(layout, splits)
    if layout in FORMATS:
        listing = without_contradictions(FORMATS[layout](root))
    else:
        catalogue = Catalogue(root, exclude)
        listing = without_contradictions(LAYOUTS[layout](catalogue, splits, split))
        listing = listing._replace(problems=catalogue.problems + listing.problems, others=dict(catalogue.others))
    folders = {item.path: item.label for item in listing.videos}  # records of flow are named by them, classes or not
    named = {*listing.classes, *folders.values()} - {""}
    if not classes:
        listing = _without_classes(listing)
    if not listing.classes:
        listing = listing._replace(
            videos=[item._replace(label="") for item in listing.videos],
            problems=[problem for problem in listing.problems if problem.kind != "similar_classes"],
        )
    order = sorted(listing.classes) if class_order == "alphabetical" else listing.classes
    place = {label: i for i, label in enumerate(order)} | {"": len(order)}
    videos = sorted(listing.videos, key=lambda item: place[item.label])
    problems = list(listing.problems)
    if flow_lmdb is not None:
        flow = Catalogue(flow_lmdb)
        found = (flow.find(folders[item.path], _name(item.path), item.split, named) for item in videos)
        videos = [item._replace(flow_path=next(iter(paths), None)) for item, paths in zip(videos, found, strict=True)]
        problems += [Problem(item.path, "missing_flow", f"not in {flow_lmdb.name}") for item in videos
                     if item.flow_path is None]  # fmt: skip
    return listing._replace(videos=videos, classes=order, problems=problems)


def _require_root(layout: str, root: Path) -> None:
    """Raises InputError if the root is not of the kind that the layout reads."""
    if layout == "list" and (is_remote(root) or not (root.is_dir() or root.is_file())):
        raise InputError(f"ROOT: --layout list expects a text file, or a folder of them, got {text_of(root)!r}")
    if is_remote(root):
        if layout not in ("folders", "tar"):
            raise InputError(
                f"ROOT: --layout {layout} reads files of this machine, got {text_of(root)!r}; a list of URLs "
                "(--layout list) names objects on a server"
            )
        return
    if layout == "tar" and root.is_file() and root.suffix != ".tar":
        raise InputError(f"ROOT: --layout tar expects a file that ends in .tar, or a folder, got {str(root)!r}")
    if not root.exists() or (layout not in ("list", "tar") and root.suffix != ".lmdb" and not root.is_dir()):
        advice = {".tar": "; --layout tar reads tar files", ".txt": "; --layout list reads lists"}
        hint = advice.get(root.suffix.lower(), "") if root.is_file() else ""
        raise InputError(f"ROOT: expected a folder or an LMDB file, got {str(root)!r}{hint}")
    if layout == "lmdb" and root.suffix != ".lmdb":
        raise InputError(f"ROOT: --layout lmdb expects a file that ends in .lmdb, got {str(root)!r}")


def _name(path: Path) -> str:
    return path.stem if split_record(path) is None else path.name


def _without_classes(listing: Listing) -> Listing:
    problems = [problem for problem in listing.problems if problem.kind not in ("no_class", "similar_classes")]
    split = listing.levels.split(";")[0]
    levels = f"{split}; no folder is taken as a class" if listing.levels else ""
    return listing._replace(classes=[], problems=problems, levels=levels)


def _list_ucf101(catalogue: Catalogue, splits: Path | None, split: int) -> Listing:
    splits = _given(splits)
    classes, rows = _numbered_classes(splits / "classInd.txt"), []
    files = {"train": splits / f"trainlist{split:02d}.txt", "test": splits / f"testlist{split:02d}.txt"}
    for name, file in files.items():
        expected = "<class>/<video> [<number>]"
        for where, (video, number) in _matches(file, rf"{_VIDEO}(?:[\s;,]+(\d*))?", expected):
            *folders, video = video.replace("\\", "/").split("/")
            if not folders:
                raise InputError(f"{where}: expected {expected}, got {video!r}")
            label = next((folder for folder in reversed(folders) if folder in classes), folders[-1])
            rows.append(Row(where, label, video, name, number or ""))
    return _find(catalogue, rows, list(classes), list(files.values()), classes)


def _numbered_classes(file: Path) -> dict[str, int]:
    """Reads a list of classes with their numbers, or those of the lines if they have none, and sorts it by them."""
    numbers: dict[str, int] = {}
    places: dict[str | int, str] = {}  # of each class and number
    for line, (where, (number, label)) in enumerate(_matches(file, r"(?:(\d+)[\s;,]+)?(\S.*)", "<number> <class>")):
        place = int(number or line)
        for key, what in ((label, f"class {label!r}"), (place, f"number {place} of class {label!r}")):
            if key in places:
                raise InputError(f"{where}: {what} repeats {places[key]}")
            places[key] = where
        numbers[label] = place
    return dict(sorted(numbers.items(), key=lambda item: item[1]))


def _list_hmdb51(catalogue: Catalogue, splits: Path | None, split: int) -> Listing:
    splits = _given(splits)
    suffix, rows = f"_test_split{split}.txt", []
    if not (files := sorted(splits.glob(f"*{suffix}"))):
        raise InputError(f"--splits: expected files <class>{suffix} in {str(splits)!r}, got none")
    for file in files:
        for where, (video, use) in _matches(file, rf"{_VIDEO}[\s;,]+(\S+)", "<video> <0, 1 or 2>"):
            if use not in ("0", "1", "2"):
                raise InputError(f"{where}: expected 0 (unused), 1 (train) or 2 (test), got {use!r}")
            if use != "0":
                rows.append(Row(where, file.name.removesuffix(suffix), video, "train" if use == "1" else "test"))
    return _find(catalogue, rows, HMDB51_CLASSES, files)


def _list_kinetics(catalogue: Catalogue, splits: Path | None, split: int) -> Listing:
    """Reads every csv file in `splits`; the classes follow the smallest label map (*label_map*.txt) that has them."""
    splits = _given(splits)
    rows, ids, spelled = [], [], {}
    files = sorted(splits.glob("*.csv"))
    if not files:
        raise InputError(f"--splits: expected the csv files of Kinetics in {str(splits)!r}, got none")
    for file in files:
        for where, row in _kinetics_rows(file):
            clip = f"{row['youtube_id']}_{_seconds(where, row, 'time_start')}_{_seconds(where, row, 'time_end')}"
            part = row.get("split") or file.stem.rpartition("_")[-1]
            spelled[part] = split_name(part)
            rows.append(Row(where, row.get("label") or "", clip, spelled[part]))
            ids.append(row["youtube_id"])
    labels = {row.label for row in rows} - {""}
    listed, problems = [], _without_rows(rows, files)
    for row, video in zip(rows, ids, strict=True):
        names = (row.file, video)  # with and without the times
        found = next(
            filter(None, (catalogue.find(row.label, name, row.split, labels, fold=False) for name in names)), []
        )
        if found:
            listed.append(Listed(found[0], row.label, video, row.split))
            problems += _ambiguous(found)
        else:
            problems.append(_missing(catalogue, row))
    changed = ", ".join(f"{name!r} is {part!r}" for name, part in sorted(spelled.items()) if name != part)
    levels = f"names of splits are read in any case, and as train, test or val: {changed}" if changed else ""
    return Listing(listed, _kinetics_classes(splits, labels), problems, levels)


def _kinetics_rows(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    needed = ("youtube_id", "time_start", "time_end")
    header, rows = read_table(file, ("label", *needed, "split"))
    if missing := [name for name in needed if name not in header]:
        raise InputError(f"{file}:1: missing column {', '.join(missing)}, got {header or 'an empty file'}")
    if repeated := [name for name in dict.fromkeys(header) if header.count(name) > 1]:
        raise InputError(f"{file}:1: expected every column once, got {', '.join(map(repr, repeated))} more than once")
    for where, row in rows:
        fields = list(map(str.strip, row))
        if len(fields) < len(header) or any(fields[len(header) :]):
            raise InputError(f"{where}: expected {counted(len(header), 'field')}, got {len(fields)}")
        require_utf8(where, ",".join(fields))
        found = dict(zip(header, fields, strict=False))
        if not found["youtube_id"]:
            raise InputError(f"{where}, column youtube_id: expected the id of a video, got ''")
        yield where, found


def _seconds(where: str, row: dict[str, str], column: str) -> str:
    """Returns whole seconds as the names of Kinetics' files have them, such as "000084"."""
    try:
        value = float(row[column].replace(",", "."))  # a spreadsheet may write 84,0
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e6:
        raise InputError(f"{where}, column {column}: expected seconds, got {row[column]!r}")
    return f"{int(value):06d}"


def _kinetics_classes(splits: Path, labels: set[str]) -> list[str]:
    maps = [[line for _, line in read_lines(file, "label map")] for file in sorted(splits.glob("*label_map*.txt"))]
    if not maps:
        return sorted(labels)
    whole = [names for names in maps if labels <= set(names)]
    if not whole:
        unknown = min((labels - set(names) for names in maps), key=len)
        raise InputError(f"--splits: no label map in {str(splits)!r} has the classes {', '.join(sorted(unknown)[:3])}")
    return min(whole, key=len)


def _list_coclr(catalogue: Catalogue, splits: Path | None, split: int) -> Listing:
    """Reads <split>_splitNN.csv or <split>_split.csv, and the order of classes from ClassInd.txt if it is there."""
    splits = _given(splits)
    rows, files = [], []
    for name in ("train", "val", "test"):
        for file in (splits / f"{name}_split{split:02d}.csv", splits / f"{name}_split.csv"):
            if file.exists():
                files.append(file)
                pattern, expected = r'"?(?:.*/)?([^/"]+)/([^/]+)/"?\s*[,;\t].*', "<folders>/<class>/<video>/,<frames>"
                rows += [Row(where, *words, name) for where, words in _matches(file, pattern, expected)]
    if not files:
        raise InputError(
            f"--splits: expected train_split{split:02d}.csv or test_split{split:02d}.csv in {str(splits)!r}, got none"
        )
    file = splits / "ClassInd.txt"
    named = list(_numbered_classes(file)) if file.exists() else []
    return _find(catalogue, rows, named or sorted({row.label for row in rows}), files)


def _list_lmdb(catalogue: Catalogue, splits: Path | None, split: int) -> Listing:
    """Reads the lists of any layout in `splits`; without lists, returns all records, without a split."""
    if splits is not None:
        kinds = {"classInd.txt": "ucf101", f"*_test_split{split}.txt": "hmdb51", "*_split*.csv": "coclr"}
        kind = next((layout for pattern, layout in kinds.items() if any(splits.glob(pattern))), "kinetics")
        return LAYOUTS[kind](catalogue, splits, split)
    named = [(path, ("", *catalogue.folders(path))[-1]) for path in catalogue.paths]
    videos = [Listed(path, label, clip_source(label, path.name), "") for path, label in named]
    return Listing(videos, sorted({label for _, label in named if label}), [])


def _find(
    catalogue: Catalogue, rows: list[Row], classes: Sequence[str], files: list[Path], numbers: Mapping[str, int] = {}
) -> Listing:
    """Looks up the videos that the rows of the lists `files` name; `numbers` are those of the classes in the lists."""
    listed, problems, known = [], _without_rows(rows, files), set(classes)
    paths: dict[Row, Path] = {}
    exact: dict[str, str] = {}  # by source in lower case: the source of a row that names its file exactly
    for row in rows:
        if row.label not in known:
            near = next((f"; did you mean {name!r}? The case matters" for name in classes
                         if plain(name) == plain(row.label)), "")  # fmt: skip
            raise InputError(f"{row.where}: class {row.label!r} is not one of the {len(known)} of the data set{near}")
        found = catalogue.find(row.label, row.file, row.split, known)
        if found:
            source = clip_source(row.label, without_suffix(row.file))
            if without_suffix(row.file) == _name(found[0]):
                exact.setdefault(source.lower(), source)
            listed.append(Listed(found[0], row.label, source, row.split))
            problems += _ambiguous(found)
            paths[row] = found[0]
        else:
            problems.append(_missing(catalogue, row))
    named = set(exact.values())  # a row in another case than its file has the source of its siblings
    listed = [item if item.source in named else item._replace(source=exact.get(item.source.lower(), item.source))
              for item in listed]  # fmt: skip
    return Listing(listed, list(classes), problems + other_classes(paths, numbers, classes))


def _without_rows(rows: list[Row], files: list[Path]) -> list[Problem]:
    """Returns a problem for every list without a row. Raises InputError if none of the lists has one."""
    if not rows:
        names = ", ".join(file.name for file in files[:3]) + ", ..." * (len(files) > 3)
        raise InputError(f"--splits: the lists in {str(files[0].parent)!r} name no video ({names})")
    found = {Path(row.where.rpartition(":")[0]) for row in rows}
    return [Problem(file, "empty_list", "names no video") for file in files if file not in found]


def _missing(catalogue: Catalogue, row: Row) -> Problem:
    return Problem(catalogue.root / row.label / row.file, "missing", f"listed in {row.place}, not found")


def _ambiguous(found: Collection[Path]) -> list[Problem]:
    """Returns a problem if a list may mean several files by one name."""
    first, *others = found
    reason = f"has the same name and class as {', '.join(map(str, others[:3]))}; this one is listed"
    return [Problem(first, "ambiguous", reason)] if others else []


def _given(splits: Path | None) -> Path:
    assert splits is not None  # see require_splits
    return splits


def _matches(path: Path, pattern: str, expected: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields ("file:line", groups of `pattern`) for every line of a list."""
    for where, line in read_lines(path):
        found = re.fullmatch(pattern, line)
        if found is None:
            raise InputError(f"{where}: expected {expected}, got {line!r}")
        require_utf8(where, line)
        yield where, found.groups()


# The layouts whose videos are listed in other places than files in folders: functions of the root.
FORMATS: dict[str, Callable[[Path], Listing]] = {"list": list_lines, "rawframes": list_frames, "tar": list_shards}
LAYOUTS: dict[str, Callable[[Catalogue, Path | None, int], Listing]] = {
    "folders": list_folders,
    "ucf101": _list_ucf101,
    "hmdb51": _list_hmdb51,
    "kinetics": _list_kinetics,
    "coclr": _list_coclr,
    "lmdb": _list_lmdb,
}
