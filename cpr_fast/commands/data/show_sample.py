"""`cpr-fast show-sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show


def show_sample(
    index: tyro.conf.Positional[Path],
    *,
    out: Path,
    position: Annotated[int, tyro.conf.arg(name="index")] = 0,
    epoch: int = 0,
    config: Path | None = None,
    views: tuple[Literal["rgb", "flow", "residual"], ...] = ("rgb",),
    json: Json = False,
) -> None:
    """Write the exact clips that a video gives in an epoch as a picture (.png) or a video (.mp4).

    Args:
        index: The index (CSV).
        out: The file to write.
        position: Which video: its place in the index, or, with a config, in the config's split of it.
        epoch: Which epoch of the run.
        config: The run's TOML file or config.json, for its data settings and seed; by default those of no file.
        views: What to show of each clip.
    """
    from cpr_fast.config import Config, load
    from cpr_fast.data.index.index import Index
    from cpr_fast.doctor.sample import show_sample as run

    settings = Config() if config is None else load(config)
    videos = Index.load(index, require_flow=settings.data.flow == "stored")
    if config is not None:
        videos = videos.select_for_training(settings.data.split)
    show(run(videos, settings.data, seed=settings.run.seed, epoch=epoch, position=position, out=out, views=views), json)
