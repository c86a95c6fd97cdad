"""`cpr-fast reproduce`."""

from __future__ import annotations

from pathlib import Path

import tyro

from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show
from cpr_fast.errors import InputError


def reproduce(
    table: tyro.conf.Positional[str | None] = None,
    *,
    index: Path | None = None,
    rows: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (0,),
    scale: float = 1.0,
    settings: Path | None = None,
    hmdb51: Path | None = None,
    k400: Path | None = None,
    out: Path = Path("runs/reproduce"),
    json: Json = False,
) -> None:
    """Train and evaluate the rows of a table of the paper, beside its numbers; without arguments: list the tables.

    A finished row and seed is a card in OUT/cards and is not run again; a stopped one goes on.

    Args:
        table: Its name or number.
        index: The index (CSV) that stands for UCF101: videos with labels, a train and a test split, and flow.
        rows: Which rows; all by default.
        seeds: Of the pretraining and the classifiers; several give a standard error.
        scale: Share of the epochs; the result says it.
        settings: TOML file whose settings replace those of every recipe (data, model, memory, optim, probe, finetune).
        hmdb51: The index that stands for HMDB51; without it what is evaluated there is left out.
        k400: The index that stands for Kinetics-400, likewise.
        out: Folder of runs, cards and tables; tables share the runs that they have in common.
    """
    from cpr_fast.experiments.reproduce import Scale, list_tables, read_settings
    from cpr_fast.experiments.reproduce import reproduce as run

    if table is None:
        print(list_tables())
        return
    if index is None:
        raise InputError("index: expected the index that stands for UCF101, got none")
    smaller = Scale(scale, read_settings(settings) if settings else {})
    result = run(table, index, rows=rows, seeds=seeds, scale=smaller, hmdb51=hmdb51, k400=k400, out=out,
                 progress=True)  # fmt: skip
    if json:
        show(result, json)
    else:
        print(Path(result["markdown"]).read_text(encoding="utf-8"))
