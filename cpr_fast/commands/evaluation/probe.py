"""`cpr-fast probe`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cpr_fast.commands.evaluation.classify import classifier_settings, run_classify
from cpr_fast.commands.options import CheckpointFiles, Json
from cpr_fast.evaluate.features.recipe import RecipeName


def probe(
    checkpoint: CheckpointFiles,
    *,
    index: tuple[Path, ...],
    recipe: RecipeName = "paper",
    inputs: Literal["features", "clips"] | None = None,
    clips: int | None = None,
    crops: Literal[1, 5, 10] = 1,
    seeds: tuple[int, ...] = (0,),
    epochs: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    config: Path | None = None,
    json: Json = False,
) -> None:
    """Linear probe of a checkpoint's frozen encoders, per view and two-stream: accuracy, per class, confusion matrix.

    The result is written into the run's folder `evaluations` and joins its metrics, for `report`.

    Args:
        index: The index (CSV) of every official split, one or several.
        recipe: paper: the test split is used once, at the end. coclr: the best epoch on the test split, and colour
            jitter at test time. iic: 10 clips of max-pooled feature maps.
        inputs: One stored feature per video (the default), or augmented clips, decoded in every epoch.
        clips: Uniform windows per video; by default those of the recipe.
        crops: Centre, five or ten crops of every window.
        seeds: Several give an interval over them; one gives the bootstrap's over sources.
        epochs: Overrides the config; its milestones move along.
        lr: Overrides the config.
        batch_size: Overrides the config.
        config: TOML file whose section [probe] is taken in place of the checkpoint's.
    """
    import dataclasses

    settings = classifier_settings("probe", checkpoint, config)
    if inputs == "clips" and settings.inputs == "features":
        settings = dataclasses.replace(settings, inputs=inputs, lr=0.1, batch_size=16)
    elif inputs:
        settings = dataclasses.replace(settings, inputs=inputs)
    run_classify("probe", checkpoint, index, recipe, clips, crops, seeds, settings, json,
              epochs=epochs, lr=lr, batch_size=batch_size)  # fmt: skip
