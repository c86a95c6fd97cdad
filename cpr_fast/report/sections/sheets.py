"""Contact sheets of a run: queries with what was mined for them, and test videos with their neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpr_fast.data.index.index import Video
from cpr_fast.report.figures.film_strip import film_strip
from cpr_fast.report.sections.runs import VIEW_NAMES, VIEWS, Run

SHEET_QUERIES = 6  # rows of a contact sheet


def mined_sheets(run: Run) -> list[dict[str, Any]]:
    """Per view, queries of the last mining epoch with what was mined for them [paper, Fig. 2]."""
    sheets = []
    for view in VIEWS:
        rows = [row for row in run.mined if row["view"] == view]
        last = [row for row in rows if row["epoch"] == rows[-1]["epoch"]][:SHEET_QUERIES]
        if last and run.index is not None:
            known = [r for r in last if all(0 <= c["video"] < len(run.index) for c in (r["query"], *r["mined"]))]
            queries = [
                {
                    "query": _clip(run, run.index[row["query"]["video"]], row["query"]["start"]),
                    "found": [_clip(run, run.index[c["video"]], c["start"], c["correct"]) for c in row["mined"]],
                }
                for row in known
            ]
            sheets.append({"title": f"{VIEW_NAMES[view]} queries, epoch {last[0]['epoch']}", "queries": queries})
    return sheets


def retrieved_sheet(run: Run) -> dict[str, Any] | None:
    """Test queries with their nearest training videos."""
    if not run.retrieved:
        return None
    queries = [
        {
            "query": _whole_video(row["query"]),
            "found": [_whole_video(video, video["label"] == row["query"]["label"]) for video in row["nearest"]],
        }
        for row in run.retrieved[:SHEET_QUERIES]
    ]
    return {"title": f"Nearest neighbours, {VIEW_NAMES[run.retrieved[0]['view']]}", "queries": queries}


def _clip(run: Run, video: Video, start: int, correct: bool | None = None) -> dict[str, Any]:
    data = run.config["data"]
    strip = film_strip(video.path, video.num_frames, start, data["frames"] * data["stride"])
    return {"label": video.label, "source": video.source, "strip": strip, "correct": correct}


def _whole_video(video: dict[str, Any], correct: bool | None = None) -> dict[str, Any]:
    strip = film_strip(Path(video["path"]), video["num_frames"], 0, video["num_frames"])
    return {"label": video["label"], "source": video["source"], "strip": strip, "correct": correct}
