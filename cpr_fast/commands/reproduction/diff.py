"""`cpr-fast diff`."""

from __future__ import annotations

import json as json_module
import shlex
from pathlib import Path
from typing import Annotated, Any

import tyro

from cpr_fast.commands.inputs import require_runs
from cpr_fast.commands.options import Json, required
from cpr_fast.commands.output import show
from cpr_fast.commands.reproduction.verify import about_difference, about_environment
from cpr_fast.errors import InputError
from cpr_fast.pretrain.ledger.chain import read_ledger
from cpr_fast.wording import counted

NAMED = 8  # settings that are printed


def diff(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, required("RUNS")],
    *,
    json: Json = False,
) -> None:
    """Say where two runs part: the first step of their ledgers that differs and in what, and the first tensor that
    differs between their checkpoints of the same step.

    The exit code is 0 if everything that both runs hold is equal bit for bit, 1 if something differs, and 2 if a ledger
    or another input cannot be used.

    Args:
        runs: Two run folders.
    """
    require_runs("RUNS", runs)
    if len(runs) != 2:
        raise InputError(f"RUNS: expected two run folders, got {len(runs)}")
    for run in runs:
        read_ledger(run)  # a missing or damaged ledger is an error before the long import
    from cpr_fast.runtime.progress import announce

    announce("Loading PyTorch")
    from cpr_fast.experiments.difference import compare_runs

    result = compare_runs(*runs)
    found = result["difference"]
    again = ["cpr-fast", "verify", str(runs[0])] + (["--from", str(found["step"])] if found else [])
    show(result, json, lines=[] if json else _lines(result), next_step=shlex.join(again))
    if not result["equal"]:
        raise SystemExit(1)


def _lines(result: dict[str, Any]) -> list[str]:
    first, second = result["runs"]
    steps, found, tensors = result["steps"], result["difference"], result["tensors"]
    lines = [f"{'equal' if result['equal'] else 'different'}: {first} and {second}", *_settings(result["settings"])]
    lines += about_environment(result["environment"], "first run", "second run")
    if found is None:
        lines.append(f"ledgers: equal in all {counted(min(steps), 'step')} that both runs have")
    else:
        lines += about_difference(found, *found["rows"], "first run", "second run")
    if steps[0] != steps[1]:
        lines.append(f"the first run has {counted(steps[0], 'step')}, the second one {counted(steps[1], 'step')}")
    if tensors is not None:
        place = f"after step {tensors['steps']}, {tensors['differing']:,} of {tensors['values']:,} tensors and numbers"
        lines.append(f"checkpoints: {place} differ; the first is {tensors['name']}: {tensors['text']}")
    elif result["checkpoints"]:
        lines.append(f"checkpoints: equal, {counted(result['checkpoints'], 'pair')} of the same step")
    else:
        lines.append("checkpoints: none of the same step in both runs")
    return lines


def _settings(differing: dict[str, Any]) -> list[str]:
    lines = [
        f"setting {name}: {json_module.dumps(first)} and {json_module.dumps(second)}"
        for name, (first, second) in differing.items()
    ]
    return lines[:NAMED] + ([f"and {len(lines) - NAMED} more settings"] if len(lines) > NAMED else [])
