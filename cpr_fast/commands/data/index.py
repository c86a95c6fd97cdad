"""`cpr-fast index`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from cpr_fast.commands.inputs import (
    next_shard,
    other_shards,
    parse_shard,
    require_at_least,
    require_data_set,
    require_file,
    require_folder,
    require_suffix,
)
from cpr_fast.commands.options import Flag, Json
from cpr_fast.commands.output import show
from cpr_fast.data.files.names import text_of
from cpr_fast.errors import InputError


def index(
    root: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ROOT")],
    *,
    out: Path,
    layout: Literal["folders", "list", "rawframes", "tar", "ucf101", "hmdb51", "kinetics", "coclr", "lmdb"] = "folders",
    splits: Path | None = None,
    split: int = 1,
    class_order: Literal["official", "alphabetical"] = "official",
    flow_lmdb: Path | None = None,
    verify: Flag = False,
    no_verify: Flag = False,
    transcode: Path | None = None,
    short_side: int = 256,
    min_frames: int = 0,
    no_classes: Flag = False,
    shard: str = "0/1",
    json: Json = False,
) -> None:
    """List and check the videos of a data set, and write an index for the other commands.

    The index is a CSV file with one row per video. Every problem or unusual property (broken, damaged, rotated or short
    videos, contradictory lists) is also written to <name>.report.json. The same command resumes a stopped run.

    Args:
        root: Folder, LMDB file, list (--layout list), tar file (--layout tar), or a URL of an object store.
        out: The index to write, a CSV file, or Parquet (.parquet) for more than 100,000 videos.
        layout: How the data set is organised. "folders": ROOT/class/video, ROOT/split/class/video or ROOT/video.
            "list": text files with a path or URL a line. "tar": tar files as WebDataset names their members.
            "rawframes": folders of pictures, a folder a video.
        splits: Folder of the split lists (every layout but folders; optional for lmdb).
        split: Which of the official splits to take (ucf101, hmdb51, coclr).
        class_order: The data set's own order of classes (HMDB51: that of CoCLR and CPR), or alphabetical (IIC).
        flow_lmdb: LMDB file that holds the flow of the same videos.
        verify: Decode every video completely; the default below 10,000 videos.
        no_verify: Count packets only; the default from 10,000 videos on.
        transcode: Re-encode every video (H.264, short groups of pictures, upright) into this folder, and list those.
        short_side: Largest short side of transcoded videos, in pixels.
        min_frames: Leave out videos with fewer frames.
        no_classes: Give no video a class, as for folders that are named by date, camera or person.
        shard: i/n: probe the i-th of n shares, 0 <= i < n. The shard that finishes last writes the index.
        json: Print the whole report as one JSON object.
    """
    require_data_set("ROOT", root)
    require_folder("--splits", splits)
    require_file("--flow-lmdb", flow_lmdb)
    part = parse_shard(shard)
    _require_values(out, split, short_side, min_frames)
    if verify and no_verify:
        raise InputError("--verify, --no-verify: expected at most one of them, got both")
    from cpr_fast.runtime.progress import announce

    announce(f"Looking for videos in {text_of(root)}")
    from cpr_fast.data.index.build import IndexOptions, write_index
    from cpr_fast.data.index.summary import command_of, next_step, summary

    options = IndexOptions(layout, splits, split, class_order, flow_lmdb, verify or (False if no_verify else None),
                           transcode, short_side, min_frames, not no_classes, part)  # fmt: skip
    report = write_index(root, out, options, progress=True)
    again = command_of(root, out, options.given(), *next_shard(part))  # the command while videos have no result
    show(report, json, lines=[] if json else summary(report, other_shards(part)), next_step=next_step(report) or again)


def _require_values(out: Path, split: int, short_side: int, min_frames: int) -> None:
    require_suffix("--out", out, ".csv")
    require_at_least("--split", 1, split)
    require_at_least("--short-side", 16, short_side)
    require_at_least("--min-frames", 0, min_frames)
