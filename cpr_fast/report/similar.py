"""Writes the page for videos without labels: the videos that are similar, duplicated or odd according to the run's
network."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from cpr_fast.data.index.index import Video
from cpr_fast.evaluate.retrieval.names import VIEW_NAMES
from cpr_fast.report.figures.bars import histogram_figure
from cpr_fast.report.figures.film_strip import STRIP_FRAMES, film_strip, strip_image
from cpr_fast.report.figures.table import Column, Table
from cpr_fast.report.neighbours import (
    DUPLICATE,
    FAR,
    Neighbours,
    duplicate_pairs,
    odd_videos,
    pixel_agreement,
    same_file,
)
from cpr_fast.report.page import render, write_page
from cpr_fast.report.run_folder.features import StoredFeatures
from cpr_fast.report.run_folder.outcome import verdict
from cpr_fast.report.run_folder.run import Run
from cpr_fast.report.run_folder.unfinished import unfinished
from cpr_fast.report.sections.header import facts
from cpr_fast.report.sections.sheets import clip
from cpr_fast.report.unlabelled import Compared, same_video
from cpr_fast.wording import ordinal

QUERIES, PAIRS, ODD = 8, 12, 6  # numbers of queries, pairs and odd videos that are shown as film strips
JUDGED = 48  # number of pairs, the most similar ones, whose files and frames are compared
MOST_ROWS = 2000  # limit of the rows of a table
# Least correlation of the frames of copies, and of videos that may show the same place.
SAME_PICTURES, ALIKE = 0.95, 0.85
LEVELS = {
    "high": "High: the checks below are well above chance.",
    "moderate": "Moderate: the checks below are above chance, but not for all videos. Look at the videos themselves "
    "before you act on it.",
    "low": "Low: the checks below are near chance or no better than with an untrained network, or the videos "
    "hardly differ for the network. Rely on nothing on this page but pairs that are called certain.",
    "unknown": "Unknown: one view and one video per source leave nothing to check the neighbours against. Judge by the "
    "pictures.",
}


def similar_path(report: Path) -> Path:
    """Returns the path of the page of similar videos of a report: in the same folder, with "-similar" in its name."""
    return report.with_name(f"{report.stem}-similar.html")


def write_similar(run: Path, out: Path, compared: Compared) -> Path:
    """Writes the page to `out`.

    Args:
        run: a run folder in which `cpr-fast retrieve` has stored features.
        compared: its videos, see `compare_videos`.
    Raises:
        InputError: no metrics.
    """
    loaded = Run(Path(run))
    features, found = compared.features, compared.found
    troubled = verdict(loaded)
    results, same = same_video(loaded)
    no_better = bool(results) and set(results.values()) == {"nothing"}
    closest = found.similarity[:, 0]
    closest = closest[~closest.isinf()]
    page = render(
        "similar.html.j2",
        run=loaded,
        facts=facts(loaded)[:2] + _facts(features, compared.total, compared.step),
        verdict=[*filter(None, [unfinished(loaded)]), *troubled],
        level=LEVELS["low" if troubled or no_better else compared.level],
        reasons=[*([same] if same else []), *compared.reasons],
        similar=_similar(features, found),
        spread=histogram_figure(closest.tolist(), x="similarity", title="Similarity to the nearest video"),
        nearest=_table(features, found),
        duplicates=_duplicates(features, found),
        threshold=DUPLICATE,
        odd=_odd(features, found),
        far=FAR,
    )
    return write_page(page, Path(out))


def _facts(features: StoredFeatures, videos: int, step: int) -> list[tuple[str, str]]:
    views = " and ".join(VIEW_NAMES[view] for view in features.streams)
    compared = f"{len(features.videos):,} of {videos:,}" if len(features.videos) < videos else f"{videos:,}"
    why = (
        f", every {ordinal(step)} video"
        if step > 1
        else ", those whose features are stored"
        if "of" in compared
        else ""
    )
    return [
        ("Videos", f"{compared}{why}"),
        ("Sources", f"{len({video.source for video in features.videos}):,}"),
        ("Similarity", f"cosine of the trained network's features ({views}, recipe {features.recipe}), from -1 to 1"),
    ]


@functools.lru_cache(maxsize=256)
def _strip(path: Path, num_frames: int) -> str | None:
    return film_strip(path, num_frames, 0, num_frames)


def _clip(features: StoredFeatures, position: int, note: str = "") -> dict[str, Any]:
    video = features.videos[position]
    shown = clip(video.path, "", video.source, _strip(video.path, video.num_frames))
    label = f"class {video.label}" if video.label else ""
    return shown | {"caption": features.names[position], "note": " · ".join(filter(None, (note, label)))}


def _similar(features: StoredFeatures, found: Neighbours) -> list[dict[str, Any]]:
    """Returns videos spread evenly over the index, each with its nearest videos of other sources."""
    count = len(features.videos)
    chosen = np.unique(np.linspace(0, count - 1, min(QUERIES, count)).round().astype(int)).tolist()
    return [
        {
            "query": _clip(features, video),
            "found": [
                _clip(features, other, f"{value:.2f}")
                for other, value in zip(found.index[video].tolist(), found.similarity[video].tolist(), strict=True)
                if np.isfinite(value)
            ],
        }
        for video in chosen
    ]


def _table(features: StoredFeatures, found: Neighbours) -> Table:
    columns = [Column("Video"), Column("Nearest video of another source"), Column("Similarity", "number")]
    rows = [
        (name, features.names[other], value)
        for name, other, value in zip(features.names, found.index[:, 0].tolist(), found.similarity[:, 0].tolist(),
                                       strict=True)
        if np.isfinite(value)
    ]  # fmt: skip
    return Table("Nearest video of every video", columns, rows[:MOST_ROWS])


def _duplicates(features: StoredFeatures, found: Neighbours) -> dict[str, Any]:
    """Returns pairs above the threshold, the most certain first: those with equal files, then with equal frames, then
    with a high similarity only."""
    pairs = duplicate_pairs(found)
    judged = {(a, b): _judge(features.videos[a], features.videos[b]) for a, b, _ in pairs[:JUDGED]}
    pairs = sorted(pairs[:JUDGED], key=lambda pair: judged[pair[:2]][0]) + pairs[JUDGED:]
    shown = [
        {
            "query": _clip(features, a),
            "found": [_clip(features, b, f"{value:.3f}")],
            "text": judged[a, b][1],
        }
        for a, b, value in pairs[:PAIRS]
    ]
    later = f"Only the {JUDGED} most similar pairs are compared picture by picture."
    columns = [Column("Video"), Column("Other video"), Column("Similarity", "number"), Column("Verdict", "text", later)]
    rows = [(features.names[a], features.names[b], value, judged.get((a, b), (0, None))[1])
            for a, b, value in pairs]  # fmt: skip
    sure = sum(rank < 2 for rank, _ in judged.values())
    table = Table("Duplicates", columns, rows[:MOST_ROWS])
    return {"count": len(pairs), "sure": sure, "shown": shown, "table": table}


def _judge(first: Video, second: Video) -> tuple[int, str]:
    """Returns how certain it is that two videos are the same, from 0 (certain) to 3, by their bytes or by their frames;
    and a sentence that states this."""
    if same_file(first.path, second.path):
        return 0, "Certain: the files are identical, byte for byte."
    strips = [strip_image(video.path, video.num_frames, 0, video.num_frames) for video in (first, second)]
    if None in strips:
        return 3, "Unknown: the pictures cannot be read."
    agreement = pixel_agreement(strips[0], strips[1], STRIP_FRAMES)
    if agreement >= SAME_PICTURES:
        return 1, f"Almost certain: the frames agree as well (correlation of their pixels {agreement:.2f})."
    if agreement >= ALIKE:
        return (
            2,
            f"Perhaps the same place, or another cut of a recording (correlation of the pixels {agreement:.2f}).",
        )
    return 3, f"Similar to the network only: the frames differ (correlation of their pixels {agreement:.2f})."


def _odd(features: StoredFeatures, found: Neighbours) -> dict[str, Any]:
    ordered = odd_videos(found)
    shown = []
    for video, mean, distance in ordered[:ODD]:
        other, value = int(found.index[video, 0]), found.similarity[video, 0].item()
        number = "more than 50" if distance > 50 else f"{distance:.1f}"
        clear = f"{number} robust standard deviations below the median"
        text = f"Odd: {clear}." if distance >= FAR else f"Not clearly odd, but the next in this order: {clear}."
        shown.append({"query": _clip(features, video, f"mean {mean:.2f}"),
                      "found": [_clip(features, other, f"{value:.2f}")], "text": text})  # fmt: skip
    columns = [Column("Video"), Column("Mean similarity to its nearest", "number"), Column("Deviations", "number")]
    rows = [(features.names[video], mean, distance) for video, mean, distance in ordered]
    clear = sum(distance >= FAR for _, _, distance in ordered)
    return {"count": clear, "shown": shown, "table": Table("Odd videos", columns, rows[:MOST_ROWS])}
