"""`cpr-fast retrieve`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cpr_fast.commands.options import CheckpointFiles, Json
from cpr_fast.commands.output import show_once
from cpr_fast.evaluate.features.recipe import RecipeName


def retrieve(
    checkpoint: CheckpointFiles,
    *,
    index: tuple[Path, ...],
    protocol: Literal["train_test", "leave_source_out"] = "train_test",
    recipe: RecipeName = "paper",
    clips: int | None = None,
    crops: Literal[1, 5, 10] = 1,
    cache: bool = True,
    json: Json = False,
) -> None:
    """Nearest-neighbour retrieval R@1, 5, 10, 20, 50 of a checkpoint's encoders, per view and two-stream.

    The results join the metrics of the run that the checkpoint lies in, for `report`. Under `torchrun` the processes
    share out the videos.

    Args:
        index: The index (CSV) of every official split, one or several: several give means and deviations.
        protocol: Test split against train split, or every video against all others but its own source's.
        recipe: paper: nothing random at test time. coclr: with the colour jitter that the released code leaves on.
            iic: 10 clips, max-pooled feature maps, no centring.
        clips: Uniform windows per video; by default those of the recipe (paper, coclr: all, overlapping by half).
        crops: Centre, five or ten crops of every window.
        cache: Keep features beside the checkpoint and reuse them.
    """
    from cpr_fast.evaluate.features.results import run_of
    from cpr_fast.evaluate.retrieval.retrieve import retrieve as run

    result = run(
        checkpoint, index, protocol=protocol, recipe=recipe, run_dir=run_of(checkpoint), clips_per_video=clips,
        crops=crops, cache=cache, progress=True,
    )  # fmt: skip
    show_once(result, json)
