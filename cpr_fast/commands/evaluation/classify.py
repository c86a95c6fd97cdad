"""Functions shared by `cpr-fast probe` and `cpr-fast finetune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from cpr_fast.commands.inputs import (
    require_at_least,
    require_checkpoints,
    require_file,
    require_indexes,
    require_splits,
    require_videos,
)
from cpr_fast.commands.options import RecipeName
from cpr_fast.commands.output import about_unfinished, after_evaluation, show_once, table
from cpr_fast.data.features.names import is_store
from cpr_fast.evaluate.retrieval.names import MISSING, VIEW_NAMES, interval, percent
from cpr_fast.wording import counted, listed


def classifier_settings(task: str, checkpoint: tuple[str, ...], index: tuple[Path, ...], config: Path | None) -> Any:
    """Returns the section `task` of the file `config`, or else of the first checkpoint's config.

    Checks the files that the user named first, before torch is imported.
    """
    require_checkpoints("CHECKPOINT", checkpoint)
    require_indexes("--index", index)
    require_splits("--index", index)
    require_file("--config", config)
    from cpr_fast.config import load
    from cpr_fast.runtime.progress import announce

    settings = getattr(load(config), task) if config else None
    require_videos("--index", index)
    announce("Loading PyTorch and NVIDIA DALI")
    if settings is not None:
        return settings
    from cpr_fast.config import Config
    from cpr_fast.evaluate.features.results import checkpoint_files
    from cpr_fast.weights.checkpoint import load_trained

    if is_store(checkpoint[0]):
        return getattr(Config(), task)
    return getattr(load_trained(checkpoint_files(checkpoint)[0][1])[0], task)


def run_classify(
    task: Literal["probe", "finetune"],
    checkpoint: tuple[str, ...],
    index: tuple[Path, ...],
    recipe: RecipeName | None,
    clips: int | None,
    crops: int | None,
    pictures_fps: float | None,
    seeds: tuple[int, ...],
    settings: Any,
    json: bool,
    **overrides: Any,
) -> None:
    """Trains and tests the classifiers and prints their accuracy; `overrides` are changes of `settings`."""
    for name, value in (overrides | {"clips": clips}).items():
        if name in ("clips", "epochs", "batch_size"):
            require_at_least(f"--{name.replace('_', '-')}", 1, value)
    from cpr_fast.config import override_classifier
    from cpr_fast.config.unreached import unreached_in_classifier
    from cpr_fast.evaluate.classify.classify import classify
    from cpr_fast.evaluate.features.results import run_of
    from cpr_fast.runtime.progress import announce

    settings = override_classifier(task, settings, **overrides)
    for text in unreached_in_classifier(task, settings):
        announce(f"Warning: {text}", end="")
    result = classify(
        checkpoint, index, task=task, settings=settings, recipe=recipe, clips_per_video=clips, crops=crops,
        pictures_fps=pictures_fps, seeds=seeds, run_dir=run_of(checkpoint), progress=True,
    )  # fmt: skip
    run = run_of(checkpoint)
    lines = [] if json else [*_lines(result), *about_unfinished([run])]
    show_once(result, json, lines=lines, next_step=after_evaluation(run, checkpoint, index[0]))


def _lines(result: dict[str, Any]) -> list[str]:
    rows = []
    for row in result["summary"]:
        bounds = row["accuracy_ci95"]
        said = f"{interval(bounds)}, over {row['interval_over']}" if bounds else MISSING
        rows.append([VIEW_NAMES[row["view"]], percent(row["accuracy"], ""), said, row["splits"], row["seeds"]])
    tested = sum(row["videos"] for row in result["results"][:1] if "videos" in row)
    title = f"{result['task']}, test-time recipe {result['recipe']}" + (
        f", {counted(tested, 'test video')}" if tested else ""
    )
    lines = [title, "", table(["View, in %", "accuracy", "95 % interval", "splits", "seeds"], rows)]
    lines += _near_chance(result)
    if result.get("leakage"):
        lines += ["", f"note: {result['leakage']}"]
    return [*lines, "", f"all figures, per class and the confusion matrix: {result['file']}"]


def _near_chance(result: dict[str, Any]) -> list[str]:
    """Returns a note that names the views of which nothing shows that the classifier learnt."""
    counts = [[sum(row) for row in of["confusion"]] for of in result["results"] if "confusion" in of]
    if not counts:
        return []
    chance = sum(max(of) / sum(of) for of in counts) / len(counts)
    views = [VIEW_NAMES[row["view"]] for row in result["summary"]
             if (row["accuracy_ci95"] or [row["accuracy"]])[0] <= chance]  # fmt: skip
    if not views:
        return []
    return ["", f"note: {listed(views)}: the accuracy is not certainly better than {percent(chance)}, which naming the "
            "most frequent class for every video gives; nothing shows that the classifier learnt"]  # fmt: skip
