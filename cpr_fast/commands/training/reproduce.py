"""`cpr-fast reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from cpr_fast.commands.inputs import require_file, require_videos
from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show
from cpr_fast.errors import InputError


def reproduce(
    table: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[TABLE]")] = None,
    *,
    index: Path | None = None,
    rows: Annotated[tuple[str, ...], tyro.conf.arg(help_behavior_hint="(default: all)")] = (),
    seeds: tuple[int, ...] = (0,),
    scale: float = 1.0,
    settings: Path | None = None,
    hmdb51: Path | None = None,
    k400: Path | None = None,
    out: Path = Path("runs/reproduce"),
    json: Json = False,
) -> None:
    """Train and evaluate the rows of a table of the paper; without arguments: list the tables.

    The resulting tables show the published numbers next to the new ones. Each finished row and seed is a file in
    OUT/cards and is not run again; an interrupted one is resumed.

    Args:
        table: Name or number of the table.
        index: The index (CSV) to use as UCF101: videos with labels, a train and a test split, and flow.
        rows: Names of the rows.
        seeds: Seeds of the pretraining and of the classifiers; several give a standard error.
        scale: Fraction of the published epochs to train for; the result states it.
        settings: A TOML file whose settings replace those of every recipe (sections data, model, memory, optim, probe
            and finetune).
        hmdb51: The index to use as HMDB51; without it the evaluations on HMDB51 are left out.
        k400: The index to use as Kinetics-400; without it the rows that need it are left out.
        out: Folder of runs, cards and tables. Tables share the runs that they have in common.
    """
    for option, file in {"--index": index, "--settings": settings, "--hmdb51": hmdb51, "--k400": k400}.items():
        require_file(option, file)
    if table is not None and index is None:
        raise InputError("--index: expected the index to use as UCF101, got none")
    for option, file in {"--index": index, "--hmdb51": hmdb51, "--k400": k400}.items():
        require_videos(option, [file] if file is not None else [])
    from cpr_fast.experiments.reproduce import Scale, list_tables, read_settings
    from cpr_fast.experiments.reproduce import reproduce as run

    if table is None:
        text = list_tables()
        show({"tables": text.splitlines()}, json, lines=[text], next_step="cpr-fast reproduce TABLE --index INDEX.csv")
        return
    smaller = Scale(scale, read_settings(settings) if settings else {})
    result = run(table, index, rows=rows, seeds=seeds, scale=smaller, hmdb51=hmdb51, k400=k400, out=out,
                 progress=True)  # fmt: skip
    text = Path(result["markdown"]).read_text(encoding="utf-8")
    show(result, json, lines=[text.rstrip("\n")], next_step=f"open {result['markdown']}, which holds these tables")
