"""Lists the videos below a folder by the names of its folders."""

from __future__ import annotations

import re
from pathlib import Path

from cpr_fast.data.index.catalogue import Catalogue, Problem
from cpr_fast.data.index.listing import SPLITS, Listed, Listing, split_name


def list_folders(catalogue: Catalogue, splits: Path | None, split: int) -> Listing:
    """Lists every video below a folder without lists; class and split are read from the names of the folders.

        ROOT/<video>                              no class, no split
        ROOT/<class>/<video>                      ROOT/<class>/<any folders>/<video>: the first level is the class
        ROOT/<split>/<class>/<video>              likewise below each split
        ROOT/<split>/<video>                      no class

    The first level is the split if all its folders are named as in SPLITS, or if a training and a test or validation
    folder are among them; names are read in any case. Where most videos lie in no class folder, no folder is a
    class.

    The listing's `levels` states how the levels of folders were interpreted.
    """
    parents = {path: catalogue.folders(path) for path in catalogue.paths}
    tops = {folders[0] for folders in parents.values() if folders}
    has_split = _are_splits(tops)
    listed = [_listed(path, folders, has_split) for path, folders in parents.items()]
    outside = sum(not item.label for item in listed)
    found = {item.label for item in listed if item.label}
    # Where most videos lie in no folder, the others are not sorted by class, either; `list_videos` drops their labels.
    labels = sorted(found) if len(listed) >= 2 * outside else []
    listed.sort(key=lambda item: (item.label if labels else "", item.split, item.path))
    problems = [Problem(item.path, "no_class", "lies beside the class folders, so it has no class")
                for item in listed if labels and not item.label]  # fmt: skip
    deepest = max((len(folders) for folders in parents.values()), default=0)
    return Listing(listed, labels, problems, _levels(has_split, bool(labels), deepest, outside < len(listed)))


def _are_splits(tops: set[str]) -> bool:
    kinds = {SPLITS.get(name.lower()) for name in tops}
    return bool(tops) and (None not in kinds or ("train" in kinds and len(kinds - {"train", None}) > 0))


def _listed(path: Path, folders: tuple[str, ...], has_split: bool) -> Listed:
    split, top = "", ()
    if has_split and folders:
        split, top, folders = split_name(folders[0]), folders[:1], folders[1:]
    label = folders[0].strip() if folders else ""  # as a list and an index are read
    clip = re.fullmatch(r"(.+)_c\d+", path.stem)
    if clip:  # clips of one source, also across splits, so that a leak is noticed
        return Listed(path, label, "/".join((*folders, clip[1])), split)
    return Listed(path, label, "/".join((*top, *folders, path.name)), split)


def _levels(has_split: bool, has_class: bool, deepest: int, has_folders: bool) -> str:
    """Returns a sentence that states how the levels of folders were interpreted."""
    split = "the first folder level is the split" if has_split else "no folder names a split"
    if not has_class:
        why = ", because most videos lie in none" if has_folders else ""
        return f"{split}; no folder names a class{why}"
    level = "second" if has_split else "first"
    deeper = "; deeper folders are ignored" if deepest > 1 + has_split else ""
    return f"{split}; the {level} folder level is the class{deeper} (--no-classes if it is not)"
