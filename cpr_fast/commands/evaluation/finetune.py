"""`cpr-fast finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cpr_fast.commands.evaluation.classify import classifier_settings, run_classify
from cpr_fast.commands.options import CheckpointFiles, Json, PicturesFps, RecipeName


def finetune(
    checkpoint: CheckpointFiles,
    *,
    index: tuple[Path, ...],
    recipe: RecipeName | None = None,
    clips: int | None = None,
    crops: Literal[1, 5, 10] | None = None,
    pictures_fps: PicturesFps = None,
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
    """Finetune a checkpoint's encoders as classifiers, per view and two-stream, and test them.

    The same command, run again, continues from the last finished epoch, or from the step at which SIGTERM, SIGUSR1 or
    Ctrl-C stopped it. The result is written to the folder `evaluations` of the checkpoint's run and to the run's
    metrics, for `cpr-fast report`. Under `torchrun` every process trains on its share of a batch and tests its share of
    the videos.

    Args:
        index: The index (CSV) with labelled videos in the splits train and test, or one for each official split.
        recipe: paper: the test split is used once, at the end. coclr: the best epoch on the test split, and colour
            jitter at test time, as in the released code. iic: 10 clips per test video. By default iic for networks that
            were trained on IIC's clips, else paper.
        clips: Number of windows per test video, evenly spaced; by default the recipe's (paper, coclr: all windows).
        crops: Number of crops per window: 1 (centre), 5 or 10; results for the smaller numbers are reported as well. By
            default 1 with the recipe iic, else 10.
        seeds: Several seeds give an interval over seeds; one seed gives a bootstrap interval over sources.
        epochs: Replaces the config's number of epochs; its milestones, or the patience of a plateau, are scaled.
        lr: Learning rate of the classifier. This and the following options replace the config's settings.
        backbone_lr: Learning rate of the backbone's last layer; 0 freezes the backbone. CoCLR's code uses 1e-4.
        layer_decay: Learning rate of each layer as a fraction of that of the layer above it.
        dropout: Dropout on the pooled features.
        batch_size: Clips per step and process.
        config: A TOML file whose section [finetune] is used instead of the checkpoint's.
    """
    settings = classifier_settings("finetune", checkpoint, index, config)
    run_classify("finetune", checkpoint, index, recipe, clips, crops, pictures_fps, seeds, settings, json,
                 epochs=epochs, lr=lr, backbone_lr=backbone_lr, layer_decay=layer_decay, dropout=dropout,
                 batch_size=batch_size)  # fmt: skip
