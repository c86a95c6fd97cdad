"""`cpr-fast doctor`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from cpr_fast.commands.inputs import require_at_least, require_device, require_file, require_store
from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show
from cpr_fast.data.features.names import is_store
from cpr_fast.errors import InputError

if TYPE_CHECKING:
    from cpr_fast.doctor.findings import Finding

BROKEN = ("fails", "settings")  # effects of findings with which a command fails


def doctor(
    index: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[INDEX]")] = None,
    *,
    features: Path | None = None,
    config: Path | None = None,
    device: str = "auto",
    seconds: float = 60.0,
    tables: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
    json: Json = False,
) -> None:
    """Check the installation and a data set, list what to change first, and estimate the cost of the next steps.

    The exit code is 1 if a command fails on what was found.

    Args:
        index: An index (CSV) whose data are checked, and for which the time of a training step is measured; or a store
            of features.
        features: A store of features, of which every feature is read, and which is compared with the index.
        config: The recipe (TOML) that the data are judged with; by default the one that names this index, beside the
            index or in the working directory, or what `init` would write if there is no such recipe or several.
        device: "auto", "cpu", "cuda" or "cuda:N".
        seconds: Time for measuring a training step, in seconds; 0 skips the measurement.
        tables: Print tables of everything that was measured before the findings.
    """
    index, features = _index_and_store(index, features)
    require_file("--config", config)
    require_at_least("--seconds", 0, seconds)
    require_device("--device", device, "auto")
    from cpr_fast.config import load
    from cpr_fast.runtime.progress import announce

    if config is not None:
        load(config)  # an unreadable recipe is an error before the long import
    announce("Loading PyTorch")

    from cpr_fast.doctor.checks import doctor as run
    from cpr_fast.doctor.findings import show as show_findings
    from cpr_fast.doctor.recipe import choose_recipe
    from cpr_fast.runtime.distributed import device_of

    where = device_of(device, "--device")
    found: list[Finding] = []
    recipe = choose_recipe(index, config, found, gpu=where.type == "cuda")
    result = run(
        index, recipe.config, device=where, seconds=seconds, store=features, judged=recipe.said, findings=found
    )
    broken = any(finding["level"] == "error" or finding["effect"] in BROKEN for finding in result["findings"])
    if not json:
        show_findings(result, tables=tables)
    of_store = f"cpr-fast pretrain RECIPE --data.features {shlex.quote(str(features))}"
    next_step = of_store if index is None and features is not None else recipe.next_step
    again = "correct the problem of number 1, then run this command again"
    show(result, json, lines=[], next_step=again if broken else next_step)
    if broken:
        raise SystemExit(1)


def _index_and_store(index: Path | None, features: Path | None) -> tuple[Path | None, Path | None]:
    """Returns the index and the store of features that are to be checked. Raises InputError for other files."""
    if index is not None and is_store(index):
        if features is not None:
            raise InputError(
                f"INDEX: expected the index that --features is compared with, got the store {str(index)!r}"
            )
        return None, index
    require_file("INDEX", index)
    if features is not None:
        require_store("--features", features)
    return index, features
