"""From a data set on disk to an index: list, probe (or transcode), report what is wrong."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.index.layouts import LAYOUTS, Listed, Listing, Problem, list_videos
from cpr_fast.data.index.probing import Journal, probe, probe_all
from cpr_fast.data.storage.records import frame_size, split_record
from cpr_fast.data.video.container import VideoError
from cpr_fast.data.video.probe import VideoInfo
from cpr_fast.data.video.transcode import transcode_video
from cpr_fast.errors import InputError

VERIFY_BELOW = 10_000  # videos: up to here each is decoded whole, unless told otherwise
SHORT = 17  # frames: at T = 32, CoCLR drops what has no more (frames - T / 2 - 1 <= 0)


@dataclass(frozen=True)
class IndexOptions:
    """How `write_index` lists and probes.

    Layouts:

    - "folders": ROOT/<class>/<video> or ROOT/<split>/<class>/<video>, with <split> any folder name ("train"). Files
      named <name>_cNN.<suffix> are clips of one source, "<class>/<name>"; any other file is a source of its own.
    - "ucf101": the videos that the official lists name (`splits` holds classInd.txt, trainlist0N.txt and testlist0N.txt
      with N = `split`), wherever below `root` they are and whatever their suffix: the class is that of the list, for
      some copies spell a folder unlike the file names. The source of v_X_gNN_cMM is v_X_gNN.
    - "hmdb51": likewise, `splits` holds <class>_test_splitN.txt. The source is the film that a file name begins with.
    - "kinetics" (400, 600, 700): rows label,youtube_id,time_start,time_end,split of every csv file in `splits`, and
      label maps (*label_map*.txt) for the order of classes. Files are <id>_<start>_<end>.<suffix> or <id>.<suffix>;
      the source is the id.
    - "coclr": CoCLR's train_splitNN.csv and test_splitNN.csv (<folders>/<class>/<video>/,<frames>) and ClassInd.txt.
    - "lmdb": ROOT is an LMDB file of CoCLR or CPR; `splits` holds the lists of any layout above, or is None.
    """

    layout: str = "folders"
    splits: Path | None = None
    split: int = 1
    class_order: Literal["official", "alphabetical"] = "official"  # of HMDB51: CoCLR's and CPR's; IIC's is alphabetical
    flow_lmdb: Path | None = None  # flow of the same names
    verify: bool | None = None  # decode every video whole; None: if there are fewer than 10,000
    transcode: Path | None = None  # write every video anew below this folder and list that
    short_side: int = 256  # at most, of transcoded videos
    min_frames: int = 0  # videos with fewer are left out
    shard: tuple[int, int] = (0, 1)  # (i, n): probe videos i, i + n, ... only; the last shard writes the index


def build_index(
    root: str | Path,
    layout: str = "folders",
    splits: str | Path | None = None,
    split: int = 1,
    out: str | Path | None = None,
    *,
    progress: bool = False,
) -> tuple[Index, list[Problem]]:
    """`write_index` of one process with the usual options: the index, and what is not in it or only in part."""
    options = IndexOptions(layout, None if splits is None else Path(splits), split)
    index, problems, _ = _build(Path(root), None if out is None else Path(out), options, progress)
    return index, [problem for problem in problems if problem.kind not in ("short", "variable_rate")]


def write_index(root: Path, out: Path, options: IndexOptions, *, progress: bool = False) -> dict[str, Any]:
    """Lists the videos of a data set, probes each, and writes the index `out` and beside it <name>.report.json.

    The report is returned too: {"index", "layout", "videos", "classes", "splits", "verified", "probed", "files_per_s",
    "counts", "problems": [{"path", "kind", "reason"}]}. Kinds of problems: videos that are listed but missing, empty or
    broken (no frame decodes), rotated, shorter than `min_frames`: not in the index. Damaged ones are in it with the
    frames that decode; short ones, of variable rate or without flow are in it and named.

    A run that was stopped goes on from its journal <name>.probe*.jsonl. Shards may run at the same time; the one that
    finds all results writes the index, the others return {"index": None, "left": videos without a result}.
    Raises InputError where no video is left.
    """
    index, problems, facts = _build(root, out, options, progress)
    if index is None:
        return {"index": None, **facts}
    report = {
        "index": str(out),
        "layout": options.layout,
        "videos": len(index),
        "classes": len(index.classes),
        "splits": dict(Counter(video.split for video in index)),
        **facts,
        "counts": dict(Counter(problem.kind for problem in problems)),
        "problems": [{"path": str(p.path), "kind": p.kind, "reason": p.reason} for p in problems],
    }
    temporary = report_path(out).with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, report_path(out))
    return report


def report_path(out: Path) -> Path:
    return out.with_suffix(".report.json")


def _build(
    root: Path, out: Path | None, options: IndexOptions, progress: bool
) -> tuple[Index | None, list[Problem], dict[str, Any]]:
    """(index, problems, facts of the probing); the index is None where other shards are not done."""
    _check(options)
    listing = list_videos(
        options.layout, root, options.splits, options.split,
        class_order=options.class_order, flow_lmdb=options.flow_lmdb,
    )  # fmt: skip
    verify = len(listing.videos) < VERIFY_BELOW if options.verify is None else options.verify
    journal, files = _journal(out, options, verify)
    number, count = options.shard
    share = listing.videos[number::count]
    began = time.perf_counter()
    probed = 0
    if options.transcode is None:
        paths = [item.path for item in share]
        what = "decoding" if verify else "probing"
        probed = probe_all(paths, partial(probe, verify=verify), journal, description=what, progress=progress)
    else:
        targets = {item.path: _target(item.path, root, options.transcode) for item in share}
        run = lambda path: transcode_video(path, targets[path], options.short_side)  # noqa: E731
        todo = [path for path, target in targets.items() if journal.get(path) is None or not target.exists()]
        probed = probe_all(todo, run, journal, description="transcoding", progress=progress)
    journal.read(files())  # of shards that ran meanwhile: whoever ends last knows all results
    rate = probed / (time.perf_counter() - began)
    facts = {"verified": verify or options.transcode is not None, "probed": probed, "files_per_s": round(rate, 1)}
    left = sum(journal.get(item.path) is None for item in listing.videos)
    if left:
        return None, [], facts | {"left": left}
    index, problems = _assemble(root, listing, journal, options)
    if out is not None:
        index.save(out)
        if count == 1:  # with shards another may still need them
            for file in files():
                file.unlink()
    return index, problems, facts


def _check(options: IndexOptions) -> None:
    number, count = options.shard
    if options.layout not in LAYOUTS:
        raise InputError(f"layout: expected one of {', '.join(LAYOUTS)}, got {options.layout!r}")
    if not 0 <= number < count:
        raise InputError(f"shard: expected (i, n) with 0 <= i < n, got {options.shard}")
    if options.short_side < 16:
        raise InputError(f"short_side: expected at least 16 pixels, got {options.short_side}")
    if options.transcode is not None and options.layout == "lmdb":
        raise InputError("transcode: an LMDB file is read as it is; layout 'lmdb' has nothing to transcode")


def _journal(out: Path | None, options: IndexOptions, verify: bool) -> tuple[Journal, Any]:
    """The journal of this shard, which knows the results of all, and a function that lists the files of all."""
    task = f"transcode {options.short_side}" if options.transcode else "decode" if verify else "packets"
    if out is None:
        return Journal(None, task), list
    out.parent.mkdir(parents=True, exist_ok=True)
    number, count = options.shard
    name = f"{out.stem}.probe.jsonl" if count == 1 else f"{out.stem}.probe-{number}-of-{count}.jsonl"
    files = lambda: sorted(out.parent.glob(f"{out.stem}.probe*.jsonl"))  # noqa: E731
    journal = Journal(out.with_name(name), task)
    journal.read(files())
    return journal, files


def _target(path: Path, root: Path, folder: Path) -> Path:
    """Where a transcoded video goes; the old suffix stays in the name, so that a.avi and a.mkv do not collide."""
    relative = path.relative_to(root)
    return folder / relative.with_name(relative.name if relative.suffix == ".mp4" else f"{relative.name}.mp4")


def _assemble(root: Path, listing: Listing, journal: Journal, options: IndexOptions) -> tuple[Index, list[Problem]]:
    """The index of everything that decodes, and what is wrong with the rest or with parts of it."""
    videos, problems = [], list(listing.problems)
    for item in listing.videos:
        info = journal.get(item.path)
        problem = _refused(item, info, options)
        if problem is None:
            videos.append(_video(item, info, root, options))
            problems += _notes(item, info)
        else:
            problems.append(problem)
    if not videos:
        first = f"; first: {problems[0].path}: {problems[0].reason}" if problems else ""
        raise InputError(f"root {str(root)!r}: no video of layout {options.layout!r} that decodes, "
                             f"{len(problems)} broken{first}")  # fmt: skip
    return Index(videos), problems


def _video(item: Listed, info: VideoInfo, root: Path, options: IndexOptions) -> Video:
    path, frames = item.path, info.num_frames
    if options.transcode is not None:
        path = _target(path, root, options.transcode)
    if item.flow_path is not None and split_record(item.flow_path):  # of another length than N - 1, as published
        frames = min(frames, frame_size(item.flow_path)[0] + 1)
    return Video(path, item.label, item.source, item.split, frames, info.fps, info.width, info.height, item.flow_path)


def _refused(item: Listed, info: VideoInfo | VideoError, options: IndexOptions) -> Problem | None:
    """Why a video is not in the index."""
    if isinstance(info, VideoError):
        empty = split_record(item.path) is None and item.path.stat().st_size == 0
        return Problem(item.path, "empty" if empty else "broken", info.reason)
    if info.rotation:
        reason = f"is stored rotated by {info.rotation} degrees; --transcode turns it upright"
        return Problem(item.path, "rotated", reason)
    if info.num_frames < options.min_frames:
        return Problem(item.path, "too_short", f"left out: {info.num_frames} frames, fewer than {options.min_frames}")
    if not info.fps > 0:
        return Problem(item.path, "broken", "the file does not say its frame rate")
    return None


def _notes(item: Listed, info: VideoInfo) -> list[Problem]:
    """What is odd about a video that is in the index."""
    notes = []
    if info.error:
        reason = f"damaged: kept with the {info.num_frames} frames that decode, then {info.error}"
        notes.append(Problem(item.path, "damaged", reason))
    if info.num_frames <= SHORT:
        notes.append(Problem(item.path, "short", f"{info.num_frames} frames; a clip of 32 is padded by half or more"))
    if info.variable_rate:
        notes.append(Problem(item.path, "variable_rate", "its frames are not evenly spaced in time"))
    return notes
