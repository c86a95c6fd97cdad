"""`cpr-fast search`."""

from __future__ import annotations

from pathlib import Path

import tyro

from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show
from cpr_fast.evaluate.features.recipe import RecipeName


def search(
    queries: tyro.conf.Positional[tuple[Path, ...]],
    *,
    index: Path,
    checkpoint: tuple[str, ...],
    top: int = 10,
    out: Path | None = None,
    recipe: RecipeName = "paper",
    clips: int | None = None,
    cache: bool = True,
    json: Json = False,
) -> None:
    """Search your own videos: what an index holds that is most like each query, as a list and a contact sheet.

    Args:
        queries: Video files; they need no class and no place in an index.
        index: The index (CSV) to search.
        checkpoint: Of `pretrain` or `import-checkpoint`: FILE, or one per view, VIEW=FILE.
        top: How many videos to list.
        out: Folder of the contact sheets, QUERY.jpg; by default the folder search of the checkpoint's run.
        recipe: As of `retrieve`, whose stored features are found again.
        clips: Uniform windows per video; by default those of the recipe.
        cache: Keep the index's features beside the checkpoint and reuse them.
    """
    from cpr_fast.evaluate.features.results import checkpoint_files, home
    from cpr_fast.evaluate.retrieval.search import search as run
    from cpr_fast.report.figures.contact_sheet import write_contact_sheet

    folder = out or home(checkpoint_files(checkpoint)[0][1]) / "search"
    result = run(
        queries, index, checkpoint, top=top, recipe=recipe, clips_per_video=clips, cache=cache, progress=True,
        draw=lambda name, query, found: write_contact_sheet(folder / f"{name}.jpg", query, found),
    )  # fmt: skip
    if json:
        show(result, json)
        return
    from rich.console import Console
    from rich.table import Table

    for query in result["queries"]:
        table = Table("", "similarity", "label", "path", title=f"{query['path']} → {query['picture']}")
        for row in query["results"]:
            table.add_row(str(row["rank"]), f"{row['similarity']:.3f}", row["label"], row["path"])
        Console().print(table)
