"""What `cpr-fast probe` and `cpr-fast finetune` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from cpr_fast.commands.output import show_once
from cpr_fast.evaluate.features.recipe import RecipeName


def classifier_settings(task: str, checkpoint: tuple[str, ...], config: Path | None) -> Any:
    """The section `task` of the file `config`, else of the first checkpoint's config."""
    from cpr_fast.config import Config, load
    from cpr_fast.evaluate.features.results import checkpoint_files
    from cpr_fast.weights.checkpoint import load_checkpoint

    if config:
        return getattr(load(config), task)
    return getattr(Config.from_dict(load_checkpoint(checkpoint_files(checkpoint)[0][1])["config"]), task)


def run_classify(
    task: Literal["probe", "finetune"],
    checkpoint: tuple[str, ...],
    index: tuple[Path, ...],
    recipe: RecipeName,
    clips: int | None,
    crops: int,
    seeds: tuple[int, ...],
    settings: Any,
    json: bool,
    **overrides: Any,
) -> None:
    """`probe` and `finetune`; without `json` what fits a screen: no confusion matrix, no list of classes."""
    from cpr_fast.config import override_classifier
    from cpr_fast.evaluate.classify.classify import classify
    from cpr_fast.evaluate.features.results import run_of

    settings = override_classifier(task, settings, **overrides)
    result = classify(
        checkpoint, index, task=task, settings=settings, recipe=recipe, clips_per_video=clips, crops=crops,
        seeds=seeds, run_dir=run_of(checkpoint), progress=True,
    )  # fmt: skip
    if not json:
        long = ("per_class", "confusion")
        result["results"] = [{key: v for key, v in row.items() if key not in long} for row in result["results"]]
    show_once(result, json)
