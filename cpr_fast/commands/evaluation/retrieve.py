"""`cpr-fast retrieve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from cpr_fast.commands.inputs import (
    require_at_least,
    require_checkpoints,
    require_indexes,
    require_no_windows,
    require_videos,
)
from cpr_fast.commands.options import CheckpointFiles, Json, PicturesFps, RecipeName
from cpr_fast.commands.output import about_unfinished, after_evaluation, left_out_of_map, show_once, table
from cpr_fast.evaluate.retrieval.names import (
    MODEL_NAMES,
    VIEW_NAMES,
    interval,
    percent,
    signed,
    signed_interval,
    with_copies,
    without_copies,
)
from cpr_fast.wording import counted

RANKS = (1, 5, 10, 20, 50)


def retrieve(
    checkpoint: CheckpointFiles,
    *,
    index: tuple[Path, ...],
    protocol: Literal["auto", "train_test", "leave_source_out"] = "auto",
    recipe: RecipeName | None = None,
    clips: int | None = None,
    crops: Literal[1, 5, 10] | None = None,
    pictures_fps: PicturesFps = None,
    cache: bool = True,
    json: Json = False,
) -> None:
    """Measure nearest-neighbour retrieval: mAP and R@1, 5, 10, 20, 50 of every view of a checkpoint and two-stream.

    The results are also written to the metrics of the checkpoint's run, for `cpr-fast report`. Under `torchrun` the
    processes share the videos.

    Args:
        index: The index (CSV), or one for each official split: several give means and standard deviations.
        protocol: train_test: videos of the test split query those of the train split. leave_source_out: every video
            queries all others but those of its own source. auto: train_test where the index has both splits.
        recipe: paper: nothing is random at test time. coclr: with the colour jitter that the released code leaves on.
            iic: 10 clips, max-pooled feature maps, no centring. By default iic for networks that were trained on IIC's
            clips, else paper.
        clips: Number of windows per video, evenly spaced; by default the recipe's (paper, coclr: all windows, which
            overlap by half).
        crops: Take the centre crop (1, the default), five or ten crops of every window.
        cache: Store features beside the checkpoint and reuse them.
    """
    require_checkpoints("CHECKPOINT", checkpoint)
    require_indexes("--index", index)
    require_at_least("--clips", 1, clips)
    require_no_windows([*checkpoint, *index], recipe=recipe, clips=clips, crops=crops)
    require_videos("--index", index)
    from cpr_fast.runtime.progress import announce

    announce("Loading PyTorch and NVIDIA DALI")
    from cpr_fast.evaluate.features.results import run_of
    from cpr_fast.evaluate.retrieval.retrieve import retrieve as run

    announce("Reading the checkpoint and the index")
    result = run(
        checkpoint, index, protocol=protocol, recipe=recipe, run_dir=run_of(checkpoint), clips_per_video=clips,
        crops=crops or 1, pictures_fps=pictures_fps, cache=cache, progress=True,
    )  # fmt: skip
    folder = run_of(checkpoint)
    lines = [] if json else [*lines_of(result), *about_unfinished([folder])]
    show_once(result, json, lines=lines, next_step=after_evaluation(folder, checkpoint, index[0]))


def lines_of(result: dict[str, Any]) -> list[str]:
    """Returns the table of a retrieval result, a row for each network and view, two views together first, and where the
    result was written."""
    from cpr_fast.evaluate.retrieval.ranking import TOGETHER

    names = list(dict.fromkeys(row["name"] for row in result["summary"]))
    rows = sorted(result["summary"], key=lambda row: (names.index(row["name"]), row["view"] not in TOGETHER))
    body = []
    for row in rows:
        sure = [text for key in ("map", "r@1") for text in (percent(row[key], ""), _spread(row, key))]
        rest = [percent(row[f"r@{k}"], "") for k in RANKS[1:]]
        body.append([f"{MODEL_NAMES[row['name']]} · {VIEW_NAMES[row['view']]}", *sure, *rest])
    first = rows[0]
    title, *about = _compared(first, result["protocol"], result["recipe"])
    over = "95 % interval" if first["splits"] == 1 else "deviation"
    header = ["Network · view, in %", "mAP", over, "R@1", over, *(f"R@{k}" for k in RANKS[1:])]
    unlabelled = all(row["r@1"] is None and row["chance_r@1"] is None for row in rows)
    if unlabelled and any(row["name"] == "stored" for row in rows):
        lines = [title, "", "The store has no labels, so R@k and mAP cannot be measured."]
    elif unlabelled:
        said = "The index has no labels, so R@k and mAP cannot be measured; the report shows which videos are similar."
        lines = [title, "", said, *_same_video(result.get("same_video") or [])]
    else:
        lines = [title, *about, "", table(header, body), "", *_notes(rows)]
        if result.get("same_video"):
            few = "Too few queries have a label, or all have one class: these figures say little about the network."
            lines += ["", few, *_same_video(result["same_video"])]
    if result.get("leakage"):
        lines += ["", f"note: {result['leakage']}"]
    return [*lines, "", f"all figures: {result['file']}"]


def _same_video(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the table of the comparison with the untrained network that needs no labels, see `same_video_rates`."""
    if not rows:
        return ["Too few videos hold two clips to compare the network with an untrained one without labels."]
    body = [
        [f"{MODEL_NAMES[row['name']]} · {VIEW_NAMES[row['view']]}", percent(row["r@1"], ""), interval(row["r@1_ci95"]),
         signed(row.get("difference")), signed_interval(row.get("difference_ci95"))]
        for row in rows
    ]  # fmt: skip
    header = ["Network · view", "same video, %", "95 % interval", "minus untrained, points", "95 % interval of it"]
    return [
        "",
        f"How often the clip nearest to the first clip of a video is the last clip of the same video, of "
        f"{counted(rows[0]['videos'], 'video')}:",
        table(header, body),
        f"chance {percent(rows[0]['chance_r@1'])}; "
        + "where a view learnt, the interval of its difference to the untrained network (last column) lies above 0",
        *filter(None, [without_copies(rows[0]["copies"])]),
    ]


