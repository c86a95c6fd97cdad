"""The run folder: it has one writer at a time and is never overwritten; selects the checkpoint to continue from."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from cpr_fast.config import READING, Config
from cpr_fast.config.recipes import resume_command
from cpr_fast.config.sections import with_cycle
from cpr_fast.errors import InputError
from cpr_fast.pretrain.ledger import chain
from cpr_fast.pretrain.run.videos import check_same_videos
from cpr_fast.runtime import distributed
from cpr_fast.runtime.distributed import World
from cpr_fast.runtime.files import (
    OTHER_FOLDER,
    one_writer,
    replacing,
    require_new_run,
    require_run_folder,
    run_checkpoints,
)
from cpr_fast.runtime.files import RUN_LOCK as LOCK
from cpr_fast.runtime.metrics import FILE as METRICS_FILE
from cpr_fast.runtime.metrics import MetricsWriter, environment, read_metrics, rewind
from cpr_fast.runtime.writers import WRITERS, open_writers
from cpr_fast.weights.checkpoint import LAST, load_checkpoint, point_to
from cpr_fast.weights.reading import CheckpointError, DamagedCheckpointError
from cpr_fast.wording import counted, expected, listed

T = TypeVar("T")

# What a run writes before its first step.
OF_THE_START = (LOCK, METRICS_FILE, chain.FILE, "config.json", "checkpoints", *WRITERS)
NAMED = 4  # settings that an error names
ENTRIES = ("config", "encoders", "cycle_state", "processes", "step", "epoch", "step_in_epoch", "cycle")

log = logging.getLogger(__name__)


def on_main(compute: Callable[[], T]) -> T:
    """Calls `compute` in the first process and returns its result in all processes, which also raise its InputError."""

    def attempt() -> tuple[T | None, InputError | None]:
        try:
            return compute(), None
        except InputError as error:
            return None, error

    value, error = distributed.from_main(attempt)
    if error is not None:
        raise error
    return value


@contextmanager
def only_writer(folder: Path, *, exists: bool = False) -> Iterator[None]:
    """Creates the run folder and locks it against other runs within the block.

    A block that refuses its input before the first step of training leaves no folder and no file behind.

    Args:
        exists: whether the folder must exist already, as for a run that is resumed.
    Raises:
        InputError: another process holds the lock, or the folder cannot be written.
    """
    if exists and not folder.is_dir():
        state = "is a file" if folder.is_file() else ""
        raise CheckpointError(
            f"run.out: {expected('the folder of a run to continue', folder, state)} (run.out is relative to the "
            f"working directory, {os.getcwd()!r}; a new run starts without --resume)"
        )
    require_run_folder(folder)
    new = [folder / name for name in OF_THE_START if not os.path.lexists(folder / name)]
    busy = f"run.out: another run is writing to {str(folder)!r}"
    with one_writer(folder / LOCK, busy, "wait until it has ended, or choose another folder with --run.out"):
        try:
            yield
        except InputError:
            if not _has_trained(folder):
                _remove(new)
            raise


def _has_trained(folder: Path) -> bool:
    """Returns whether a run folder holds a checkpoint, or metrics of at least one step."""
    if any((folder / "checkpoints").glob("*")):
        return True
    try:
        return any(row["kind"] == "step" for row in read_metrics(folder))
    except InputError:  # no metrics, or metrics of something else
        return (folder / METRICS_FILE).exists()


def _remove(files: list[Path]) -> None:
    """Removes files, or folders with their content. What cannot be removed stays: the error about the input matters
    more."""
    with suppress(OSError):
        for path in filter(os.path.lexists, files):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def open_run(
    config: Config, folder: Path, resume: bool | Literal["auto"], world: World, videos: dict[str, Any]
) -> dict[str, Any] | None:
    """Prepares the run folder: a new run, or the checkpoint to continue from.

    Args:
        resume: True continues the run. "auto" continues it if the folder holds a checkpoint. Every value acts like
            "auto" if torchrun has restarted the processes.
        videos: the digest of the training videos.
    Returns:
        The checkpoint, or None for a new run, whose folder then holds `config.json` and no metrics.
    Raises:
        InputError: the folder holds a run that would be overwritten, or a run with other settings or videos.
    """
    checkpoints = folder / "checkpoints"
    if resume == "auto" or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        resume = on_main(lambda: bool(run_checkpoints(folder)))
    if not resume:
        on_main(lambda: _start_new(config, folder, videos))
        return None
    # On the CPU if each process takes its part of every tensor: the whole need not fit on its device.
    parts = config.run.shard or config.memory.shard
    saved = _load_newest(checkpoints, torch.device("cpu") if parts else world.device)
    check_same_videos(saved.get("videos"), videos, folder, config.data)
    _check_same_settings(config, saved, folder, world)
    on_main(lambda: _rewind(folder, saved))
    return saved


def open_metrics(config: Config, folder: Path, world: World, *, resumed: bool) -> MetricsWriter:
    """Opens `metrics.jsonl` and the writers of the run, which get its config and environment."""
    about = config.to_dict() | environment(world.device)
    return MetricsWriter(folder, writers=open_writers(config.run, folder, about, resumed=resumed))


def _rewind(folder: Path, saved: dict[str, Any]) -> None:
    """Removes the rows of steps after the checkpoint, which will be computed again."""
    try:
        rewind(folder, step=saved["step"], epoch=saved["epoch"])
        chain.rewind(folder, step=saved["step"], chain=saved.get("ledger"))
    except OSError as error:
        raise _not_writable(folder, error) from error


def _start_new(config: Config, folder: Path, videos: dict[str, Any]) -> None:
    require_new_run(folder)
    try:
        for name in (METRICS_FILE, chain.FILE):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise _not_writable(folder, error) from error
    with replacing(folder / "config.json", durable=True) as temporary:
        temporary.write_text(json.dumps({**config.to_dict(), "videos": videos}, indent=2) + "\n", encoding="utf-8")


def _load_newest(checkpoints: Path, device: torch.device) -> dict[str, Any]:
    """Loads the newest undamaged checkpoint. Damaged ones are renamed to `*.damaged`, and a notice is printed."""
    loaded: dict[Path, dict[str, Any]] = {}

    def find() -> Path:
        damaged: list[tuple[Path, str]] = []
        for path in run_checkpoints(checkpoints.parent):
            try:
                loaded[path] = _of_a_run(load_checkpoint(path, device=device), path)
            except DamagedCheckpointError as error:
                damaged.append((path, error.damage))
                continue
            _set_aside(damaged, path, loaded[path]["step"])
            return path
        if damaged:
            named = "; ".join(f"{path.name} {damage}" for path, damage in damaged)
            raise CheckpointError(
                f"no checkpoint in {str(checkpoints)!r} can be read: {named}. Start a new run with another --run.out"
            )
        raise _no_checkpoint(checkpoints)

    path = on_main(find)
    return loaded[path] if path in loaded else load_checkpoint(path, device=device)


def _of_a_run(payload: dict[str, Any], path: Path) -> dict[str, Any]:
    """Returns a checkpoint from which a run can continue. Raises CheckpointError for one of another kind."""
    missing = [entry for entry in ENTRIES if entry not in payload]
    if missing:
        raise CheckpointError(
            f"--resume: expected {str(path)!r} to be a checkpoint of `cpr-fast pretrain`, but it has no "
            f"{listed(missing)}: `finetune`, `import-checkpoint` or another program wrote it. To train on from its "
            f"encoders, start a new run with --model.init.rgb (or flow, residual) {shlex.quote(str(path))}"
        )
    return payload


def _no_checkpoint(checkpoints: Path) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {str(checkpoints.absolute() / LAST)!r} does not exist, and there is no other one to continue "
        "from. Start the run without --resume"
    )


def _set_aside(damaged: list[tuple[Path, str]], used: Path, step: int) -> None:
    """Renames the damaged checkpoints, makes `last.pt` point to the checkpoint `used`, and reports this."""
    for path, damage in damaged:
        path.replace(path.with_name(path.name + ".damaged"))
        log.warning("Checkpoint %s %s: kept as %s.damaged", path.name, damage, path.name)
    if used.name != LAST:
        point_to(used, used.with_name(LAST))
        log.warning("There is no usable %s: continuing from %s, after step %d", LAST, used.name, step)


def _check_same_settings(config: Config, saved: dict[str, Any], folder: Path, world: World) -> None:
    """Raises CheckpointError that names the settings that differ, and the command that continues the run."""
    asked = _what_counts(config.to_dict(), world.size)
    before = Config.from_dict(saved["config"]).to_dict()  # settings that its version lacked get today's defaults
    differing: list[str] = []
    for section, values in _what_counts(before, saved["processes"]).items():
        for key, was in values.items():
            if (now := asked[section][key]) != was:
                differing += _cycle_changes(was, now) if key == "cycles" else [_change(f"{section}.{key}", was, now)]
    if not differing:
        return
    named = "; ".join(differing[:NAMED])
    if len(differing) > NAMED:
        named += f"; and {len(differing) - NAMED} more"
    command = resume_command(folder, processes=saved["processes"])
    raise CheckpointError(
        f"--resume: other settings than those of the run in {str(folder)!r}: {named}. Repeat the options that "
        "it was started with, start a new run with another --run.out, or continue the run with its recorded settings: "
        f"{command}"
    )


def _change(key: str, was: Any, now: Any) -> str:
    return f"{key}: the run has {_shown(was)}, this command asks for {_shown(now)}"


def _cycle_changes(was: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """Returns what differs between the cycles of two schedules. Milestones and warm-ups are named only if the epochs
    are equal, because `--epochs` scales them along."""
    if len(was) != len(now):
        return [f"schedule: the run has {_cycles_of(was)}, this command asks for {_cycles_of(now)}"]
    pairs = list(zip(was, now, strict=True))
    if any(a["epochs"] != b["epochs"] for a, b in pairs):
        epochs = [f"schedule: the run has {_cycles_of(was)}, this command asks for {_epochs_of(now)}"]
        skipped = ("epochs", "milestones", "warmup_epochs")
    else:
        epochs, skipped = [], ()
    return epochs + [
        _change(with_cycle(f"schedule.cycles[{number}].{key}"), a[key], b[key])
        for number, (a, b) in enumerate(pairs)
        for key in a
        if key not in skipped and a[key] != b[key]
    ]


def _cycles_of(cycles: list[dict[str, Any]]) -> str:
    return f"{counted(len(cycles), 'cycle')} of {_epochs_of(cycles)}"


def _epochs_of(cycles: list[dict[str, Any]]) -> str:
    """Returns "4 epochs" if the cycles have equal numbers of them, otherwise "4, 4 and 2 epochs"."""
    numbers = [str(cycle["epochs"]) for cycle in cycles]
    if len(set(numbers)) == 1:
        return f"{numbers[0]} epoch{'' if numbers[0] == '1' else 's'}"
    return f"{', '.join(numbers[:-1])} and {numbers[-1]} epochs"


def _shown(value: Any) -> str:
    """Returns a setting as a TOML file holds it; None is a setting that is left out."""
    return "no value" if value is None else json.dumps(value, ensure_ascii=False)


def _what_counts(config: dict[str, Any], processes: int) -> dict[str, dict[str, Any]]:
    """Returns the settings of a `Config.to_dict()` that affect the results, without those that only affect the place,
    the number of processes and the speed."""
    kept = {section: dict(values) for section, values in config.items()}
    kept["run"] = {"seed": kept["run"]["seed"]}
    kept["model"].pop("init")  # the checkpoint holds those weights
    kept["model"]["arch"] = kept["model"]["arch"].rpartition("/")[2]  # a file may be moved
    for section in ("probe", "finetune", "health"):  # they apply after pretraining or only monitor it
        kept.pop(section, None)
    for key in (*READING, "features"):
        kept["data"].pop(key)
    kept["data"]["batch_size x processes"] = kept["data"].pop("batch_size") * processes
    kept["model"].pop("recompute")
    kept["memory"].pop("shard")
    parts = kept["optim"].pop("accumulate")
    kept["memory"]["shuffle_bn_groups"] = kept["memory"]["shuffle_bn_groups"] or processes * parts
    return kept


def _not_writable(folder: Path, error: OSError) -> InputError:
    return InputError(f"run.out: cannot write to {str(folder)!r}: {error.strerror or error}. {OTHER_FOLDER}")
