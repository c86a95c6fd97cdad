"""`cpr-fast finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cpr_fast.commands.evaluation.classify import classifier_settings, run_classify
from cpr_fast.commands.options import CheckpointFiles, Json
from cpr_fast.evaluate.features.recipe import RecipeName


def finetune(
    checkpoint: CheckpointFiles,
    *,
    index: tuple[Path, ...],
    recipe: RecipeName = "paper",
    clips: int | None = None,
    crops: Literal[1, 5, 10] = 10,
    seeds: tuple[int, ...] = (0,),
    epochs: int | None = None,
    lr: float | None = None,
    backbone_lr: float | None = None,
    layer_decay: float | None = None,
    dropout: float | None = None,
    batch_size: int | None = None,
    config: Path | None = None,
    json: Json = False,
) -> None:
    """Finetune a checkpoint's encoders, per view and two-stream: accuracy, per class, confusion matrix.

    Started again, it goes on from the last finished epoch, or from the step at which SIGTERM or SIGUSR1 stopped it. The
    result is written into the run's folder `evaluations` and joins its metrics, for `report`. Under `torchrun` every
    process trains on its share of a batch and tests its share of the videos.

    Args:
        index: The index (CSV) of every official split, one or several.
        recipe: paper: the test split is used once, at the end. coclr: the best epoch on the test split, and colour
            jitter at test time. iic: 10 clips per test video.
        clips: Uniform windows per test video; by default those of the recipe (paper, coclr: all).
        crops: Centre, five or ten crops of every window; the smaller sets are told as well.
        seeds: Several give an interval over them; one gives the bootstrap's over sources.
        epochs: Overrides the config; its milestones move along.
        lr: Of the classifier. Overrides the config, as do the following.
        backbone_lr: Of the backbone's last layer; 0 freezes the backbone. CoCLR's code: 1e-4.
        layer_decay: Each layer learns at this share of the rate of the one above it.
        dropout: Of the pooled features.
        batch_size: Clips of a step, of each process.
        config: TOML file whose section [finetune] is taken in place of the checkpoint's.
    """
    settings = classifier_settings("finetune", checkpoint, config)
    run_classify("finetune", checkpoint, index, recipe, clips, crops, seeds, settings, json,
              epochs=epochs, lr=lr, backbone_lr=backbone_lr, layer_decay=layer_decay, dropout=dropout,
              batch_size=batch_size)  # fmt: skip
