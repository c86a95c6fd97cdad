"""`cpr-fast report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from cpr_fast.commands.inputs import require_file, require_runs, require_suffix
from cpr_fast.commands.options import Flag, Json, required
from cpr_fast.commands.output import about_unfinished, show
from cpr_fast.config.recipes import retrieve_command
from cpr_fast.errors import InputError

if TYPE_CHECKING:
    from cpr_fast.report.run_folder.run import Run


def report(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, required("RUNS")],
    *,
    out: Path | None = None,
    unlabelled: Flag = False,
    index: Path | None = None,
    json: Json = False,
) -> None:
    """Write a self-contained HTML page of one or more run folders.

    Where the videos of the first run have no labels, a second page shows the videos that are similar, duplicated or
    odd, according to the features that `cpr-fast retrieve` stored.

    Args:
        runs: The run folders.
        out: The page to write; report.html in the first run folder by default.
        unlabelled: Write the second page of labelled videos, too.
        index: The index (CSV) of the second page; the one that the first run was evaluated on by default.
    """
    if not runs:
        raise InputError("RUNS: expected at least one run folder, got none")
    require_runs("RUNS", runs)
    require_file("--index", index)
    if out is not None:
        require_suffix("--out", out, ".html")
    if out is not None and out.is_file() and out.suffix.lower() not in (".html", ".htm"):
        raise InputError(
            f"--out: expected the name of an HTML page, got {str(out)!r}, which exists and is another file"
        )
    from cpr_fast.runtime.progress import announce

    announce("Reading " + ", ".join(map(str, runs)))
    from cpr_fast.report.page import write_report
    from cpr_fast.report.run_folder.run import Run
    from cpr_fast.report.similar import similar_path, write_similar
    from cpr_fast.report.unlabelled import compare_videos, index_of

    out = out or runs[0] / "report.html"
    wanted = unlabelled or index is not None
    compared = similar = None
    loaded = [Run(folder) for folder in runs]
    first = loaded[0]
    if wanted or first.unlabelled:
        announce("Comparing the videos by their stored features")
        compared = compare_videos(first, index)
    if compared is not None:
        announce("Drawing the page of similar, duplicated and odd videos")
        similar = write_similar(runs[0], similar_path(out), compared)
    if wanted and similar is None:
        command = retrieve_command(runs[0], index or index_of(first))
        raise InputError(f"{runs[0]}: no features of these videos are stored; first run: {command}")
    announce("Drawing the report")
    page = write_report(runs, out, similar=similar, compared=compared if index is None else None)
    result = {"report": str(page)} | ({} if similar is None else {"similar": str(similar)})
    notes = [] if json else [*about_unfinished(runs), *_not_evaluated(loaded)]
    lines = [*(f"{name}: {file}" for name, file in result.items()), *notes]
    show(result, json, lines=lines, next_step=f"open {page} in a browser")


def _not_evaluated(runs: Sequence[Run]) -> list[str]:
    """Returns a note for each finished run that has no evaluation by `cpr-fast retrieve`."""
    from cpr_fast.report.run_folder.unfinished import unfinished

    found = [run for run in runs if not run.retrieval and not unfinished(run)]
    said = "no evaluation of this run has finished. To make it"
    return [line for run in found for line in ("", f"note: {run.folder}: {said}: {run.evaluation_command}")]
