"""`cpr-fast show-sample`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from cpr_fast.commands.inputs import require_at_least, require_file, require_other_file
from cpr_fast.commands.options import IndexPath, Json
from cpr_fast.commands.output import show
from cpr_fast.errors import InputError
from cpr_fast.wording import counted

if TYPE_CHECKING:
    from cpr_fast.config import Config, DataConfig
    from cpr_fast.data.index.index import Index
    from cpr_fast.doctor.findings import Finding


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
        position: Number of the video, from 0, among those that the recipe trains on: of its split, without those that
            it drops as too short. With the default settings it is the row of the index, below the header.
        epoch: Number of the epoch, from 1.
        config: The TOML file or config.json of a run, whose data settings and seed are used; by default the only recipe
            that names this index, beside the index or in the working directory, or the default settings if there is no
            such recipe or several.
        views: The views to show of each clip.
    """
    require_file("INDEX", index)
    require_file("--config", config)
    require_at_least("--index", 0, position)
    require_at_least("--epoch", 1, epoch)
    from cpr_fast.config import load
    from cpr_fast.data.index.index import Index
    from cpr_fast.runtime.progress import announce

    config, settings, said = _settings(index) if config is None else (config, load(config), str(config))
    videos = Index.load(index, require_flow=settings.data.flow == "stored")
    require_other_file("--out", out, (path for video in videos for path in (video.path, video.flow_path) if path))
    if config is not None:
        videos = videos.select_for_training(settings.data.split).long_enough(settings.data)
    _require_flow(index, videos, settings.data, views)
    announce("Loading PyTorch and NVIDIA DALI")
    from cpr_fast.doctor.sample import show_sample as run

    result = run(
        videos, settings.data, seed=settings.run.seed, epoch=epoch - 1, position=position, out=out, views=views
    )
    result["settings"] = said
    shown = "clips of the default settings" if config is None else "what the network sees"
    show(result, json, next_step=f"open {out}, which shows {shown}")


def _settings(index: Path) -> tuple[Path | None, Config, str]:
    """Returns the recipe that names the index, its settings and a sentence about them; no recipe and the default
    settings if there is none, or several."""
    from cpr_fast.config import Config
    from cpr_fast.doctor.recipe import recipes_of

    problems: list[Finding] = []
    found = dict(recipes_of(index, problems))
    if len(found) == 1:
        ((path, settings),) = found.items()
        return path, settings, f"{path}, which names this index; to use others: --config RECIPE.toml"
    why = [f"several recipes name this index ({', '.join(map(str, found))})"] if found else []
    why += [problem.text for problem in problems]
    return None, Config(), "; ".join(["the defaults", *why, "to use others: --config RECIPE.toml"])


def _require_flow(index: Path, videos: Index, data: DataConfig, views: Sequence[str]) -> None:
    """Raises InputError with the command to run if stored flow is to be shown that a video does not have."""
    from cpr_fast.data.flow.names import flow_command

    bare = [video for video in videos if video.flow_path is None]
    if "flow" in views and data.flow == "stored" and bare:
        raise InputError(
            f"--views: expected views that every video has, got 'flow', but {len(bare)} of "
            f"{counted(len(videos), 'video')} have no flow_path in the index (first: {str(bare[0].path)!r}); to "
            f"compute their flow: {flow_command(index, videos)}"
        )
