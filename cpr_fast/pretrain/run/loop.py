"""Pretraining: runs the cycles of a schedule epoch by epoch and step by step, and writes the run folder.

The step itself, Algorithm 1 of the paper, is `cpr_fast.pretrain.step.step.train_step`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from cpr_fast.config import Config, View
from cpr_fast.config.load import absolute_inputs
from cpr_fast.data.clips.sampling import plan_first
from cpr_fast.data.features.index import StoredClips
from cpr_fast.data.features.stream import FeatureLoader
from cpr_fast.data.index.index import Index
from cpr_fast.data.storage.unreadable import REPLACED, not_read
from cpr_fast.errors import InputError
from cpr_fast.pretrain.ledger.chain import Ledger
from cpr_fast.pretrain.run.checks import CyclePlan, check_run, plan_cycles
from cpr_fast.pretrain.run.dump import dump_memory
from cpr_fast.pretrain.run.folder import on_main, only_writer, open_metrics, open_run
from cpr_fast.pretrain.run.log import LedgerRows, StepLog
from cpr_fast.pretrain.run.online import OnlineRetrieval, OnlineScore, open_online
from cpr_fast.pretrain.run.outcome import outcome
from cpr_fast.pretrain.run.summary import Pace, end_line, start_lines
from cpr_fast.pretrain.run.videos import digest, on_features, training_videos
from cpr_fast.pretrain.state.cycle import CycleState
from cpr_fast.pretrain.state.schedule import CycleRates, cycle_epochs
from cpr_fast.pretrain.step.result import StepResult
from cpr_fast.pretrain.step.step import train_step
from cpr_fast.runtime import distributed
from cpr_fast.runtime.distributed import World
from cpr_fast.runtime.interrupt import Interrupted, StopRequest, stop_requests
from cpr_fast.runtime.metrics import MetricsWriter, environment, read_metrics
from cpr_fast.runtime.progress import track
from cpr_fast.runtime.watchdog import Watchdog
from cpr_fast.weights.checkpoint import LAST, load_initial, save_step

if TYPE_CHECKING:
    from cpr_fast.data.clips.stream import Batch

log = logging.getLogger(__name__)


class Loader(Protocol):
    """The part of `cpr_fast.data.clips.loader.TrainLoader` that the training loop uses."""

    skipped: Sequence[Any]

    def __len__(self) -> int: ...
    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Run:
    """The objects of a run that do not change from its first step to its last."""

    config: Config
    world: World
    index: Index
    videos: dict[str, Any]  # digest of the index
    plans: list[CyclePlan]
    warnings: list[str]  # returned by `check_run`
    folder: Path
    make_loader: Callable[..., Loader]
    writer: MetricsWriter | None  # None in all processes but the first
    ledger: LedgerRows | None  # the same, unless the caller of `pretrain` gave one
    saves: bool  # whether it writes checkpoints: unless the caller gave a ledger
    online: OnlineRetrieval | OnlineScore | None
    progress: bool
    stop: StopRequest
    watch: Watchdog
    unreadable: set[tuple[str, str]] = field(default_factory=set)  # path and reason of files that were reported


def pretrain(
    config: Config,
    *,
    resume: bool | Literal["auto"] = False,
    index: Index | None = None,
    make_loader: Callable[..., Loader] | None = None,
    held_out: Index | None = None,
    make_windows: Callable[[Index, View], Any] | None = None,
    ledger: LedgerRows | None = None,
    progress: bool = True,
) -> Path:
    """Trains the cycles of `config.schedule` and returns the run folder, `config.run.out`.

    Deterministic: every random draw is a function of the seed and the step, so a resumed run computes what an
    uninterrupted one does (bitwise on the CPU). Under `torchrun` all processes train together, and the first one
    writes the files.

    Args:
        resume: True continues from the newest checkpoint of the run folder, which may be in the middle of an epoch.
            "auto" continues if there is a checkpoint; every value acts like "auto" after torchrun restarted processes.
        index: the training videos; by default the rows of `data.index` whose split is `data.split`.
        make_loader: called like `TrainLoader` of `cpr_fast.data.clips.loader`, the default.
        held_out: the videos of online retrieval; by default the rows of `data.index` whose split is
            `health.online_split`.
        make_windows: see `OnlineRetrieval`.
        ledger: receives the rows of the ledger, in every process, instead of `ledger.jsonl`; no checkpoint is written.
        progress: prints a start summary, a progress line and an end summary on stderr.
    Raises:
        InputError: the run folder, the index or the config do not fit each other, or the folder cannot be written.
        NonFiniteError: features or loss became NaN or infinite.
        Interrupted: SIGINT, SIGTERM, SIGUSR1 or SIGHUP asked to stop, and the run has saved a checkpoint.
    """
    world = distributed.init(config.run.device)
    _set_precision(config, world)
    if index is None:
        index = training_videos(config.data)
    config = absolute_inputs(on_features(config, index))  # its record is read from other working directories too
    plans = plan_cycles(config, len(index), world.size)
    warnings = check_run(config, index, plans, stored_flow=make_loader is None and config.data.flow == "stored")
    make_loader = make_loader or _loader_of(index)
    folder, videos = Path(config.run.out), digest(index)
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(only_writer(folder, exists=resume is True)))
        stop = stack.enter_context(stop_requests())
        saved = open_run(config, folder, resume, world, videos)
        writer, saves = None, ledger is None
        if world.is_main:
            writer = stack.enter_context(open_metrics(config, folder, world, resumed=saved is not None))
            ledger = ledger or stack.enter_context(closing(Ledger(folder)))
        watch = stack.enter_context(Watchdog(world, config.run.stall_timeout_s, _notes(writer)))
        stack.enter_context(torch.random.fork_rng([world.device] if world.device.type == "cuda" else []))
        torch.manual_seed(config.run.seed)
        online = open_online(config, index, held_out, world, watch, make_loader, make_windows)
        run = Run(config, world, index, videos, plans, warnings, folder, make_loader, writer, ledger, saves, online,
                  progress and world.is_main, stop, watch)  # fmt: skip
        weights = saved["encoders"] if saved else load_initial(config.model)
        _begin(run, saved)
        _run_cycles(run, saved, weights)
        _finish(run)
    return folder


def _loader_of(index: Index) -> Callable[..., Loader]:
    """Returns the loader of videos, or of the clips of a store."""
    if isinstance(index, StoredClips):
        return FeatureLoader
    from cpr_fast.data.clips.loader import TrainLoader  # imported here, because other loaders do not need DALI

    return TrainLoader


def _notes(writer: MetricsWriter | None) -> Callable[[str], None]:
    """Returns a function that writes a sentence as a row `note`; in processes that do not write it does nothing."""
    return lambda text: None if writer is None else writer.write({"kind": "note", "text": text})


def _begin(run: Run, saved: dict[str, Any] | None) -> None:
    """Writes the row that records this start of the run, and prints the summary and the warnings."""
    if run.writer is None:
        return
    resumed = saved and {"kind": "note", "text": f"resumed at step {saved['step']}", "resumed_step": saved["step"]}
    about = (resumed or {"kind": "run"}) | {"processes": run.world.size, **environment(run.world.device)}
    run.writer.write({**about, "config": run.config.to_dict()})
    if run.progress:
        for line in start_lines(run.config, run.index, run.plans, run.folder, run.world):
            log.info("%s", line)
        if run.online is not None:
            log.info("  Every %d epochs: %s", run.config.health.online_every, run.online.work_ahead())
        if saved:
            log.info("  Resumed after step %d of %d", saved["step"], sum(plan.steps for plan in run.plans))
    for text in run.warnings:
        log.warning("Warning: %s", text)


def _finish(run: Run) -> None:
    """Writes the row `outcome`, unless nothing was trained since the last one, and prints it."""
    if run.writer is None:
        return
    rows = read_metrics(run.folder)
    step = sum(plan.steps for plan in run.plans)
    row = next((row for row in rows if row["kind"] == "outcome" and row["step"] == step), None)
    if row is None:
        row = outcome(rows, run.config, step, len(run.index), run.warnings, judged=run.index.mostly_labelled)
        run.writer.write(row)
    elif run.progress:
        log.info("The run is complete; nothing was left to train.")
    if row["learnt"] is False:
        log.warning("Warning: %s", row["text"])
    for text in row["warnings"]:
        log.warning("Warning: %s", text)
    if run.progress:
        log.info("%s", end_line(row))


def _run_cycles(run: Run, saved: dict[str, Any] | None, weights: dict[str, Any]) -> None:
    """Runs every cycle of the schedule, or those that were not finished in the checkpoint `saved`, from the `weights`
    of the encoders that were trained before.

    Takes the state of the cycle out of `saved`, so that its memory is free after it was copied: each process read all
    of it, also of a queue that is divided.
    """
    distributed.set_rng_states(run.world.device, saved.get("rng") if saved else None)
    held = saved.pop("cycle_state") if saved else None
    for number, epochs in enumerate(cycle_epochs(run.config.schedule)):
        if saved and saved["epoch"] >= epochs.stop:
            continue  # finished before the checkpoint
        cycle = run.config.schedule.cycles[number]
        state = CycleState(run.config, cycle, weights, run.index, run.world)
        start_step = 0
        if saved and saved["cycle"] == number and saved["epoch"] in epochs:
            state.load_state_dict(held)
            epochs, start_step = range(saved["epoch"], epochs.stop), saved["step_in_epoch"]
        held = None
        _run_cycle(run, state, number, epochs, start_step, weights)
        weights = weights | state.trained()


def _run_cycle(
    run: Run, state: CycleState, number: int, epochs: range, start_step: int, weights: dict[str, Any]
) -> None:
    """Runs a cycle from `start_step` of the first of `epochs`, with a checkpoint at the end of every epoch."""
    config, world = run.config, run.world
    one_clip = {"plan": plan_first} if config.model.shared else {}  # IIC compares two views of one clip
    loader = run.make_loader(
        run.index, config.data, state.views, seed=config.run.seed, device=world.device, rank=world.rank,
        world_size=world.size, **one_clip,
    )  # fmt: skip
    rows = StepLog(run.writer, state, number, run.index, run.ledger)
    steps = len(loader)  # per epoch
    cycles = len(config.schedule.cycles)
    description = f"cycle {number + 1} of {cycles}: {state.cycle.view}, mining {state.cycle.mining}"
    batches = _timed_batches(loader, epochs, start_step, run.watch)
    left = len(epochs) * steps - start_step
    pace = _pace(run, state, number, left)
    first, waiting = cycle_epochs(config.schedule)[number].start, run.plans[number].waiting_steps
    rates = CycleRates(state.cycle, config.optim, config.memory, config.schedule.gamma, steps, waiting)
    try:
        began = time.perf_counter()
        for epoch, i, batch, data_wait_s in track(
            batches, description, total=left, unit="steps", progress=run.progress, status=rows.status, left=pace.text
        ):
            step, learns = epoch * steps + i, state.learning
            run.watch.doing(f"computing step {step + 1}")
            now = rates.at(epoch - first, i)
            state.set_rates(now)
            if state.must_choose(i):
                _choose_cascade(run, state, rows, epoch, step)
            result = train_step(state, batch, step)
            rows.step(step, epoch, now, data_wait_s, result)
            _after_step(run, state, rows, loader, result, weights, (number, epoch, i, step))
            pace.step(time.perf_counter() - began, learns=learns)
            began = time.perf_counter()
            if run.progress and (news := pace.news()):
                log.info("%s", news)
    finally:
        loader.close()


def _choose_cascade(run: Run, state: CycleState, rows: StepLog, epoch: int, step: int) -> None:
    """Chooses the cascade with mining.stages = "auto", and prints a new choice."""
    run.watch.doing(f"choosing the cascade of step {step + 1}")
    with rows.untimed():
        text = rows.cascade(epoch, step, state.choose_cascade())
    if run.progress and text is not None:
        log.info("epoch %d: mining with %s", epoch + 1, text)
    run.watch.doing(f"computing step {step + 1}")


def _after_step(
    run: Run,
    state: CycleState,
    rows: StepLog,
    loader: Loader,
    result: StepResult,
    weights: dict[str, Any],
    at: tuple[int, int, int, int],
) -> None:
    """Ends the epoch after its last step, saves a checkpoint when one is due, and stops the run after a stop signal.

    Args:
        at: number of the cycle, of the epoch, of the step within the epoch and of the step within the run.
    Raises:
        Interrupted: after the checkpoint was written, if the run writes any.
    """
    number, epoch, i, step = at
    last, best = i + 1 == len(loader), False
    if last:
        rows.epoch(epoch, step, len(distributed.union(path for path, _ in loader.skipped)), result)
        _name_skipped(run, number, loader)
        if run.config.run.dump_memory and run.world.is_main:
            dump_memory(run.folder, state, number)
        state.start_epoch()
        if run.online is not None and (epoch + 1) % run.config.health.online_every == 0:
            best = _measure_online(run, state, rows, epoch, step)
    every, signum = run.config.run.checkpoint_every, distributed.largest(run.stop.signum)
    if last or signum or (every and (step + 1) % every == 0):
        run.watch.doing(f"writing the checkpoint of step {step + 1}")
        rows.check()
        where = {"step": step + 1, "epoch": epoch + last, "step_in_epoch": 0 if last else i + 1, "cycle": number}
        saved = f"; saved {_save(run, state, where, weights, best)}" if run.saves else ""
    if signum:
        raise Interrupted(signum, f"after step {step + 1}{saved}")


def _pace(run: Run, state: CycleState, number: int, left: int) -> Pace:
    """Returns the pace of a run in which `left` steps of this cycle and all later cycles remain."""
    plan, later = run.plans[number], run.plans[number + 1 :]
    filling = 0
    if not plan.learns_while_filling:
        filling = min(left, max(0, -(-(state.memory.size - state.memory.count) // plan.clips)))
    waiting = sum(plan.waiting_steps for plan in later)
    learning = left - filling + sum(plan.steps for plan in later) - waiting
    return Pace(filling, learning, waiting, plan.epoch_steps)


def _measure_online(run: Run, state: CycleState, rows: StepLog, epoch: int, step: int) -> bool:
    """Measures the encoder that learns, by labels or without; returns whether it is the cycle's best so far."""
    run.watch.doing(f"measuring the encoder after step {step + 1}")
    measured, by = run.online.measure(state.encoders.query, state.cycle.view), run.online.by
    before = (state.best or {}).get(by)  # None also where another measure chose before the run was resumed
    best = before is None or measured[by] > before
    if best:
        state.best = {"epoch": epoch, by: measured[by]}
    rows.online(epoch, step, measured, best)
    return best


