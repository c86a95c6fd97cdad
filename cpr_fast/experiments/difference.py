"""Where two runs part: the first step of their ledgers, and the first tensor of their checkpoints, that differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from cpr_fast.config import READING
from cpr_fast.errors import InputError
from cpr_fast.pretrain.ledger.chain import read_ledger, require_chain, require_steps, step_files
from cpr_fast.pretrain.ledger.rows import BITS, differing
from cpr_fast.runtime.writers import WRITERS
from cpr_fast.weights.checkpoint import load_checkpoint

COMPARED = ("encoders", "cycle_state", "rng", "step", "epoch", "step_in_epoch", "cycle")  # entries of a checkpoint
# Settings that change no result: where data and results are, how fast clips are read, and what follows the pretraining.
UNUSED = (
    "run.out",
    "run.log_every",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.stall_timeout_s",
    *(f"run.{name}" for name in WRITERS),
    "run.dump_memory",
    "probe.",
    "finetune.",
    "health.",
    *(f"data.{name}" for name in READING),
)


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """Compares two run folders bit for bit: their ledgers, then the checkpoints that both hold of the same step.

    Returns:
        `equal`, whether everything that both hold is equal; `settings`: {name: [first, second]} of those that differ;
        `environment`: the same of the versions, device, commit and number of processes in the newest checkpoints;
        `steps`: the number of steps of each ledger; `difference`, None or `step`, `epoch` and `cycle` from 1, the
        `fields` that differ, and both `rows`; `checkpoints`: the number compared; `tensors`: None, or the first
        checkpoint that differs, see `compare_checkpoints`, and its number of `steps`.
    Raises:
        InputError: a ledger is missing or damaged, or a checkpoint cannot be read.
    """
    files = [dict(step_files(folder)) for folder in (first, second)]  # before the rows: a run may still train
    newest = [load_checkpoint(held[max(held)]) if held else None for held in files]
    ledgers = [_rows(folder, saved) for folder, saved in zip((first, second), newest, strict=True)]
    difference = None
    for key in sorted(ledgers[0].keys() & ledgers[1].keys()):
        rows = [ledger[key] for ledger in ledgers]
        if fields := differing(*rows):
            numbers = {name: rows[0][name] + 1 for name in ("step", "epoch", "cycle")}
            difference = {**numbers, "fields": fields, "rows": rows}
            break
    common = sorted(files[0].keys() & files[1].keys())
    tensors, compared = None, 0
    for step in common:
        compared += 1
        payloads = [saved if saved["step"] == step else load_checkpoint(held[step])
                    for held, saved in zip(files, newest, strict=True)]  # fmt: skip
        if found := compare_checkpoints(*payloads):
            tensors = {"steps": step, **found}
            break
    return {
        "runs": [str(first), str(second)],
        "equal": difference is None and tensors is None,
        "settings": _settings(first, second),
        "environment": _environment(*newest) if all(newest) else {},
        "steps": [max(step for step, _ in ledger) + 1 for ledger in ledgers],
        "difference": difference,
        "checkpoints": compared,
        "tensors": tensors,
    }


def compare_checkpoints(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any] | None:
    """Returns what differs between the encoders and the states of two checkpoints, or None if nothing does.

    Returns:
        `differing` of `values`, numbers of tensors and other values; of the first that differs, in the order of the
        networks, its `name`, the `text` that says how, and `largest`, the largest difference of two finite numbers.
    """
    values = [dict(_leaves({name: payload.get(name) for name in COMPARED})) for payload in (first, second)]
    names = list(dict.fromkeys([*values[0], *values[1]]))
    found = [(name, text) for name in names if (text := _differs(name, *values))]
    if not found:
        return None
    (name, (text, largest)) = found[0]
    return {"differing": len(found), "values": len(names), "name": name, "text": text, "largest": largest}


def _environment(first: dict[str, Any], second: dict[str, Any]) -> dict[str, list[Any]]:
    """Returns {name: [first, second]} of what differs in the origin of two checkpoints."""
    origins = [{**saved["environment"], "processes": saved["processes"]} for saved in (first, second)]
    pairs = {name: [held.get(name) for held in origins] for name in ("versions", "device", "commit", "processes")}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _rows(folder: Path, newest: dict[str, Any] | None) -> dict[tuple[int, bool], dict[str, Any]]:
    """Returns the rows of a ledger by step, and whether they hold the weights after it. `newest` is the newest
    checkpoint of a step, which they must fit."""
    rows = read_ledger(folder)
    require_steps(rows, rows[0]["step"] if rows else 0, folder, written=newest["step"] if newest else 0)
    if newest:
        require_chain(rows, newest["step"], newest.get("ledger"), folder)
    return {(row["step"], "weights" in row): row for row in rows}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the name and the value of everything that is no dict or list, such as encoders.rgb.head.0.weight."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield name, value
        return
    for key, item in items:
        yield from _leaves(item, f"{name}.{key}" if name else str(key))


def _differs(name: str, first: dict[str, Any], second: dict[str, Any]) -> tuple[str, float | None] | None:
    """Returns how a value differs between two checkpoints, and the largest difference of its numbers if it is a tensor
    of them; None if it does not differ."""
    if (name in first) != (name in second):
        return f"only the {'first' if name in first else 'second'} run has it", None
    a, b = first[name], second[name]
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None if type(a) is type(b) and a == b else (f"{a!r} and {b!r}", None)
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"{list(a.shape)} {_kind(a)} and {list(b.shape)} {_kind(b)}", None
    bits = BITS[a.element_size()]
    unequal = a.view(bits) != b.view(bits)
    count = int(unequal.sum())
    if not count:
        return None
    gaps = (a[unequal].double() - b[unequal].double()).abs()
    finite = gaps[gaps.isfinite()]
    largest = finite.max().item() if len(finite) else None
    text = f"{count:,} of {a.numel():,} values differ"
    text += ", in NaN or infinities" if largest is None else f", by at most {largest:.3g}"
    return f"{list(a.shape)} {_kind(a)}: {text}", largest


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _settings(first: Path, second: Path) -> dict[str, list[Any]]:
    """Returns {name: [first, second]} of the settings that differ, without those of `UNUSED`."""
    values = []
    for folder in (first, second):
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            values.append({f"{part}.{key}": value for part, held in config.items() for key, value in held.items()})
        except (OSError, ValueError, AttributeError):  # no file, no JSON, no object of objects
            raise InputError(
                f"run folder {str(folder)!r}: expected the file config.json with the settings of the run, as "
                "`cpr-fast pretrain` writes it"
            ) from None
    names = [name for held in values for name in held if not name.startswith(UNUSED)]
    pairs = {name: [held.get(name) for held in values] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
