"""Assembles the index from the listed videos and their probe results; reports the problems of the videos it leaves
out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from cpr_fast.data.files.access import storage_of
from cpr_fast.data.files.names import is_remote, member_of, text_of
from cpr_fast.data.index.catalogue import Problem
from cpr_fast.data.index.index import Index, IndexFileError, Video, keep_previous, previous_path
from cpr_fast.data.index.listing import Listed, Listing
from cpr_fast.data.index.summary import KINDS
from cpr_fast.data.storage.media import frame_size, is_pictures, resolved
from cpr_fast.data.video.container import VideoError
from cpr_fast.data.video.probe import ASSUMED_FPS, VideoInfo
from cpr_fast.errors import InputError
from cpr_fast.wording import counted

SHORT = 17  # frames: with clips of T = 32, CoCLR drops videos of this length or shorter (frames - T / 2 - 1 <= 0)
LOST, LOST_SHARE = 10, 0.1  # more unreadable videos than this number and this share indicate a lost mount


# What each layout looks for.
LISTED = "the videos that the lists in --splits name (--layout)"
EXPECTED = {
    "folders": "videos (.mp4, .avi, .mkv, ...) in ROOT, ROOT/CLASS or ROOT/SPLIT/CLASS",
    "lmdb": "records of videos (--layout lmdb)",
    "list": "a list with a path or URL of a video on every line",
    "rawframes": "folders of pictures named img_00001.jpg and so on",
    "tar": "tar files with members KEY.mp4 (.avi, .mkv, ...)",
}


@dataclass(frozen=True)
class IndexOptions:
    """How `write_index` lists and probes.

    Layouts:

    - "folders": class and split are read from the names of folders, see `formats.folders.list_folders`. Files named
      <name>_cNN.<suffix> are clips of one source; any other file is a separate source.
    - "ucf101": the videos that the official lists name (`splits` holds classInd.txt, trainlist0N.txt and testlist0N.txt
      with N = `split`), in any folder below `root` and with any suffix. The class is that of the list,
      because some copies spell a folder differently from the file names. The source of v_X_gNN_cMM is v_X_gNN.
    - "hmdb51": likewise; `splits` holds <class>_test_splitN.txt. The source is the film that a file name begins with.
    - "kinetics" (400, 600, 700): rows label,youtube_id,time_start,time_end,split of every csv file in `splits`, and
      label maps (*label_map*.txt) for the order of classes. Files are <id>_<start>_<end>.<suffix> or <id>.<suffix>;
      the source is the id.
    - "coclr": CoCLR's train_splitNN.csv and test_splitNN.csv (<folders>/<class>/<video>/,<frames>) and ClassInd.txt.
    - "list": the videos that text files name, see `formats.lists.list_lines`.
    - "rawframes": folders of extracted frames, see `formats.frames.list_frames`.
    - "tar": videos in tar files, see `formats.shards.list_shards`.
    - "lmdb": ROOT is an LMDB file of CoCLR or CPR; `splits` holds the lists of any layout above, or is None.
    """

    layout: str = "folders"
    splits: Path | None = None
    split: int = 1
    # of HMDB51: "official" is the order of CoCLR and CPR, "alphabetical" that of IIC
    class_order: Literal["official", "alphabetical"] = "official"
    flow_lmdb: Path | None = None  # holds the flow of the videos under the same names
    verify: bool | None = None  # decode every video completely; None: if there are fewer than 10,000
    transcode: Path | None = None  # re-encode every video below this folder, and list the result
    short_side: int = 256  # pixels at most, of transcoded videos
    min_frames: int = 0  # videos with fewer frames are left out
    classes: bool = True  # whether videos get the class that the layout finds
    shard: tuple[int, int] = (0, 1)  # (i, n): probe videos i, i + n, ... only; the last shard writes the index

    def given(self) -> dict[str, str]:
        """Returns the options of `cpr-fast index` that differ from their defaults, without the shard: {name: value},
        with "" for a switch and absolute paths."""
        switches = {("verify", True): "verify", ("verify", False): "no_verify", ("classes", False): "no_classes"}
        found = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default or field.name == "shard":
                continue
            if switch := switches.get((field.name, value)):
                found[switch] = ""
            else:
                found[field.name] = os.path.abspath(value) if isinstance(value, Path) else str(value)
        return found


def assemble(
    root: Path,
    out: Path | None,
    listing: Listing,
    results: Mapping[Path, VideoInfo | VideoError],
    options: IndexOptions,
) -> tuple[Index, list[Problem]]:
    """Returns the index of all videos that decode, and the problems of listed and of omitted videos.

    Raises InputError if no video is left, or if so many could not be read that the disk has probably failed.
    """
    videos, problems = [], list(listing.problems)
    for item in listing.videos:
        info = results[item.path]
        problem = _refused(item, info, options)
        if problem is None:
            item, frames, remarks = _with_flow(item, info.num_frames)
            videos.append(_video(item, replace(info, num_frames=frames), root, options))
            problems += _remarks(item, info) + remarks
        else:
            problems.append(problem)
    _check_disk(problems, len(listing.videos))
    if not videos:
        raise InputError(_nothing(root, listing, problems, options))
    problems += _same_files(videos)
    index = Index(videos)
    return (index, problems) if out is None else _after_previous(index, out, problems)


def transcoded(path: Path, root: Path, folder: Path) -> Path:
    """Returns the path of a transcoded video. Its name keeps the old suffix, so that a.avi and a.mkv do not collide."""
    relative = path.relative_to(root)
    return folder / relative.with_name(relative.name if relative.suffix == ".mp4" else f"{relative.name}.mp4")


def _video(item: Listed, info: VideoInfo, root: Path, options: IndexOptions) -> Video:
    path = item.path if options.transcode is None else transcoded(item.path, root, options.transcode)
    return Video(path, item.label, item.source, item.split, info.num_frames, info.fps or ASSUMED_FPS, info.width,
                 info.height, item.flow_path)  # fmt: skip


def _with_flow(item: Listed, frames: int) -> tuple[Listed, int, list[Problem]]:
    """Returns a video of `frames` frames without a record of flow that cannot be read, how many of its frames the flow
    covers, and what is wrong with the flow.

    Published flow does not always have N - 1 fields, but a number close to it.
    """
    if item.flow_path is None or not is_pictures(item.flow_path):
        return item, frames, []
    try:
        fields = frame_size(item.flow_path)[0]
    except VideoError as error:
        problem = Problem(item.path, "missing_flow", f"its flow cannot be read: {error.reason}")
        return item._replace(flow_path=None), frames, [problem]
    if abs(fields + 1 - frames) <= max(2, frames / 10):
        return item, min(frames, fields + 1), []
    reason = f"has {counted(frames, 'frame')}, but {counted(fields, 'field')} of flow: it may be of another video"
    return item, min(frames, fields + 1), [Problem(item.path, "flow_length", reason)]


def _refused(item: Listed, info: VideoInfo | VideoError, options: IndexOptions) -> Problem | None:
    """Returns why a video is left out of the index, or None if it is included."""
    if isinstance(info, VideoError):
        if info.unreadable:
            return Problem(item.path, "unreadable", info.reason)
        empty = not is_pictures(item.path) and _size(item.path) == 0
        return Problem(item.path, "empty" if empty else "broken", "holds no bytes" if empty else info.reason)
    if info.rotation:
        reason = f"is stored rotated by {info.rotation} degrees; --transcode turns it upright"
        return Problem(item.path, "rotated", reason)
    if info.num_frames < options.min_frames:
        reason = f"has {counted(info.num_frames, 'frame')}, expected at least --min-frames {options.min_frames}"
        return Problem(item.path, "too_short", reason)
    return None


def _remarks(item: Listed, info: VideoInfo) -> list[Problem]:
    """Returns what is unusual about a video that is in the index."""
    found = []
    if info.error:
        reason = f"is damaged: kept with the {counted(info.num_frames, 'frame')} that decode, then {info.error}"
        found.append(("damaged", reason))
    if info.corrupt:
        reason = (f"is damaged: {info.corrupt} of {info.num_frames} frames decode with errors, the first is frame "
                  f"{info.first_corrupt}")  # fmt: skip
        found.append(("damaged", reason))
    if info.size_change:
        reason = (
            f"the frame size or format changes {info.size_change}; kept with the "
            f"{counted(info.num_frames, 'frame')} before it"
        )
        found.append(("size_change", reason))
    if info.streams:
        found.append(("several_streams", info.streams))
    if info.num_frames <= SHORT:
        frames = counted(info.num_frames, "frame")
        found.append(("short", f"has {frames}; a clip of 32 frames is padded by half or more"))
    if not info.fps:
        found.append(("no_rate", f"does not say its frame rate; the index says {ASSUMED_FPS:g}"))
    if info.variable_rate:
        found.append(
            ("variable_rate", "its frames are not evenly spaced in time; data.fps samples them by their times")
        )
    return [Problem(item.path, kind, reason) for kind, reason in found]


def _check_disk(problems: list[Problem], listed: int) -> None:
    """Raises InputError if many videos could not be read: an index without them would be silently incomplete."""
    lost = [p for p in problems if p.kind == "unreadable" and p.reason != os.strerror(13)]
    if len(lost) > max(LOST, LOST_SHARE * listed):
        reasons = ", ".join(f"{count:,} {reason!r}" for reason, count in Counter(p.reason for p in lost).most_common(3))
        raise InputError(
            f"{len(lost):,} of {listed:,} videos could not be read ({reasons}; the first is {text_of(lost[0].path)}). "
            "Is the disk still mounted? No index was written; run the same command again, which keeps the results so "
            "far"
        )


def _nothing(root: Path, listing: Listing, problems: list[Problem], options: IndexOptions) -> str:
    """Returns the error for an index without any video: none was found, or none of those found can be used."""
    number = len(listing.videos)
    if number:
        which = "the only video" if number == 1 else f"none of the {counted(number, 'video')}"
        text = f"ROOT: {which} in {text_of(root)!r} can{'not' if number == 1 else ''} be used"
    else:
        text = f"ROOT: found no video in {text_of(root)!r}; expected {EXPECTED.get(options.layout, LISTED)}"
    problems = [problem for problem in problems if not KINDS[problem.kind][0]]
    if problems:
        kinds = Counter(problem.kind for problem in problems)
        counts = ", ".join(f"{count:,} {kind} ({KINDS[kind][1]})" for kind, count in kinds.items())
        text += f"; left out: {counts}; the first: {text_of(problems[0].path)}: {problems[0].reason}"
    if listing.others:
        suffixes = sorted(listing.others, key=lambda suffix: -listing.others[suffix])[:3]
        text += f"; it holds other files: {', '.join(f'{listing.others[suffix]:,} {suffix}' for suffix in suffixes)}"
        if {".jpg", ".jpeg", ".png"} & set(suffixes):
            text += " (--layout rawframes reads extracted frames)"
        elif ".gif" in suffixes:
            text += " (animations are not read; encode them as videos)"
    return text


def _same_files(videos: list[Video]) -> list[Problem]:
    """Returns the videos that are the same file as an earlier one, by a symbolic or hard link, or a copy of it."""
    first: dict[tuple[int, int], Video] = {}
    others, problems = [], []
    for video in videos:
        if is_pictures(video.path) or is_remote(video.path):
            continue
        if member_of(video.path) is not None:
            others.append(video)
            continue
        try:
            facts = os.stat(video.path)
        except OSError:
            continue
        other = first.setdefault((facts.st_dev, facts.st_ino), video)
        if other is not video:
            problems.append(Problem(video.path, "same_file", f"is the same file as {other.path}"))
        else:
            others.append(video)
    return problems + _same_contents(Index(others))


def _same_contents(videos: Index) -> list[Problem]:
    """Returns the videos that hold the same bytes as an earlier one, and what differs besides."""
    problems = []
    for video, position in zip(videos, videos.originals(), strict=True):
        if (other := videos[position]) is not video:
            differs = [f"{name} {getattr(other, name)!r}" for name in ("label", "split")
                       if getattr(other, name) not in ("", getattr(video, name))]  # fmt: skip
            reason = f"holds the same bytes as {other.path}"
            reason += f", which has {' and '.join(differs)}" if differs else ""
            problems.append(Problem(video.path, "same_content", reason))
    return problems


def _after_previous(index: Index, out: Path, problems: list[Problem]) -> tuple[Index, list[Problem]]:
    """Keeps the flow of the index that is replaced, and reports the columns whose values differ from it and the videos
    that exist but are no longer listed, unless another problem explains why.

    If a class, source or split differs, or a video is no longer listed, the previous file is kept as *.old.csv, because
    it may have been edited by hand or may be the index of another data set.
    """
    try:
        previous = Index.load(out, require_flow=False, skipped=[])
    except (IndexFileError, OSError):
        return index, problems
    before = {resolved(video.path): video for video in previous}
    videos, problems, changed = [], list(problems), []
    for video in index:
        old = before.get(resolved(video.path))
        if old is not None and old.flow_path is not None and video.flow_path is None:
            if _shape(old) == _shape(video):
                video = replace(video, flow_path=old.flow_path)
            else:
                reason = f"had flow of {_says(old)}, and now is {_says(video)}; run `cpr-fast flow` again"
                problems.append(Problem(video.path, "flow_dropped", reason))
        if old is not None and (differs := _differences(old, video)):
            changed.append(
                Problem(video.path, "replaced", f"{differs}; the previous index is {previous_path(out).name}")
            )
        videos.append(video)
    explained = {resolved(item.path) for item in (*index, *problems)}
    for path in before:
        if path not in explained:
            changed.append(Problem(Path(path), "not_listed", f"the previous index is {previous_path(out).name}"))
    if changed:
        keep_previous(out)
    return Index(videos, index.classes), problems + changed


def _differences(old: Video, new: Video) -> str:
    """Returns which of class, source and split differ from the previous index; columns that were empty are ignored."""
    names = [name for name in ("label", "source", "split") if getattr(old, name) not in ("", getattr(new, name))]
    return ", ".join(f"{name} was {getattr(old, name)!r}, is {getattr(new, name)!r}" for name in names)


def _shape(video: Video) -> tuple[int, int, int]:
    return video.num_frames, video.width, video.height


def _says(video: Video) -> str:
    return "{} frames of {}x{}".format(*_shape(video))


def _size(path: Path) -> int:
    try:
        return storage_of(path).size(path)
    except OSError:
        return -1
