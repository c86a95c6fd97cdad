"""The data sets of the study: small videos, their index with sources and split, and their flow, all in one folder.

The real clips are not part of this repository: they are read from $CPR_FAST_SHARED/data (default ../shared/data).
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support import real_clips

from cpr_fast.data.flow.write import write_flow
from cpr_fast.data.index.build import IndexOptions, write_index
from cpr_fast.data.index.index import Index, Video
from cpr_fast.data.synthetic.videos import write_synthetic
from cpr_fast.experiments.quickstart import VIDEOS

# The folder of each real set and the short side, in pixels, that its videos are scaled to. Flow is computed at that
# size: it costs time by the pixel, and clips are smaller still.
REAL = {"jhmdb": ("jhmdb", 72), "shrec17": ("shrec17_depth", 48), "ucf101": ("ucf101_100", 72)}
SETS = ("synthetic", "jhmdb", "shrec17")  # of the study; the 100 clips of UCF101 are only a target of transfer.py
TITLES = {"synthetic": "synthetic", "jhmdb": "JHMDB", "shrec17": "SHREC'17"}


def prepare(name: str, folder: Path, *, progress: bool = False) -> Path:
    """Writes the videos, the index and the flow of a set into `folder`, and returns the index.

    What is complete is kept, so a stopped call is continued by the same call.
    """
    if name in REAL:
        source, short_side = REAL[name]
        index = _real(real_clips.ROOT / source, folder, short_side, progress)
    else:
        index = write_synthetic(folder / "videos", **VIDEOS, progress=progress)
    if any(video.flow_path is None for video in Index.load(index, require_flow=False)):
        write_flow(index, folder / "flow", progress=progress)
    return index


def _real(root: Path, folder: Path, short_side: int, progress: bool) -> Path:
    """Scales the clips that sources.csv in `root` lists, and writes their index with its sources and its split."""
    index, plain, videos = folder / "index.csv", folder / "transcoded.csv", folder / "videos"
    if index.exists():
        return index
    if not plain.exists():
        write_index(root, plain, IndexOptions(layout="folders", transcode=videos, short_side=short_side),
                    progress=progress)  # fmt: skip
    found = {video.path.resolve().relative_to(videos.resolve()).as_posix(): video for video in Index.load(plain)}
    if not (root / "sources.csv").exists():
        Index(_by_group(list(found.values()))).save(index)
        return index
    with (root / "sources.csv").open(newline="") as file:
        listed = {row["path"]: row for row in csv.DictReader(file)}
    if set(found) != set(listed):
        lacking = sorted(set(listed) ^ set(found))
        raise RuntimeError(
            f"{root}: expected the {len(listed)} videos of sources.csv, got {len(found)}: {lacking[:3]} are not in both"
        )
    rows = [(found[path], row) for path, row in listed.items()]
    Index(
        dataclasses.replace(video, label=row["label"], source=row["source"], split=row["split"]) for video, row in rows
    ).save(index)
    return index


def _by_group(videos: list[Video]) -> Iterator[Video]:
    """Yields the videos of classes with at least two sources. The last source of a class, by name, is tested."""
    sources = {
        video.label: sorted({other.source for other in videos if other.label == video.label}) for video in videos
    }
    for video in videos:
        if len(sources[video.label]) > 1:
            yield dataclasses.replace(video, split="test" if video.source == sources[video.label][-1] else "train")


def description(index: Path) -> dict[str, Any]:
    """Returns what identifies a set: its counts, and a digest of names, classes, sources, splits and lengths.

    The digest depends neither on the folder nor on the bits of the videos, which other encoders may write otherwise.
    """
    videos = Index.load(index)
    rows = [[v.path.name, v.label, v.source, v.split, v.num_frames, v.width, v.height] for v in videos]
    parts = {split: [video for video in videos if video.split == split] for split in ("train", "test")}
    return {
        "videos": len(videos),
        "classes": len(videos.classes),
        **{f"{split}_videos": len(part) for split, part in parts.items()},
        **{f"{split}_sources": len({video.source for video in part}) for split, part in parts.items()},
        "digest": hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12],
    }
