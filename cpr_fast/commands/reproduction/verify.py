"""`cpr-fast verify`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import tyro

from cpr_fast.commands.inputs import require_at_least, require_file, require_runs
from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show_once, table
from cpr_fast.config.recipes import program
from cpr_fast.pretrain.ledger.chain import read_ledger
from cpr_fast.wording import counted, listed

# What the first field that differs means.
NAMES = {
    "step": "number of the step",
    "epoch": "number of the epoch",
    "cycle": "number of the cycle",
    "plan": "sample plan",
    "features": "features",
    "mined": "mined entries",
    "loss": "loss",
    "weights": "weights",
}
MEANINGS = {
    "step": "other steps follow each other: the number of videos per step or per epoch differs",
    "plan": "other videos, frames, crops or colours were drawn: the seed, the videos or a setting of the data differ",
    "features": "the plan is the same, but queries or keys are not: the decoded pixels differ, or the weights before "
    "this step, or the arithmetic of the device or of the library",
    "mined": "plan and features of this step are the same, but other entries were mined: the memory or the mining "
    "differ",
    "loss": "everything before the loss is the same: the memory, the loss or its settings differ",
    "weights": "every step of the epoch is the same up to its loss: the last optimiser step differs",
}


def verify(
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")],
    *,
    start: Annotated[int | None, tyro.conf.arg(name="from", metavar="STEP")] = None,
    steps: int | None = None,
    index: Path | None = None,
    json: Json = False,
) -> None:
    """Replay steps of a run, and compare each with the run's ledger: the sample plan, the features, the mined entries,
    the loss, and at the end of every epoch the weights, also those of the checkpoint.

    The run folder is only read. The exit code is 0 if every step is equal bit for bit, 1 if one differs, and 2 if the
    ledger or another input cannot be used.

    Args:
        run: The folder of a run.
        start: The step to compare first, from 1; the replay starts from the newest checkpoint before it. By default,
            that is the newest checkpoint after which the run has computed a step.
        steps: Number of steps to compare; by default all that the run has computed.
        index: The index of the training videos; by default the one that the run was trained on.
    """
    require_runs("RUN", [run])
    require_at_least("--from", 1, start)
    require_at_least("--steps", 1, steps)
    require_file("--index", index)
    read_ledger(run)  # a missing or damaged ledger is an error before the long import
    from cpr_fast.runtime.progress import announce

    announce("Loading PyTorch and NVIDIA DALI")
    from cpr_fast.experiments.replay import replay

    result = replay(run, first=start, steps=steps, index=index)
    again = shlex.join(["cpr-fast", "verify", str(run), "--from", "1"])
    follow = "cpr-fast doctor" if not result["equal"] else f"cpr-fast report {shlex.quote(str(run))}"
    show_once(
        result, json, lines=_lines(result), next_step=again if result["checkpoint"] and result["equal"] else follow
    )
    if not result["equal"]:
        raise SystemExit(1)


def _lines(result: dict[str, Any]) -> list[str]:
    origin = "the start" if result["checkpoint"] is None else result["checkpoint"]
    steps = f"steps {result['first_step']} to {result['last_step']} of {result['run']}, replayed from {origin}"
    found, other = result["difference"], result["other_weights"]
    lines = [f"{'equal' if result['equal'] else 'different'}: {steps}"]
    if result["equal"]:
        lines.append(
            "compared bit for bit: sample plan, features, mined entries and loss of every step, and the weights at the "
            "end of every epoch"
        )
    if found is not None:
        lines += about_difference(found, found["recorded"], found["replayed"], "recorded", "replayed")
    if other is not None:
        lines.append(
            f"{other['checkpoint']} holds other weights than the run had after step {other['step']}: their digest is "
            f"{other['saved']}, recorded is {other['recorded']}"
        )
    if result["rest"] is not None:
        first, processes = result["rest"]["step"], result["rest"]["processes"]
        lines.append(
            f"not replayed: the steps from {first} on, which {counted(processes, 'process', 'processes')} computed: "
            f"{program(processes)} verify {shlex.quote(result['run'])} --from {first}"
        )
    return [*lines, *about_environment(result["environment"], "recorded", "replayed")]


def about_difference(
    found: dict[str, Any], first: dict[str, Any], second: dict[str, Any], one: str, other: str
) -> list[str]:
    """Returns the lines about the first step that differs: which one, a table of its fields, and what that means.

    Args:
        found: `step`, `epoch`, `cycle` and `fields`.
        first, second: the two rows, which the table calls `one` and `other`.
    """
    fields = found["fields"]
    shown = [name for name in NAMES if name not in ("epoch", "cycle") and (name in first or name in second)]
    body = [
        [NAMES[name], _shown(name, first.get(name)), _shown(name, second.get(name)), "differs" * (name in fields)]
        for name in shown
    ]
    return [
        f"first difference: step {found['step']}, in epoch {found['epoch']} and cycle {found['cycle']}: the "
        f"{NAMES[fields[0]]}",
        "",
        table(["", one, other, ""], body),
        "",
        f"meaning: {MEANINGS.get(fields[0], MEANINGS['step'])}",
    ]


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "none"
    return str(value + 1) if name == "step" else str(value)


def about_environment(differing: dict[str, Any], one: str, other: str) -> list[str]:
    """Returns a line for each part of the environment that differs between `one` and `other`."""
    return [f"{name}: {one} with {_told(was)}, {other} with {_told(now)}" for name, (was, now) in differing.items()]


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return listed([f"{name} {version}" for name, version in value.items()])
    return "an unknown one" if value is None else str(value)
