"""What can be said of a run whose videos have no labels: how it compares with the untrained network, its loss against
chance, its nearest neighbours, and the number of dimensions that its features use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpr_fast.config import HealthConfig
from cpr_fast.data.index.index import Index, IndexFileError, Video
from cpr_fast.errors import InputError
from cpr_fast.evaluate.retrieval.names import VIEW_NAMES, percent, signed, signed_interval, without_copies
from cpr_fast.report.neighbours import Neighbours, confidence, find_neighbours
from cpr_fast.report.run_folder.features import StoredFeatures, names_of, stored_features
from cpr_fast.report.run_folder.outcome import MORE_EPOCHS, judge, verdict
from cpr_fast.report.run_folder.run import VIEWS, Run
from cpr_fast.report.run_folder.unfinished import unfinished
from cpr_fast.wording import counted, listed

MANY_QUERIES = 1024  # of a measurement of the effective rank by a version that did not count them
MOST_VIDEOS = 20_000  # limit of videos compared with each other; of more videos, evenly spaced ones are used


MEANINGS = {
    ("learnt", ""): "better",
    ("unsure", "before"): "not certain to be better, because the interval includes 0",
    ("unsure", "chance"): "better, but not certain to be better than chance",
    ("nothing", "before"): "not better",
    ("nothing", "chance"): "better, but not better than chance",
}


@dataclass(frozen=True)
class Compared:
    """The neighbours of the videos of an index by a run's stored features, and how far they can be trusted.

    Of exact copies only the first is compared: a copy would be the nearest video, and hide what the network finds.

    Attributes:
        index: the file that lists the videos.
        names: the name of every video of the index that a page shows.
        copies: pairs of videos of different sources with the same bytes, of which the second was left out.
        total, distinct, step: number of videos of the index, and without copies, of which every `step`-th was compared.
        level, reasons: see `confidence`.
    """

    index: Path
    features: StoredFeatures
    found: Neighbours
    names: Mapping[Video, str]
    copies: list[tuple[Video, Video]]
    total: int
    distinct: int
    step: int
    level: str
    reasons: list[str]


def index_of(run: Run) -> Path:
    """Returns the index that the run was evaluated on or, where that is not known, trained on. Raises InputError if
    neither is known."""
    data = run.config.get("data", {})
    path = next(iter(run.evaluated_indexes), None) or data.get("features") or data.get("index")
    if not path:
        raise InputError(f"run folder {str(run.folder)!r} does not say its index; expected --index INDEX.csv")
    return Path(path)


def _videos(path: Path) -> Index:
    """Returns the videos of an index, whatever their split; rows that cannot be used are left out. Raises InputError,
    also if no row is left."""
    skipped: list[IndexFileError] = []
    videos = Index.load(path, require_flow=False, skipped=skipped)
    if not len(videos):
        why = skipped[0] if skipped else "it has no row"
        raise InputError(f"{path}: no video of this index can be read here: {why}")
    return videos


def compare_videos(run: Run, index: Path | None = None) -> Compared | None:
    """Compares the videos of an index with each other, by default those of `index_of`; None if `cpr-fast retrieve` has
    not stored features of two of them.

    Raises:
        InputError: the index cannot be read.
    """
    path = index or index_of(run)
    if path.is_dir():  # a store of features, whose videos are not looked at
        return None
    videos = _videos(path)
    originals = videos.originals()
    distinct = [video for place, video in enumerate(videos) if originals[place] == place]
    step = -(-len(distinct) // MOST_VIDEOS)
    features = stored_features(run.folder, Index(distinct[::step]))
    if features is None or len(features.videos) < 2:
        return None
    source_ids = {name: i for i, name in enumerate(dict.fromkeys(video.source for video in features.videos))}
    sources = torch.tensor([source_ids[video.source] for video in features.videos])
    found = find_neighbours(list(features.streams.values()), features.metric, sources)
    level, reasons = confidence(features.streams, features.metric, sources, found, features.pixels, _doubts(run))
    copies = [(videos[first], video) for video, first in zip(videos, originals, strict=True)
              if videos[first].source != video.source]  # fmt: skip
    return Compared(path, features, found, names_of(videos), copies, len(videos), len(distinct), step, level, reasons)


def _doubts(run: Run) -> list[str]:
    """Returns sentences that say why the run may not have learnt, so that its neighbours mean little."""
    results, _ = same_video(run)
    doubts = ["The warnings at the head of this page make the features doubtful."] if verdict(run) else []
    if results and set(results.values()) == {"nothing"}:
        doubts.append("No view finds clips of the same video more often than both the untrained network and chance.")
    return doubts


def signs(run: Run, compared: Compared | None = None) -> list[str]:
    """Returns the first lines of the report of a run without labels: a verdict, and what the comparison with the
    untrained network, its loss, its nearest neighbours and its features show.

    Only the comparison with the untrained network shows that a run learnt: clips of a video have similar pictures, so a
    loss better than chance and sensible neighbours are also found with random weights. `compared` is what
    `compare_videos` returned, where it was called before.
    """
    below, loss = _loss(run)
    level, neighbours = _neighbours(run, compared)
    results, same = same_video(run)
    better = [view for view, result in results.items() if result == "learnt"]
    learnt = [VIEW_NAMES[view] for view in better if below.get(view) is not False]  # the loss does not contradict it
    doubtful = set(below.values()) == {False} or level == "low"
    if learnt and not doubtful:
        found = f"the signs below suggest that this run learnt ({listed(learnt)})"
    elif not better and (doubtful or (results and set(results.values()) == {"nothing"})):
        found = "nothing below shows that this run learnt"
    else:
        found = "the signs below do not decide whether this run learnt"
    if run.index is not None and run.index.classes:
        why = "Too few videos have a label, or all have one class, so that retrieval by classes says little"
    else:
        why = "The videos have no labels, so retrieval cannot be measured"
    stopped = unfinished(run)
    said = f"{why}; {'so far ' if stopped else ''}{found}."
    if not run.retrieval:
        said += " What would show it, the comparison with the untrained network, is missing; see the next line."
    if not stopped and (verdict(run) if not run.retrieval else not learnt or doubtful):
        said += f" {MORE_EPOCHS}"
    return [said, *(text for text in (same, loss, neighbours, _rank(run)) if text)]


def same_video(run: Run) -> tuple[dict[str, str], str | None]:
    """Returns whether each trained view finds clips of the same video more often than the untrained network, {view:
    "learnt" | "unsure" | "nothing"}, and a sentence; see `cpr_fast.evaluate.retrieval.same_video`."""
    results, parts = {}, []
    before = {row["view"]: row for row in run.same_video if row["name"] == "untrained"}
    for row in run.same_video:
        if row["name"] != "trained" or row["view"] not in before:
            continue
        difference, bounds = row["difference"], row["difference_ci95"]
        judged = judge(row["r@1"], row["r@1_ci95"], row["chance_r@1"], difference, bounds)
        results[row["view"]] = judged[0]
        meaning = "worse" if bounds and bounds[1] < 0 else MEANINGS[judged]
        parts.append(
            f"{VIEW_NAMES[row['view']]} {percent(row['r@1'])}, untrained {percent(before[row['view']]['r@1'])} "
            f"(difference {signed(difference)} points, 95 % interval {signed_interval(bounds)}: {meaning})"
        )
    if parts:
        count, chance = run.same_video[0]["videos"], percent(run.same_video[0]["chance_r@1"])
        said = f"Nearest clip of the same video, {counted(count, 'video')}, chance {chance}: {'; '.join(parts)}."
        return results, " ".join(filter(None, [said, without_copies(run.same_video[0].get("copies", 0))]))
    if not run.retrieval:
        return {}, (
            "Nearest clip of the same video: not compared with the untrained network, because no evaluation of this "
            f"run has finished. Run `{run.evaluation_command}`, then `cpr-fast report` again."
        )
    return {}, (
        "Nearest clip of the same video: not compared with the untrained network. `cpr-fast retrieve` does so where "
        "less than half of the queries have a label and two videos or more hold two clips."
    )


def _loss(run: Run) -> tuple[dict[str, bool | None], str | None]:
    """Returns for every trained view whether the loss of its last epoch is better than chance (None: cannot be
    compared), and a sentence about it."""
    views: dict[str, bool | None] = {}
    said: dict[bool | None, list[str]] = {}
    for view in VIEWS:
        rows = [row for row in run.epochs if row["view"] == view and row.get("loss") is not None]
        if not rows:
            continue
        last, chance = rows[-1]["loss"], rows[-1].get("loss_chance")
        below = None if chance is None or (rows[-1].get("random_negatives") and last < chance) else last < chance
        text = f"{VIEW_NAMES[view]} {last:.3f}" + ("" if chance is None else f" (chance {chance:.3f})")
        views[view] = below
        said.setdefault(below, []).append(text)
    meanings = {
        True: "better than chance, which it may be with random weights, too",
        False: "not better than chance: it does not show that anything was learnt",
        None: "cannot be compared with chance, because it is not known or the queue held random vectors",
    }
    parts = [f"{', '.join(said[kind])} – {meaning}" for kind, meaning in meanings.items() if kind in said]
    return views, f"Mean loss of the last epoch: {'; '.join(parts)}." if parts else None


def _neighbours(run: Run, compared: Compared | None) -> tuple[str | None, str]:
    """Returns the confidence in the nearest neighbours, or None if it is not known, and a sentence with the checks or
    with what to run."""
    try:
        compared = compared or compare_videos(run)
    except InputError as error:
        return None, f"Nearest neighbours: not known, because the index cannot be read ({error})."
    if compared is None:
        return None, (
            f"Nearest neighbours: not known yet. Run `{run.evaluation_command}`, then `cpr-fast report` again."
        )
    return compared.level, f"Nearest neighbours, confidence {compared.level}: {' '.join(compared.reasons)}"


def _rank(run: Run) -> str | None:
    """Returns the effective rank of the queries of each view at the last measurement."""
    ranks: dict[str, Any] = {}
    for row in run.health:
        ranks |= {view: value for view, value in row["effective_rank"].items() if value is not None}
    if not ranks:
        return None
    width = run.config.get("model", {}).get("feature_dim")
    least = run.config.get("health", {}).get("min_effective_rank")
    if least is not None:
        least = HealthConfig(min_effective_rank=least).rank_limit(run.health[-1].get("queries", MANY_QUERIES))
    values = ", ".join(f"{VIEW_NAMES[view]} {value:.1f}" for view, value in ranks.items())
    of = "" if width is None else f" of {width}"
    low = [VIEW_NAMES[view] for view, value in ranks.items() if least is not None and value < least]
    limit = "" if least is None else f", and {' and '.join(low) or 'no view'} is below the limit of {least:g}"
    return f"Effective rank, the number of dimensions that the last training clips use: {values}{of}{limit}."