def _name_skipped(run: Run, number: int, loader: Loader) -> None:
    """Reports the files that could not be read, by kind of problem, at the end of an epoch, if an earlier one has not
    reported all of them: as a note and on stderr."""
    skipped = sorted(distributed.union((str(path), reason) for path, reason in loader.skipped))
    if not run.unreadable.issuperset(skipped):
        run.unreadable.update(skipped)
        text = f"cycle {number + 1}: {not_read(skipped, REPLACED)}"
        if run.writer is not None:
            run.writer.write({"kind": "note", "text": text})
            log.warning(text)


def _timed_batches(
    loader: Loader, epochs: range, start_step: int, watch: Watchdog
) -> Iterator[tuple[int, int, Batch, float]]:
    """Yields (epoch, step within it, batch, seconds that the loop waited for the batch) from `start_step` of the first
    epoch."""
    for epoch in epochs:
        batches = iter(loader.epoch(epoch, start_step))
        for i in range(start_step, len(loader)):
            watch.doing(f"waiting for the batch of step {epoch * len(loader) + i + 1}")
            began = time.perf_counter()
            batch = next(batches)
            yield epoch, i, batch, time.perf_counter() - began
        start_step = 0


def _save(run: Run, state: CycleState, where: dict[str, int], weights: dict[str, Any], best: bool) -> Path:
    """Writes a checkpoint from which `pretrain(resume=True)` continues exactly here; returns its path."""
    rng = distributed.rng_states(run.world.device)
    encoders, cycle_state = weights | state.trained(), state.state_dict()
    folder = run.folder / "checkpoints"
    if not run.world.is_main:
        return folder / LAST
    run.ledger.sync()
    payload = {
        "config": run.config.to_dict(),
        "environment": environment(run.world.device),
        "encoders": encoders,
        "cycle_state": cycle_state,
        "videos": run.videos,
        "processes": run.world.size,
        "rng": rng,
        "ledger": run.ledger.chain,
        **where,
    }
    return save_step(folder, where["step"], payload, keep=run.config.run.keep_checkpoints, best=best)


def _set_precision(config: Config, world: World) -> None:
    """Allows TensorFloat-32 and cuDNN's search for the fastest convolution on CUDA."""
    if world.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    elif config.optim.precision == "fp16":
        raise InputError("optim.precision: 'fp16' expects a CUDA device; got the CPU, where 'bf16' is the faster one")
