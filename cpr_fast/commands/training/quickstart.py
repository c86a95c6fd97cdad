"""`cpr-fast quickstart`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpr_fast.commands.evaluation.retrieve import lines_of
from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show, table
from cpr_fast.errors import InputError

PARTS = {
    "synth": "videos",
    "flow": "optical flow",
    "pretrain": "pretraining",
    "retrieve": "retrieval",
    "report": "report",
    "total": "in all",
}


def quickstart(out: Path = Path("runs/quickstart"), *, seed: int = 0, json: Json = False) -> None:
    """Make a small data set, compute its flow, pretrain with InfoNCE and CPR, evaluate, and write a report.

    Args:
        out: The run folder. Parts that were finished earlier are not repeated.
        seed: Seed of the training; the videos are the same for every seed.
    """
    if out.is_file():
        raise InputError(f"--out: expected a folder, but {str(out)!r} is a file")
    from cpr_fast.runtime.progress import announce

    announce("Loading PyTorch and NVIDIA DALI")
    from cpr_fast.experiments.quickstart import quickstart as run

    result = run(out, seed=seed)
    show(result, json, lines=_lines(result), next_step=f"open {result['report']} in a browser")


def _lines(result: dict[str, Any]) -> list[str]:
    """Returns the table of the retrieval, and that of the time of each part."""
    from cpr_fast.runtime.progress import duration

    rows = [
        [name, *(duration(result[f"{part}_{kind}"]) for kind in ("time_s", "cpu_s"))] for part, name in PARTS.items()
    ]
    times = table(["Part", "time", "CPU time"], rows)
    return [*lines_of(result), "", times, "", f"run folder: {result['run']}", f"report: {result['report']}"]
