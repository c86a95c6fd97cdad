"""Writes the page for videos without labels: the videos that are similar, duplicated or odd according to the run's
network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cpr_fast.config.recipes import retrieve_command
from cpr_fast.data.index.index import Video
from cpr_fast.data.index.summary import COPIES
from cpr_fast.evaluate.retrieval.names import VIEW_NAMES, without_copies
from cpr_fast.report.figures.bars import histogram_figure
from cpr_fast.report.figures.film_strip import strip_uri, whole_strip
from cpr_fast.report.figures.table import Column, Table
from cpr_fast.report.neighbours import (
    DUPLICATE,
    FAR,
    duplicate_pairs,
    frames_agreement,
    odd_videos,
)
from cpr_fast.report.page import render, write_page
from cpr_fast.report.run_folder.outcome import verdict
from cpr_fast.report.run_folder.run import Run
from cpr_fast.report.run_folder.unfinished import unfinished
from cpr_fast.report.sections.header import facts
from cpr_fast.report.sections.sheets import clip
from cpr_fast.report.unlabelled import Compared, same_video
from cpr_fast.wording import listed, ordinal

QUERIES, PAIRS, ODD = 8, 12, 6  # numbers of queries, pairs and odd videos that are shown as film strips
JUDGED = 48  # number of pairs, the most similar ones, whose frames are compared
LATER = f"Only the frames of the {JUDGED} most similar pairs are compared."
MOST_ROWS = 2000  # limit of the rows of a table
# Least correlation of the frames of copies, and of videos that may show the same place.
SAME_PICTURES, ALIKE = 0.95, 0.85
LEVELS = {
    "high": "High: the checks below are well above chance.",
    "moderate": "Moderate: the checks below are above chance, but not for all videos. Look at the videos themselves "
    "before you act on it.",
    "low": "Low: the checks below are near chance or no better than with an untrained network, or the videos "
    "hardly differ for the network. Rely on nothing on this page but exact copies.",
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
    found = compared.found
    _, same = same_video(loaded)
    closest = found.similarity[:, 0]
    closest = closest[~closest.isinf()]
    page = render(
        "similar.html.j2",
        run=loaded,
        facts=facts(loaded)[:2] + _facts(loaded, compared),
        verdict=[*filter(None, [unfinished(loaded)]), *verdict(loaded)],
        level=LEVELS[compared.level],
        reasons=[*([same] if same and loaded.unlabelled else []), *compared.reasons],
        similar=_similar(compared),
        spread=histogram_figure(closest.tolist(), x="similarity", title="Similarity to the nearest video"),
        nearest=_table(compared),
        duplicates=_duplicates(compared),
        threshold=DUPLICATE,
        agreement=SAME_PICTURES,
        advice=COPIES,
        odd=_odd(compared),
        far=FAR,
    )
    return write_page(page, Path(out))


def _facts(run: Run, compared: Compared) -> list[tuple[str, str]]:
    features, step = compared.features, compared.step
    views = " and ".join(VIEW_NAMES[view] for view in features.streams)
    count = f"{len(features.videos):,}" + (f" of {compared.total:,}" if len(features.videos) < compared.total else "")
    why = [without_copies(compared.total - compared.distinct).removesuffix(".")]
    if step > 1:
        why.append(f"every {ordinal(step)} video")
    elif len(features.videos) < compared.distinct:
        why.append("those whose features are stored" + _others(run, compared))
    trained = run.config.get("data", {}).get("index") or "not recorded"
    return [
        ("Index of these videos", str(compared.index)),
        ("Training index", "the same" if Path(trained) == compared.index else str(trained)),
        ("Videos compared", "; ".join(filter(None, [count, *why]))),
        ("Sources", f"{len({video.source for video in features.videos}):,}"),
        (
            "Similarity",
            f"cosine of the trained network's features ({views}, test-time recipe {features.recipe}), from -1 to 1",
        ),
    ]


def _others(run: Run, compared: Compared) -> str:
    """Returns how to get the features of the other videos; "" after an evaluation, which found that it cannot use
    them."""
    if str(compared.index) in run.evaluated_indexes:
        return ""
    return f"; to add the others: `{retrieve_command(run.folder, compared.index)}`, then `cpr-fast report` again"


def _clip(compared: Compared, video: int | Video, note: str = "") -> dict[str, Any]:
    """Returns the parts that the page shows of a video, or of the video at this position among those compared."""
    video = compared.features.videos[video] if isinstance(video, int) else video
    shown = clip(video.path, "", video.source, strip_uri(whole_strip(video.path, video.num_frames)))
    label = f"class {video.label}" if video.label else ""
    return shown | {"caption": compared.names[video], "note": " · ".join(filter(None, (note, label)))}


def _similar(compared: Compared) -> list[dict[str, Any]]:
    """Returns videos spread evenly over the index, each with its nearest videos of other sources."""
    count, found = len(compared.features.videos), compared.found
    chosen = np.unique(np.linspace(0, count - 1, min(QUERIES, count)).round().astype(int)).tolist()
    return [
        {
            "query": _clip(compared, video),
            "found": [
                _clip(compared, other, f"similarity {value:.2f}")
                for other, value in zip(found.index[video].tolist(), found.similarity[video].tolist(), strict=True)
                if np.isfinite(value)
            ],
        }
        for video in chosen
    ]


def _names(compared: Compared) -> list[str]:
    return [compared.names[video] for video in compared.features.videos]


def _table(compared: Compared) -> Table:
    columns = [Column("Video"), Column("Nearest video of another source"), Column("Similarity", "number")]
    names, found = _names(compared), compared.found
    rows = [
        (name, names[other], value)
        for name, other, value in zip(names, found.index[:, 0].tolist(), found.similarity[:, 0].tolist(), strict=True)
        if np.isfinite(value)
    ]
    return Table("Nearest video of every video", columns, rows[:MOST_ROWS])


def _duplicates(compared: Compared) -> dict[str, Any]:
    """Returns what the page shows of exact copies, of near-copies, and of other pairs above the threshold: "exact",
    "near" and "rest", each with "count", "shown" and "table"."""
    names = compared.names
    exact = [
        {"query": _clip(compared, first), "found": [_clip(compared, copy)], "text": _of_copies(first, copy)}
        for first, copy in compared.copies[:PAIRS]
    ]
    rows = [(names[first], names[copy]) for first, copy in compared.copies]
    table = Table("Exact copies", [Column("Video"), Column("Its copy")], rows[:MOST_ROWS])
    videos, pairs = compared.features.videos, duplicate_pairs(compared.found)
    judged = [(*pair, *_judge(videos[pair[0]], videos[pair[1]])) for pair in pairs[:JUDGED]]
    judged += [(*pair, None, None) for pair in pairs[JUDGED:]]
    near = [pair for pair in judged if pair[3] is not None and pair[3] >= SAME_PICTURES]
    return {
        "exact": {"count": len(rows), "shown": exact, "table": table},
        "near": _pairs(compared, near, "Near-copies"),
        "rest": _pairs(compared, [pair for pair in judged if pair not in near], "Other similar pairs"),
    }


def _of_copies(first: Video, copy: Video) -> str:
    differs = [name for name in ("label", "split") if getattr(first, name) != getattr(copy, name)]
    but = f", but their {listed(differs)} {'differ' if len(differs) > 1 else 'differs'}" if differs else ""
    return f"The files are identical, byte for byte{but}."


def _pairs(compared: Compared, pairs: list[tuple], title: str) -> dict[str, Any]:
    """Returns what the page shows of pairs (video, video, similarity, agreement of the frames, what it means)."""
    shown = [
        {"query": _clip(compared, a), "found": [_clip(compared, b, f"similarity {value:.3f}")], "text": text or LATER}
        for a, b, value, _, text in pairs[:PAIRS]
    ]
    columns = [Column("Video"), Column("Other video"), Column("Similarity", "number"),
               Column("Agreement of the frames", "number", LATER, "mean correlation of their pixels")]  # fmt: skip
    names = _names(compared)
    rows = [(names[a], names[b], value, agreement) for a, b, value, agreement, _ in pairs]
    return {"count": len(pairs), "shown": shown, "table": Table(title, columns, rows[:MOST_ROWS])}


def _judge(first: Video, second: Video) -> tuple[float | None, str]:
    """Returns how well the frames of two videos agree (mean correlation of their pixels, None if they cannot be read),
    and a sentence about it."""
    agreement = frames_agreement(first, second)
    if agreement is None:
        return None, "The pictures cannot be read."
    if agreement >= SAME_PICTURES:
        meaning = "Almost certainly a copy: the frames agree"
    elif agreement >= ALIKE:
        meaning = "Perhaps the same place, or another cut of a recording"
    else:
        meaning = "Similar to the network only: the frames differ"
    return agreement, f"{meaning} (correlation of their pixels {agreement:.2f})."


def _odd(compared: Compared) -> dict[str, Any]:
    found, names = compared.found, _names(compared)
    ordered = odd_videos(found)
    shown = []
    for video, mean, distance in ordered[:ODD]:
        other, value = int(found.index[video, 0]), found.similarity[video, 0].item()
        number = "more than 50" if distance > 50 else f"{distance:.1f}"
        clear = f"{number} robust standard deviations below the median"
        text = f"Odd: {clear}." if distance >= FAR else f"Not clearly odd, but the next in this order: {clear}."
        shown.append({"query": _clip(compared, video, f"mean similarity {mean:.2f}"),
                      "found": [_clip(compared, other, f"similarity {value:.2f}")], "text": text})  # fmt: skip
    columns = [Column("Video"), Column("Mean similarity to its nearest", "number"), Column("Deviations", "number")]
    rows = [(names[video], mean, distance) for video, mean, distance in ordered]
    clear = sum(distance >= FAR for _, _, distance in ordered)
    return {"count": clear, "shown": shown, "table": Table("Odd videos", columns, rows[:MOST_ROWS])}
