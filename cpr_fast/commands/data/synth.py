"""`cpr-fast synth`."""

from __future__ import annotations

from pathlib import Path

import tyro

from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show


def synth(
    out: tyro.conf.Positional[Path], *, classes: int = 12, videos: int = 24, seed: int = 0, json: Json = False
) -> None:
    """Write encoded videos of synthetic actions, with siblings and a source-disjoint train/test split.

    Args:
        out: Folder to write; OUT/index.csv lists the videos.
        classes: Number of classes (scene kind x motion programme).
        videos: Videos of each class.
        seed: Seed of every draw.
    """
    from cpr_fast.data.synthetic.videos import write_synthetic

    show({"index": str(write_synthetic(out, classes=classes, videos=videos, seed=seed, progress=True))}, json)
