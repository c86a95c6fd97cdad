"""Replays a run from one of its checkpoints, and compares every step with the ledger of the run.

The replay trains in a temporary folder. The run folder is only read.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpr_fast.config import Config, load
from cpr_fast.config.recipes import program
from cpr_fast.data.index.index import Index
from cpr_fast.errors import InputError
from cpr_fast.pretrain.ledger.chain import FILE, LedgerError, read_ledger, require_chain, require_steps, step_files
from cpr_fast.pretrain.ledger.rows import differing, saved_weights
from cpr_fast.pretrain.run.folder import on_main
from cpr_fast.pretrain.run.loop import Loader, pretrain
from cpr_fast.pretrain.run.videos import check_same_videos, digest, training_videos
from cpr_fast.runtime import distributed
from cpr_fast.runtime.interrupt import Interrupted, Stopped
from cpr_fast.runtime.metrics import FILE as METRICS_FILE
from cpr_fast.runtime.metrics import environment, read_metrics
from cpr_fast.runtime.progress import announce
from cpr_fast.runtime.writers import WRITERS
from cpr_fast.weights.checkpoint import BEST, LAST, load_checkpoint, point_to
from cpr_fast.wording import counted

NEWS_S = 15.0  # time between two lines about the progress


@dataclass(frozen=True)
class Start:
    """Where a replay starts.

    Attributes:
        step: number of steps done before.
        checkpoint: the checkpoint after them; None at the first step of a run, which needs none.
        config: the settings of the run.
        videos: the digest of its training videos.
        processes: the number of processes that computed the next step; None if that was not recorded.
        environment: the versions, device and commit with which they computed it.
        chain: what the checkpoint holds of the ledger.
    """

    step: int
    checkpoint: Path | None
    config: Config
    videos: dict[str, Any] | None
    processes: int | None
    environment: dict[str, Any]
    chain: str | None


class _ComparedError(Exception):
    """Ends the replay: every row was compared, or one differs."""


class Comparison:
    """Receives the rows of a replay and compares them with those of the run.

    Attributes:
        done: number of rows that are equal.
        difference: the first recorded row and the row of the replay that differ, or None.
    """

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.done = rows, 0
        self.difference: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._told = time.monotonic()

    def write(self, row: dict[str, Any]) -> None:
        """Compares the next row. Raises _ComparedError if it differs, or if it is the last one."""
        recorded = self.rows[self.done]
        if differing(recorded, row):
            self.difference = recorded, row
            raise _ComparedError
        self.done += 1
        if self.done == len(self.rows):
            raise _ComparedError
        if (now := time.monotonic()) > self._told + NEWS_S:
            self._told = now
            announce(f"Step {row['step'] + 1} of {self.rows[-1]['step'] + 1}: equal so far", end="")


def replay(
    folder: Path,
    *,
    first: int | None = None,
    steps: int | None = None,
    index: Path | None = None,
    videos: Index | None = None,
    make_loader: Callable[..., Loader] | None = None,
) -> dict[str, Any]:
    """Replays a run and compares it with its ledger, up to the first difference. Under `torchrun` all processes replay
    together.

    Args:
        folder: the run folder.
        first: the step to compare first, from 1: the replay starts from the newest checkpoint before it. By default,
            that is the newest checkpoint after which the run has computed a step.
        steps: the number of steps to compare; by default all that the ledger holds.
        index: the index of the training videos; by default that of the run.
        videos, make_loader: see `pretrain`.
    Returns:
        `equal`; `checkpoint`, None if the replay started with the first step; `first_step` and `last_step` that were
        compared, from 1; `difference`, None or `step`, `epoch` and `cycle` from 1, the `fields` that differ, the rows
        `recorded` and `replayed`; `other_weights`, None or the first `checkpoint` whose weights are not those of its
        row, see `_other_weights`; `rest`, None or the `step` from which on another number of `processes` computed what
        was to be compared; `environment`: {name: [recorded, now]} of what differs.
    Raises:
        InputError: the run, its ledger, a checkpoint or the videos cannot be used; the message says which.
    """
    files = step_files(folder)  # before the rows: a run that still trains writes its rows first
    rows = read_ledger(folder)
    starts = _starts(folder)
    start = _start(folder, files, rows, first, starts)
    require_steps(rows, start.step, folder, written=files[-1][0] if files else 0)
    require_chain(rows, start.step, start.chain, folder)
    end = rows[-1]["step"] + 1 if steps is None else (first - 1 if first else start.step) + steps
    rest = _rest(starts, start, first or start.step + 1, end)
    end = rest["step"] - 1 if rest else end
    config = _settings(start.config, index)
    world = distributed.init(config.run.device)
    _require_processes(folder, start, world.size)
    with tempfile.TemporaryDirectory(prefix="cpr-fast-verify-") as own:
        out = distributed.from_main(lambda: Path(own) / "run")
        on_main(lambda: _prepare(out, folder, start.checkpoint))
        other_weights = on_main(lambda: _other_weights(folder, files, rows, range(start.step, end)))
        compared = Comparison([row for row in rows if start.step <= row["step"] < end])
        videos = training_videos(config.data) if videos is None else videos
        check_same_videos(start.videos, digest(videos), folder, config.data)
        announce(f"Replaying steps {start.step + 1} to {compared.rows[-1]['step'] + 1} of {folder}")
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(out)))
        _compute(config, start.checkpoint is not None, compared, index=videos, make_loader=make_loader)
    if compared.difference is None and compared.done < len(compared.rows):
        after = compared.rows[compared.done]["step"]
        raise LedgerError(f"{folder / FILE} goes on after step {after}, where the run ends")
    return _result(folder, start, compared, environment(world.device)) | {
        "equal": compared.difference is None and other_weights is None, "other_weights": other_weights, "rest": rest
    }  # fmt: skip


def _compute(config: Config, resume: bool, compared: Comparison, **inputs: Any) -> None:
    """Trains until every row is compared or one differs, or the schedule ends."""
    try:
        pretrain(config, resume=resume, ledger=compared, progress=False, **inputs)
    except _ComparedError:
        pass
    except Interrupted as stopped:
        raise Stopped(stopped.signum) from None


def _starts(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """Returns the number of steps done before each start of the run whose steps are in the ledger, and its row of the
    metrics, with `processes`, `config`, versions and device; nothing if there are no metrics."""
    found: list[tuple[int, dict[str, Any]]] = []
    for row in read_metrics(folder) if (folder / METRICS_FILE).exists() else []:
        step = 0 if row["kind"] == "run" else row.get("resumed_step")
        if step is None and row["kind"] == "note":  # before the row had this field
            text = re.fullmatch(r"resumed at step (\d+)", row["text"])
            step = int(text[1]) if text else None
        if step is not None:
            found = [*((before, about) for before, about in found if before < step), (step, row)]
    return found


def _rest(starts: list[tuple[int, dict[str, Any]]], start: Start, first: int, end: int) -> dict[str, int] | None:
    """Returns the `step`, from 1, from which on another number of `processes` computed the run, if it is among the
    steps from `first` to `end`. Raises InputError if it is before `first`, which a replay cannot reach then."""
    for step, about in starts:
        if start.step < step < end and len({start.processes, about.get("processes"), None}) == 3:  # None: not recorded
            if step < first:
                raise InputError(
                    f"--from: step {first} was computed by {counted(about['processes'], 'process', 'processes')} from "
                    f"a checkpoint after step {step} that no longer exists, and the steps before by "
                    f"{start.processes}; expected a step from {start.step + 1} to {step}, or one after a later "
                    "checkpoint"
                )
            return {"step": step + 1, "processes": about["processes"]}
    return None


def _other_weights(
    folder: Path, files: list[tuple[int, Path]], rows: list[dict[str, Any]], steps: range
) -> dict[str, Any] | None:
    """Compares the newest checkpoint with the chain of the ledger, and the weights in every checkpoint at the end of an
    epoch with the rows of these steps.

    Returns:
        None, or of the first checkpoint that holds other weights: `checkpoint`, its `step`, and the digests `recorded`
        and `saved`.
    Raises:
        LedgerError: the newest checkpoint was written after other rows.
    """
    recorded = {row["step"] + 1: row["weights"] for row in rows if "weights" in row and row["step"] in steps}
    found = None
    for step, path in files:
        newest = step == files[-1][0]
        if not path.exists() or not (newest or step in recorded):  # removed by a run that still trains
            continue
        saved = load_checkpoint(path)
        if newest:
            require_chain(rows, saved["step"], saved.get("ledger"), folder)
        if found is None and step in recorded and (weights := saved_weights(saved)) != recorded[step]:
            found = {"checkpoint": str(path), "step": step, "recorded": recorded[step], "saved": weights}
    return found


def _start(
    folder: Path,
    files: list[tuple[int, Path]],
    rows: list[dict[str, Any]],
    first: int | None,
    starts: list[tuple[int, dict[str, Any]]],
) -> Start:
    """Returns the newest checkpoint from which step `first`, or by default some step of the ledger, can be computed.
    The settings, processes and environment are those of the start that computed its next step."""
    done = rows[-1]["step"] + 1 if rows else 0
    if first is not None and not 1 <= first <= max(done, 1):
        raise InputError(f"--from: expected a step from 1 to {done}, the last one in the ledger, got {first}")
    limit = done - 1 if first is None else first - 1
    fitting = [path for step, path in files if step <= limit]
    best = folder / "checkpoints" / BEST
    for path in [*fitting[-1:], *([] if fitting or not best.exists() else [best])]:
        saved = load_checkpoint(path)
        if saved["step"] <= limit:
            about = next((row for step, row in starts if step == saved["step"]), saved["environment"])
            config = Config.from_dict(about.get("config", saved["config"]))
            return Start(saved["step"], path, config, saved.get("videos"), about.get("processes", saved["processes"]),
                         about, saved.get("ledger"))  # fmt: skip
    recorded = folder / "config.json"
    if not recorded.is_file():
        raise InputError(f"run folder {str(folder)!r} has no config.json; expected the folder of a pretraining run")
    begin = next((row for step, row in starts if step == 0), {})
    config = load(recorded)  # names the file if it is damaged
    videos = json.loads(recorded.read_text(encoding="utf-8")).get("videos")
    return Start(0, None, config, videos, begin.get("processes"), begin, None)


def _settings(config: Config, index: Path | None) -> Config:
    """Returns the settings of a replay: it writes and measures nothing that the comparison does not need."""
    writes = dict.fromkeys((*WRITERS, "dump_memory"), False)
    run = dataclasses.replace(config.run, checkpoint_every=0, keep_checkpoints=1, **writes)
    data = config.data if index is None else dataclasses.replace(config.data, index=str(index))
    return dataclasses.replace(config, run=run, data=data, health=dataclasses.replace(config.health, online_every=0))


def _require_processes(folder: Path, start: Start, now: int) -> None:
    before = start.processes
    if before is not None and before != now:
        raise InputError(
            f"run folder {str(folder)!r}: step {start.step + 1} was computed by "
            f"{counted(before, 'process', 'processes')}, whose sums other numbers of processes round differently; got "
            f"{now}. Run: {program(before)} verify {shlex.quote(str(folder))} --from {start.step + 1}"
        )


def _prepare(out: Path, folder: Path, checkpoint: Path | None) -> None:
    """Lays out a run folder from which `pretrain` continues; without a checkpoint it stays empty. A hard link, or a
    copy, keeps the checkpoint, which a run that still trains may remove."""
    if checkpoint is not None:
        if not checkpoint.exists():
            raise InputError(f"{str(checkpoint)!r} was removed meanwhile by the run, which still trains: try again")
        (out / "checkpoints").mkdir(parents=True)
        point_to(checkpoint, out / "checkpoints" / LAST)
        shutil.copy(folder / FILE, out)
        (out / METRICS_FILE).touch()


def _result(folder: Path, start: Start, compared: Comparison, now: dict[str, Any]) -> dict[str, Any]:
    difference = None
    if compared.difference is not None:
        recorded, replayed = compared.difference
        difference = {name: recorded[name] + 1 for name in ("step", "epoch", "cycle")}
        difference |= {"fields": differing(recorded, replayed), "recorded": recorded, "replayed": replayed}
    last = compared.rows[min(compared.done, len(compared.rows) - 1)]["step"] + 1
    return {
        "run": str(folder),
        "checkpoint": None if start.checkpoint is None else str(start.checkpoint),
        "first_step": start.step + 1,
        "last_step": last,
        "difference": difference,
        "environment": {
            name: [start.environment.get(name), now[name]]
            for name in ("versions", "device", "commit")
            if start.environment.get(name) != now[name]
        },
    }
