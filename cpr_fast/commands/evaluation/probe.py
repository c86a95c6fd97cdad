"""`cpr-fast probe`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from cpr_fast.commands.evaluation.classify import classifier_settings, run_classify
from cpr_fast.commands.inputs import require_no_windows
from cpr_fast.commands.options import CheckpointFiles, Json, PicturesFps, RecipeName


def probe(
    checkpoint: CheckpointFiles,
    *,
    index: tuple[Path, ...],
    recipe: RecipeName | None = None,
    inputs: Literal["features", "clips"] | None = None,
    clips: int | None = None,
    crops: Literal[1, 5, 10] | None = None,
    pictures_fps: PicturesFps = None,
    seeds: tuple[int, ...] = (0,),
    epochs: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    config: Path | None = None,
    json: Json = False,
) -> None:
    """Train a linear probe on a checkpoint's frozen encoders, per view and two-stream, and test it.

    The result holds the accuracy of each class and the confusion matrix. It is written to the folder `evaluations` of
    the checkpoint's run and to the run's metrics, for `cpr-fast report`.

    Args:
        index: The index (CSV) with labelled videos in the splits train and test, or one for each official split.
        recipe: paper: the test split is used once, at the end. coclr: the best epoch on the test split, and colour
            jitter at test time, as in the released code. iic: 10 clips of max-pooled feature maps. By default iic for
            networks that were trained on IIC's clips, else paper.
        inputs: features: one stored feature per video (the default). clips: augmented clips, decoded in every epoch.
        clips: Number of windows per video, evenly spaced; by default the recipe's.
        crops: Take the centre crop (1, the default), five or ten crops of every window.
        seeds: Several seeds give an interval over seeds; one seed gives a bootstrap interval over sources.
        epochs: Replaces the config's number of epochs; its milestones are scaled.
        lr: Replaces the config's learning rate.
        batch_size: Replaces the config's batch size.
        config: A TOML file whose section [probe] is used instead of the checkpoint's.
    """
    require_no_windows([*checkpoint, *index], recipe=recipe, clips=clips, crops=crops)
    settings = classifier_settings("probe", checkpoint, index, config)
    if inputs == "clips" and settings.inputs == "features":
        settings = dataclasses.replace(settings, inputs=inputs, lr=0.1, batch_size=16, normalize=True)
    elif inputs:
        settings = dataclasses.replace(settings, inputs=inputs)
    run_classify("probe", checkpoint, index, recipe, clips, crops or 1, pictures_fps, seeds, settings, json,
                 epochs=epochs, lr=lr, batch_size=batch_size)  # fmt: skip
