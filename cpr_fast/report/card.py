"""The model card of exported weights: what a run recorded about its data, recipe, training and results.

A card says only what the checkpoint and the run folder hold, and names what they do not tell.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpr_fast.config import Config
from cpr_fast.evaluate.features.results import run_of
from cpr_fast.evaluate.retrieval.names import MODEL_NAMES, VIEW_NAMES, percent
from cpr_fast.report.run_folder.run import Run, method_name
from cpr_fast.wording import counted, listed

UNKNOWN = "not recorded"
LIBRARY = "cpr_fast"


def model_card(about: dict[str, Any], payload: dict[str, Any], *, checkpoint: Path, name: str) -> str:
    """Returns README.md of a folder of weights.

    Args:
        about: the content of its config.json, see `cpr_fast.weights.hub`.
        payload: the dict of the checkpoint.
        checkpoint: its file; if this is in a run folder, the rows of its metrics are read.
        name: of the model.
    """
    folder = run_of(checkpoint)
    run = None if folder is None else Run(folder)
    training = about["training"]
    parts = [
        _front_matter(training),
        f"# {name}\n\n{_summary(about, payload)}",
        f"## Use\n\n{_use(about, name)}",
        f"## Data\n\n{_data(training, payload)}",
        f"## Recipe\n\n{_recipe(training, payload)}",
        f"## Training\n\n{_training(run, payload)}",
        f"## Results\n\n{_results(run)}",
        "## Limits\n\n" + "\n".join(f"- {text}" for text in _limits(about, run, payload)),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(training: dict[str, Any]) -> str:
    tags = ["video", "self-supervised-learning", "feature-extraction", "cascade-positive-retrieval"]
    named = training["data"]["index"]
    known = f"; the index of the run: {json.dumps(named)}" if named else ""
    return "\n".join([
        "---",
        "license: unknown",
        f"library_name: {LIBRARY}",
        "tags:",
        *(f"- {tag}" for tag in tags),
        f"# datasets: {UNKNOWN}{known}",  # no name, which a hub would take for that of a data set
        "---",
    ])  # fmt: skip


def _summary(about: dict[str, Any], payload: dict[str, Any]) -> str:
    training = about["training"]
    cycles = training["schedule"]["cycles"] if "cycle" in payload else []
    methods = list(dict.fromkeys(method_name(cycle["mining"], training["mining"]["stages"]) for cycle in cycles))
    views = listed([VIEW_NAMES[view] for view in about["views"]])
    how = f", trained with {listed(methods)}" if methods else ""
    return (
        f"Encoders of video clips ({views}), `{training['model']['arch']}`{how}. Written by "
        "`cpr-fast export --to hub`; this card says what the run has recorded, and what it has not is marked "
        f"as {UNKNOWN}."
    )


def _use(about: dict[str, Any], name: str) -> str:
    clip, views = about["clip"], ", ".join(f"`{view}`" for view in about["views"])
    shape = f"[N, 3, {clip['frames']}, {clip['size']}, {clip['size']}]"
    code = ["import cpr_fast", "", f"encoder = cpr_fast.from_pretrained({name!r})",
            f"features = encoder.features(clips)  # clips {shape} float32"]  # fmt: skip
    text = (
        f"Clips have {counted(clip['frames'], 'frame')} at a distance of {clip['stride']}, of {clip['size']} x "
        f"{clip['size']} pixels, in 0..1 minus the mean {clip['mean']} divided by {clip['std']}. Views: {views}; by "
        f"default `{about['view']}`. `features` are what retrieval compares [N, {about['head']['width']}]; a call "
        f"returns the embedding of the loss [N, {about['head']['feature_dim']}]."
    )
    if about["network"] is not None:
        code = ["# with torch alone, in this folder", "from modeling import from_pretrained", "",
                'encoder = from_pretrained(".")', f"features = encoder.features(clips)  # clips {shape} float32", "",
                "# or with the package cpr_fast", *code[:-1]]  # fmt: skip
    else:
        arch = about["training"]["model"]["arch"]
        text += (
            f" The network is `{arch}`, whose code this folder does not hold: the package {LIBRARY} imports it, from a "
            "package or a file in the working directory."
        )
    return "```python\n" + "\n".join(code) + f"\n```\n\n{text}"


def _data(training: dict[str, Any], payload: dict[str, Any]) -> str:
    count = (payload.get("videos") or {}).get("count")
    index, split = training["data"]["index"], training["data"]["split"]
    place = f"index `{index}`, split {f'`{split}`' if split else '(all videos)'}" if index else f"index: {UNKNOWN}"
    return (
        f"Training videos: {UNKNOWN if count is None else f'{count:,}'}; {place}.\n"
        f"The data set, its licence and its origin: {UNKNOWN}."
    )


def _recipe(training: dict[str, Any], payload: dict[str, Any]) -> str:
    if "cycle" not in payload:
        return f"The weights were imported or finetuned; the recipe of their pretraining: {UNKNOWN}."
    defaults = Config().to_dict()
    kept = {
        section: {key: value for key, value in values.items() if value not in (defaults[section].get(key), {})}
        for section, values in training.items()
        if section not in ("probe", "finetune", "health", "run")
    }
    kept["run"] = {"seed": training["run"]["seed"]}
    if "cycles" in kept["schedule"]:
        cycles = kept["schedule"]["cycles"]
        kept["schedule"]["cycles"] = [
            {key: v for key, v in cycle.items() if v not in (None, [], ())} for cycle in cycles
        ]
    changed = json.dumps({section: values for section, values in kept.items() if values}, indent=1)
    return f"The settings that differ from the defaults of {LIBRARY}:\n\n```json\n{changed}\n```"


def _training(run: Run | None, payload: dict[str, Any]) -> str:
    made = payload.get("environment") or {}
    versions = ", ".join(f"{name} {version}" for name, version in (made.get("versions") or {}).items())
    lines = [
        f"- steps: {payload.get('step', UNKNOWN)}, epochs: {payload.get('epoch', UNKNOWN)}, "
        f"processes: {payload.get('processes', UNKNOWN)}",
        f"- device: {made.get('device', UNKNOWN)}; versions: {versions or UNKNOWN}; commit of {LIBRARY}: "
        f"{made.get('commit') or UNKNOWN}",
        f"- date: {made.get('date', UNKNOWN)}",
    ]
    outcome = None if run is None else run.outcome
    if outcome is None:
        return "\n".join([*lines, f"- outcome: {UNKNOWN}"])
    lines.append(f"- outcome of the run after {counted(outcome['step'], 'step')}: {outcome['text']}")
    if outcome["step"] != payload.get("step"):
        lines.append("- these weights are those of an earlier or later step than this outcome")
    return "\n".join(lines)


def _results(run: Run | None) -> str:
    evaluations = [] if run is None else run.evaluations
    tables = ["\n".join(_retrieval(rows)) for rows in evaluations]
    if run is not None and run.classified:
        tables.append("\n".join(_classified(run.classified)))
    if not tables:
        return f"Results on labelled or unlabelled videos: {UNKNOWN}."
    of = (
        "The evaluations of the run that are newest; with which of its checkpoints they were made is not recorded here."
    )
    return "\n\n".join([of, *tables])


def _retrieval(rows: list[dict[str, Any]]) -> Iterator[str]:
    first = rows[0]
    names = ", ".join(f"`{Path(path).name}`" for path in first.get("indexes") or []) or UNKNOWN
    yield f"Retrieval, protocol {first['protocol']}, recipe {first['recipe']}, index {names}:"
    yield ""
    yield "| network | view | R@1 | R@5 | mAP | queries | gallery |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        rates = " | ".join(percent(row.get(key)) for key in ("r@1", "r@5", "map"))
        name, view = MODEL_NAMES.get(row["name"], row["name"]), VIEW_NAMES.get(row["view"], row["view"])
        yield f"| {name} | {view} | {rates} | {row.get('queries', UNKNOWN)} | {row.get('gallery', UNKNOWN)} |"


def _classified(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "Classification:"
    yield ""
    yield "| task | recipe | view | split | seed | accuracy | index |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        view, index = VIEW_NAMES.get(row["view"], row["view"]), Path(row["index"]).name
        yield (f"| {row['task']} | {row['recipe']} | {view} | {row['split']} | {row['seed']} | "
               f"{percent(row['accuracy'])} | `{index}` |")  # fmt: skip


def _limits(about: dict[str, Any], run: Run | None, payload: dict[str, Any]) -> Iterator[str]:
    clip = about["clip"]
    # Of imported weights nothing says what they have seen.
    seen = "has seen clips" if "cycle" in payload else "is set for clips"
    yield (
        f"It {seen} of {counted(clip['frames'], 'frame')} of {clip['size']} x {clip['size']} pixels; what others "
        f"give: {UNKNOWN}."
    )
    yield f"Whether the weights may be used and passed on depends on the licence of the data, which is {UNKNOWN}."
    yield f"Biases of the training videos, and results on other data sets than those above: {UNKNOWN}."
    if about["views"] != ["rgb"]:
        yield "The views flow and residual expect images that cpr_fast computes: TV-L1 flow and differences of frames."
    if run is None or not (run.evaluations or run.classified):
        yield "Whether the features are better than those of the untrained network has not been measured."
    if run is not None and any(row["recipe"] == "coclr" for rows in (*run.evaluations, run.classified) for row in rows):
        yield "The recipe coclr selects classifiers on the test split and applies colour jitter to test clips."
    for text in (run.outcome or {}).get("warnings") or [] if run is not None else []:
        yield f"Warning of the run: {text}"