def _compared(row: dict[str, Any], protocol: str, recipe: str) -> list[str]:
    """Returns the title of a result: which videos search among which; and which videos are left out, if any are."""
    queries, gallery, how = row["queries"], row["gallery"], f"(protocol {protocol}, test-time recipe {recipe})"
    if protocol == "train_test":
        who = counted(queries, "test video searches", "test videos search")
        return [f"{who} among {counted(gallery, 'training video')} {how}"]
    lines = [f"{queries} of {counted(gallery, 'video')} search, each among the videos of all other sources {how}"]
    if (out := gallery - queries) > 0 and row["splits"] == 1:
        lines.append(
            f"  {'the other one has' if out == 1 else f'the other {out} have'} no label, or no video of another source "
            "has the same label, so that there is nothing to find"
        )
    return lines


def _spread(row: dict[str, Any], key: str) -> str:
    """Returns the interval of a measure or, over several splits, its standard deviation."""
    bounds, deviation = row[f"{key}_ci95"], row[f"{key}_std"]
    if bounds:
        return interval(bounds)
    return percent(deviation, "")


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    """Returns what a reader of the table needs to know: chance, the intervals, and queries that are left out."""
    first = rows[0]
    chance = f"chance mAP {percent(first['chance_map'])}, R@1 {percent(first['chance_r@1'])}"
    notes = [f"mAP: mean average precision; {chance}"]
    if first["splits"] == 1:
        said = "none, because all queries are of one source" if first["r@1_ci95"] is None else "bootstrap over sources"
        notes.append(f"95 % intervals: {said}")
    notes += filter(None, [with_copies(first["queries_with_copy"])])
    return notes + left_out_of_map(first["map_left_out"])
