"""`cpr-fast quickstart`."""

from __future__ import annotations

from pathlib import Path

from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show
from cpr_fast.errors import InputError


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
    show(result, json, next_step=f"open {result['report']} in a browser")
