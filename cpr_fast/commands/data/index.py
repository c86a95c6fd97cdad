"""`cpr-fast index`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from cpr_fast.commands.options import Flag, Json, parse_shard
from cpr_fast.commands.output import show
from cpr_fast.errors import InputError


def index(
    root: tyro.conf.Positional[Path],
    *,
    out: Path,
    layout: Literal["folders", "ucf101", "hmdb51", "kinetics", "coclr", "lmdb"] = "folders",
    splits: Path | None = None,
    split: int = 1,
    class_order: Literal["official", "alphabetical"] = "official",
    flow_lmdb: Path | None = None,
    verify: Flag = False,
    no_verify: Flag = False,
    transcode: Path | None = None,
    short_side: int = 256,
    min_frames: int = 0,
    shard: str = "0/1",
    json: Json = False,
) -> None:
    """List and probe the videos of a data set; names what is broken, empty, short, rotated or of variable rate.

    What is found is written beside the index as <name>.report.json. Resumable.

    Args:
        root: Folder of the data set, or an LMDB file.
        out: The index (CSV) to write.
        layout: How the data set is laid out.
        splits: Folder of the split lists (all layouts but folders; optional for lmdb).
        split: Number of the official split.
        class_order: The data set's own order of classes (HMDB51: that of CoCLR and CPR) or the alphabet's (IIC).
        flow_lmdb: LMDB file of the flow of the same videos.
        verify: Decode every video whole, as is done by default below 10,000 videos.
        no_verify: Probe packets only, as is done by default from 10,000 videos on.
        transcode: Write every video anew (H.264, short groups of pictures, upright) below this folder and list that.
        short_side: Largest short side of transcoded videos, pixels.
        min_frames: Leave out videos with fewer frames.
        shard: i/n: probe the i-th of n shares, 0 <= i < n; the shard that ends last writes the index.
    """
    from cpr_fast.data.index.build import IndexOptions, write_index

    if verify and no_verify:
        raise InputError("--verify, --no-verify: expected one of them, got both")
    whole = True if verify else False if no_verify else None
    options = IndexOptions(layout, splits, split, class_order, flow_lmdb, whole, transcode, short_side, min_frames,
                           parse_shard(shard))  # fmt: skip
    report = write_index(root, out, options, progress=True)
    if not json and report.get("problems"):  # all of them are in the report
        report |= {"problems": report["problems"][:20]}
    show(report, json)
