"""Sheets of clips as film strips: queries with the clips that were mined for them, and test videos with their
neighbours."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from cpr_fast.data.index.index import Video
from cpr_fast.data.storage.times import native_rate, shown_frames
from cpr_fast.evaluate.retrieval.names import VIEW_NAMES
from cpr_fast.report.figures.film_strip import STRIP_FRAMES, film_strip
from cpr_fast.report.run_folder.run import VIEWS, Run

SHEET_QUERIES = 6  # rows of a contact sheet


def mined_sheets(run: Run) -> list[dict[str, Any]]:
    """Returns, per view, queries of the last mining epoch with the clips that were mined for them [paper, Fig. 2]."""
    sheets = []
    for view in VIEWS:
        rows = [row for row in run.mined if row["view"] == view]
        last = [row for row in rows if row["epoch"] == rows[-1]["epoch"]][:SHEET_QUERIES]
        if last and run.index is not None:
            known = [r for r in last if all(0 <= c["video"] < len(run.index) for c in (r["query"], *r["mined"]))]
            queries = [
                {
                    "query": _clip(run, run.index[row["query"]["video"]], row["query"]["start"]),
                    "found": [
                        _clip(run, run.index[c["video"]], c["start"], _judged(run, row, c)) for c in row["mined"]
                    ],
                }
                for row in known
            ]
            sheets.append({"title": f"{VIEW_NAMES[view]} queries, epoch {last[0]['epoch'] + 1}", "queries": queries})
    return sheets


def retrieved_sheet(run: Run) -> dict[str, Any] | None:
    """Returns queries of the retrieval with their nearest videos of the gallery."""
    if not run.retrieved:
        return None
    queries = [
        {
            "query": _whole_video(row["query"]),
            "found": [_whole_video(video, _same(video, row["query"])) for video in row["nearest"]],
        }
        for row in run.retrieved[:SHEET_QUERIES]
    ]
    title = f"Nearest neighbours, {VIEW_NAMES[run.retrieved[0]['view']]}"
    if run.evaluated_indexes:  # the neighbours of the first of several are stored
        title += f", videos of {run.evaluated_indexes[0]}"
    if any(row.get("copies") or row.get("queries_with_copy") for row in (*run.same_video[:1], *run.retrieval[:1])):
        title += "; exact copies of other videos are among them"
    return {"title": title, "queries": queries}


def _judged(run: Run, row: dict[str, Any], mined: dict[str, Any]) -> bool | None:
    """Returns whether a mined clip has the query's class; None if either has no label."""
    pair = (run.index[row["query"]["video"]], run.index[mined["video"]])
    return mined["correct"] if all(video.label for video in pair) else None


def _same(video: dict[str, Any], query: dict[str, Any]) -> bool | None:
    return video["label"] == query["label"] if video["label"] and query["label"] else None


def _clip(run: Run, video: Video, start: int, correct: bool | None = None) -> dict[str, Any]:
    data = run.config["data"]
    shown = None
    if fps := data.get("fps"):  # runs of earlier versions have no such setting
        rate = native_rate(video.path, video.fps, data["pictures_fps"])
        shown = partial(shown_frames, video.path, num_frames=video.num_frames, rate=rate, fps=fps)
    strip = film_strip(video.path, video.num_frames, start, data["frames"] * data["stride"], shown)
    return clip(video.path, video.label, video.source, strip, correct)


def _whole_video(video: dict[str, Any], correct: bool | None = None) -> dict[str, Any]:
    strip = film_strip(Path(video["path"]), video["num_frames"], 0, video["num_frames"])
    return clip(Path(video["path"]), video["label"], video["source"], strip, correct)


def clip(path: Path, label: str, source: str, strip: str | None, correct: bool | None = None) -> dict[str, Any]:
    """Returns the parts that the page shows of a clip: its caption, its text for screen readers, its film strip, and
    whether it is of the query's class."""
    caption = label or path.name
    alt = f"{STRIP_FRAMES} frames of {path.name}" + (f", class {label}" if label else "")
    return {"caption": caption, "alt": alt, "source": source, "path": str(path), "strip": strip, "correct": correct}
