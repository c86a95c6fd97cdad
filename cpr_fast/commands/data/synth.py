"""`cpr-fast synth`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import tyro

from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show
from cpr_fast.data.synthetic.versions import DEFAULT
from cpr_fast.wording import counted


def synth(
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    *,
    classes: int = 12,
    videos: int = 24,
    seed: int = 0,
    version: int = DEFAULT,
    json: Json = False,
) -> None:
    """Write a data set of encoded videos of synthetic actions, with an index.

    Some videos are siblings (clips of one source video); the train/test split shares no source. A complete set of the
    same options is reused, and an interrupted one is written again from the start.

    Args:
        out: Folder to write, new or empty; OUT/index.csv lists the videos.
        classes: Number of classes, 4 or 6 to 36; a class is a motion in a kind of scene.
        videos: Number of source videos of each class, at least 2; every second one gives two clips.
        seed: Seed of all random draws, at least 0.
        version: 2, or 5, the quick start's, in which videos of a class are more alike, at 12.5 frames per second.
    """
    from cpr_fast.runtime.progress import announce

    announce(f"Writing synthetic videos to {out}")
    from cpr_fast.data.index.index import Index
    from cpr_fast.data.synthetic.videos import write_synthetic

    index = write_synthetic(out, classes=classes, videos=videos, seed=seed, version=version, progress=True)
    count = len(Index.load(index, require_flow=False))
    lines = [f"{counted(count, 'video')} of {counted(classes, 'class', 'classes')} in {out}, listed in {index}"]
    flow = f"cpr-fast flow {shlex.quote(str(index))}"
    show({"index": str(index)}, json, lines=lines, next_step=f"{flow} --out {shlex.quote(str(out / 'flow'))}")
