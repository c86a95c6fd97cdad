"""Lists folders of extracted frames, as MMAction2 and TSN write them."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

from cpr_fast.data.index.catalogue import Problem, walked
from cpr_fast.data.index.formats.folders import list_folders
from cpr_fast.data.index.listing import Listing
from cpr_fast.data.storage.pictures import vertical
from cpr_fast.errors import InputError

_PICTURE = re.compile(r"([^%]*?)(\d+)(\.(?:jpe?g|png))", re.IGNORECASE)


class Clips:
    """The folders of pictures below a root, which stand for videos: what `list_folders` needs of a `Catalogue`."""

    def __init__(self, root: Path, *, below: bool = True) -> None:
        """Follows symbolic links to folders; without `below`, only the root itself is looked at."""
        self.root = root
        self.templates: dict[Path, Path] = {}  # of the frames, by folder
        self.flow: dict[Path, Path] = {}  # of the horizontal component of flow, by folder
        self.problems: list[Problem] = []
        self.others = 0  # pictures that belong to no sequence
        for folder, folders, names in walked(root):
            folders[:] = sorted(name for name in folders if below and not name.startswith("."))
            self._add(folder, names)

    @property
    def paths(self) -> list[Path]:
        """The folders, sorted."""
        return sorted(self.templates)

    def folders(self, path: Path) -> tuple[str, ...]:
        """Returns the names of the folders between the root and a folder of pictures."""
        return path.relative_to(self.root).parts[:-1]

    def _add(self, folder: Path, names: list[str]) -> None:
        found = sequences(names)
        flow = {template for template in found if vertical(Path(template)) is not None}
        beside = {str(vertical(Path(template))) for template in flow}
        frames = [template for template in found if template not in flow | beside]
        if not frames:
            if flow:
                reason = "holds pictures of flow, but none of frames, such as img_00001.jpg"
                self.problems.append(Problem(folder, "broken", reason))
            return
        chosen = max(frames, key=lambda template: (found[template], template))
        self.others += sum(found.values()) - sum(found[name] for name in {chosen, *flow, *beside} if name in found)
        self.templates[folder] = folder / chosen
        both = [template for template in sorted(flow) if str(vertical(Path(template))) in found]
        if both:
            self.flow[folder] = folder / both[0]
        elif flow:
            reason = f"{sorted(flow)[0]} has no vertical component beside it"
            self.problems.append(Problem(folder / chosen, "missing_flow", reason))


def sequences(names: list[str]) -> dict[str, int]:
    """Returns the templates of numbered pictures, such as img_%05d.jpg, and how many pictures each has."""
    numbers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        if not name.startswith(".") and (found := _PICTURE.fullmatch(name)):
            numbers[found[1], found[3]].append(found[2])
    templates = {}
    for (begin, end), digits in numbers.items():
        padded = any(len(text) > 1 and text[0] == "0" for text in digits)
        width = f"0{min(map(len, digits))}" if padded else ""
        templates[f"{begin}%{width}d{end}"] = len(digits)
    return templates


def frames_in(folder: Path) -> tuple[Path | None, Path | None]:
    """Returns the templates of the frames and of the flow in a folder, None for what it does not hold."""
    clips = Clips(folder, below=False)
    return clips.templates.get(folder), clips.flow.get(folder)


def list_frames(root: Path) -> Listing:
    """Lists every folder that holds numbered pictures as a video, with the flow in it.

    Class and split are those of the folders above, as with the layout "folders". Pictures named flow_x_* and flow_y_*,
    or x_* and y_*, are flow; of several other sequences the longest holds the frames.

    Raises:
        InputError: no folder holds such pictures.
    """
    clips = Clips(root)
    if not clips.templates:
        raise InputError(f"ROOT: expected folders of pictures named img_00001.jpg and so on, got none in {str(root)!r}")
    listing = list_folders(clips, None, 0)
    videos = [item._replace(path=clips.templates[item.path], flow_path=clips.flow.get(item.path))
              for item in listing.videos]  # fmt: skip
    others = {"other pictures": clips.others} if clips.others else {}
    return listing._replace(videos=videos, problems=listing.problems + clips.problems, others=others)
