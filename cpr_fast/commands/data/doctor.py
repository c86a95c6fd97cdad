"""`cpr-fast doctor`."""

from __future__ import annotations

from pathlib import Path

import tyro

from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show


def doctor(
    index: tyro.conf.Positional[Path | None] = None,
    *,
    config: Path | None = None,
    device: str = "auto",
    seconds: float = 60.0,
    json: Json = False,
) -> None:
    """What works on this machine, what is wrong with the data, and where the time of a training step goes.

    Exit code 1 where something is broken.

    Args:
        index: An index (CSV), whose data is then looked at and a step's time broken down.
        config: The TOML file whose settings the breakdown takes.
        device: "auto", "cpu" or "cuda".
        seconds: How long the breakdown may take; 0 leaves it out.
    """
    import torch

    from cpr_fast.config import Config, load
    from cpr_fast.doctor.checks import doctor as run

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = Config() if config is None else load(config)
    result = run(index, settings, device=torch.device(device), seconds=seconds)
    if json:
        show(result, json)
    else:
        from cpr_fast.doctor.checks import show as show_findings

        show_findings(result)
    if any(finding["level"] == "error" for finding in result["findings"]):
        raise SystemExit(1)
