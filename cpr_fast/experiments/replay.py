"""Replays a run from one of its checkpoints, and compares every step with the ledger of the run.

The replay trains in a temporary folder. The run folder is only read.
"""

from __future__ import annotations

import dataclasses
import json
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
from cpr_fast.pretrain.ledger.chain import FILE, START, LedgerError, read_ledger, require_steps, step_files
from cpr_fast.pretrain.ledger.rows import differing
from cpr_fast.pretrain.run.folder import on_main
from cpr_fast.pretrain.run.loop import Loader, pretrain
from cpr_fast.pretrain.run.videos import check_same_videos, digest, training_videos
from cpr_fast.runtime import distributed
from cpr_fast.runtime.interrupt import Interrupted, Stopped
from cpr_fast.runtime.metrics import FILE as METRICS_FILE
from cpr_fast.runtime.metrics import environment, read_metrics
from cpr_fast.runtime.progress import announce
from cpr_fast.weights.checkpoint import BEST, LAST, load_checkpoint
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
        processes: the number of its processes; None if that was not recorded.
        environment: the versions, device and commit with which it was computed.
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
        chain: the `chain` of the newest row.
    """

    def __init__(self, rows: list[dict[str, Any]], chain: str) -> None:
        self.rows, self.chain, self.done = rows, chain, 0
        self.difference: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._told = time.monotonic()

    def write(self, row: dict[str, Any]) -> None:
        """Compares the next row. Raises _ComparedError if it differs, or if it is the last one."""
        recorded = self.rows[self.done]
        if differing(recorded, row):
            self.difference = recorded, row
            raise _ComparedError
        self.done, self.chain = self.done + 1, recorded["chain"]
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
        `recorded` and `replayed`; `environment`: {name: [recorded, now]} of what differs.
    Raises:
        InputError: the run, its ledger, a checkpoint or the videos cannot be used; the message says which.
    """
    rows = read_ledger(folder)
    start = _start(folder, rows, first)
    require_steps(rows, start.step, folder, start.chain)
    end = rows[-1]["step"] + 1 if steps is None else (first - 1 if first else start.step) + steps
    rows = [row for row in rows if start.step <= row["step"] < end]
    config = _settings(start.config, index)
    world = distributed.init(config.run.device)
    _require_processes(folder, start.processes, world.size)
    videos = training_videos(config.data) if videos is None else videos
    check_same_videos(start.videos, digest(videos), folder, config.data)
    announce(f"Replaying steps {start.step + 1} to {rows[-1]['step'] + 1} of {folder}")
    compared = Comparison(rows, start.chain or START)
    with tempfile.TemporaryDirectory(prefix="cpr-fast-verify-") as own:
        out = distributed.from_main(lambda: Path(own) / "run")
        on_main(lambda: _prepare(out, folder, start.checkpoint))
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(out)))
        try:
            pretrain(config, resume=start.checkpoint is not None, index=videos, make_loader=make_loader,
                     ledger=compared, progress=False)  # fmt: skip
        except _ComparedError:
            pass
        except Interrupted as stopped:
            raise Stopped(stopped.signum) from None
        else:
            raise LedgerError(f"{folder / FILE} goes on after step {rows[compared.done]['step']}, where the run ends")
    return _result(folder, start, compared, environment(world.device))


def _start(folder: Path, rows: list[dict[str, Any]], first: int | None) -> Start:
    """Returns the newest checkpoint from which step `first`, or by default some step of the ledger, can be computed."""
    done = rows[-1]["step"] + 1 if rows else 0
    if first is not None and not 1 <= first <= max(done, 1):
        raise InputError(f"--from: expected a step from 1 to {done}, the last one in the ledger, got {first}")
    limit = done - 1 if first is None else first - 1
    fitting = [path for step, path in step_files(folder) if step <= limit]
    best = folder / "checkpoints" / BEST
    for path in [*fitting[-1:], *([] if fitting or not best.exists() else [best])]:
        saved = load_checkpoint(path)
        if saved["step"] <= limit:
            return Start(saved["step"], path, Config.from_dict(saved["config"]), saved.get("videos"),
                         saved["processes"], saved["environment"], saved.get("ledger"))  # fmt: skip
    recorded = folder / "config.json"
    if not recorded.is_file():
        raise InputError(f"run folder {str(folder)!r} has no config.json; expected the folder of a pretraining run")
    begin = next((row for row in read_metrics(folder) if row["kind"] == "run"), {})
    videos = json.loads(recorded.read_text(encoding="utf-8")).get("videos")
    return Start(0, None, load(recorded), videos, begin.get("processes"), begin, None)


def _settings(config: Config, index: Path | None) -> Config:
    """Returns the settings of a replay: it writes and measures nothing that the comparison does not need."""
    run = dataclasses.replace(
        config.run, tensorboard=False, dump_memory=False, checkpoint_every=0, keep_checkpoints=1
    )  # fmt: skip
    data = config.data if index is None else dataclasses.replace(config.data, index=str(index))
    return dataclasses.replace(
        config, run=run, data=data, health=dataclasses.replace(config.health, online_every=0)
    )  # fmt: skip


def _require_processes(folder: Path, before: int | None, now: int) -> None:
    if before is not None and before != now:
        raise InputError(
            f"run folder {str(folder)!r} was trained by {counted(before, 'process', 'processes')}, whose sums other "
            f"numbers of processes round differently; got {now}. Run: "
            f"{program(before)} verify {shlex.quote(str(folder))}"
        )


def _prepare(out: Path, folder: Path, checkpoint: Path | None) -> None:
    """Lays out a run folder from which `pretrain` continues; without a checkpoint it stays empty."""
    if checkpoint is not None:
        (out / "checkpoints").mkdir(parents=True)
        (out / "checkpoints" / LAST).symlink_to(checkpoint.absolute())
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
        "equal": difference is None,
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
