"""`cpr-fast show-sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from cpr_fast.commands.inputs import require_at_least, require_file, require_other_file
from cpr_fast.commands.options import IndexPath, Json
from cpr_fast.commands.output import show


def show_sample(
    index: IndexPath,
    *,
    out: Path,
    position: Annotated[int, tyro.conf.arg(name="index")] = 0,
    epoch: int = 1,
    config: Path | None = None,
    views: tuple[Literal["rgb", "flow", "residual"], ...] = ("rgb",),
    json: Json = False,
) -> None:
    """Write the exact clips that training reads from a video in an epoch, as a picture (.png) or a video (.mp4).

    Args:
        index: The index (CSV) that `cpr-fast index` wrote.
        out: The file to write, with the suffix of a picture, such as .png, or of a video, such as .mp4.
        position: Number of the video, from 0: its row below the header of the index, or with --config in the split that
            the config uses.
        epoch: Number of the epoch, from 1.
        config: The TOML file or config.json of a run, whose data settings and seed are used; without it the defaults.
        views: The views to show of each clip.
    """
    require_file("INDEX", index)
    require_file("--config", config)
    require_at_least("--index", 0, position)
    require_at_least("--epoch", 1, epoch)
    from cpr_fast.config import Config, load
    from cpr_fast.data.index.index import Index
    from cpr_fast.runtime.progress import announce

    settings = Config() if config is None else load(config)
    videos = Index.load(index, require_flow=settings.data.flow == "stored")
    require_other_file("--out", out, (path for video in videos for path in (video.path, video.flow_path) if path))
    if config is not None:
        videos = videos.select_for_training(settings.data.split).long_enough(settings.data)
    announce("Loading PyTorch and NVIDIA DALI")
    from cpr_fast.doctor.sample import show_sample as run

    result = run(
        videos, settings.data, seed=settings.run.seed, epoch=epoch - 1, position=position, out=out, views=views
    )
    result["settings"] = "the defaults; to use others: --config RECIPE.toml" if config is None else str(config)
    seen = "what the network sees" if config else "what a network sees with the default settings"
    show(result, json, next_step=f"open {out}, which shows {seen}")
