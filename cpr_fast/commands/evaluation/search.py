"""`cpr-fast search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from cpr_fast.commands.inputs import require_at_least, require_checkpoints, require_file, require_files, require_videos
from cpr_fast.commands.options import Json, PicturesFps, RecipeName, required
from cpr_fast.commands.output import show, table
from cpr_fast.errors import InputError


def search(
    queries: Annotated[tuple[Path, ...], tyro.conf.Positional, required("QUERIES")],
    *,
    index: Path,
    checkpoint: tuple[str, ...],
    top: int = 10,
    out: Path | None = None,
    recipe: RecipeName | None = None,
    clips: int | None = None,
    pictures_fps: PicturesFps = None,
    cache: bool = True,
    json: Json = False,
) -> None:
    """Find the videos of an index that are most similar to your own, as a list and as a contact sheet.

    Args:
        queries: Video files. They need no label and need not be in an index.
        index: The index (CSV) to search.
        checkpoint: A checkpoint of `pretrain` or `import-checkpoint`: FILE, or one for each view: rgb=FILE flow=FILE.
        top: Number of videos to list.
        out: Folder of the contact sheets, QUERY.jpg; by default the folder `search` of the checkpoint's run.
        recipe: The recipe of `retrieve`, whose stored features are reused.
        clips: Number of windows per video, evenly spaced; by default the recipe's.
        cache: Store the index's features beside the checkpoint and reuse them.
    """
    if not queries:
        raise InputError("QUERIES: expected at least one video file, got none")
    require_files("QUERIES", queries)
    require_file("--index", index)
    require_checkpoints("--checkpoint", checkpoint)
    require_at_least("--top", 1, top)
    require_at_least("--clips", 1, clips)
    require_videos("--index", [index])
    from cpr_fast.runtime.progress import announce

    announce("Loading PyTorch and NVIDIA DALI")
    from cpr_fast.evaluate.features.results import checkpoint_files, home
    from cpr_fast.evaluate.retrieval.search import search as run
    from cpr_fast.report.figures.contact_sheet import write_contact_sheet
    from cpr_fast.runtime.files import require_writable

    folder = out or home(checkpoint_files(checkpoint)[0][1]) / "search"
    require_writable("--out", folder, "The contact sheets are stored there; choose another folder")
    result = run(
        queries, index, checkpoint, top=top, recipe=recipe, clips_per_video=clips, pictures_fps=pictures_fps,
        cache=cache, progress=True,
        draw=lambda name, query, found: write_contact_sheet(folder / f"{name}.jpg", query, found),
    )  # fmt: skip
    lines = []
    for query in result["queries"]:
        rows = [[r["path"], f"{r['similarity']:.3f}", r["label"] or "-", r["rank"]] for r in query["results"]]
        lines += [table(["path", "similarity", "label", "rank"], rows, title=f"similar to {query['path']}:")]
        lines += [f"contact sheet: {query['picture']}", ""]
    show(result, json, lines=lines[:-1], next_step=f"open {result['queries'][0]['picture']}")
