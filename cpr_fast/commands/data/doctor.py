"""`cpr-fast doctor`."""

from __future__ import annotations

from pathlib import Path

import tyro

from cpr_fast.commands.inputs import require_at_least, require_file
from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show
from cpr_fast.errors import InputError


def doctor(
    index: tyro.conf.Positional[Path | None] = None,
    *,
    config: Path | None = None,
    device: str = "auto",
    seconds: float = 60.0,
    json: Json = False,
) -> None:
    """Check the installation and a data set, list what to change first, and estimate the cost of the next steps.

    The exit code is 1 if anything is broken.

    Args:
        index: An index (CSV) whose data are checked, and for which the time of a training step is measured.
        config: The TOML file with the settings of that training step.
        device: "auto", "cpu", "cuda" or "cuda:N".
        seconds: Time for measuring a training step, in seconds; 0 skips the measurement.
    """
    require_file("INDEX", index)
    require_file("--config", config)
    require_at_least("--seconds", 0, seconds)
    import torch

    from cpr_fast.config import Config, load
    from cpr_fast.doctor.checks import doctor as run
    from cpr_fast.doctor.findings import show as show_findings
    from cpr_fast.doctor.machine import no_device

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError:
        where = None
    if where is None or where.type not in ("cpu", "cuda"):
        raise InputError(f"--device: expected 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    if reason := no_device(where):
        raise InputError(f"--device: {reason}")
    result = run(index, Config() if config is None else load(config), device=where, seconds=seconds)
    if json:
        show(result, json)
    else:
        show_findings(result)
    if any(finding["level"] == "error" for finding in result["findings"]):
        raise SystemExit(1)
