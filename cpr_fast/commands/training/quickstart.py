"""`cpr-fast quickstart`."""

from __future__ import annotations

from pathlib import Path

from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show


def quickstart(out: Path = Path("runs/quickstart"), *, seed: int = 0, json: Json = False) -> None:
    """The main job on the embedded default: videos, flow, InfoNCE start, CPR, retrieval, report.

    Args:
        out: Folder of the run; a finished part found there is not done again.
        seed: Seed of the training; the videos are the same for every seed.
    """
    from cpr_fast.experiments.quickstart import quickstart as run

    show(run(out, seed=seed), json)
