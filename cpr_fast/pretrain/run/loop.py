"""Pretraining: cycles of epochs of steps, from random weights or a checkpoint to the run folder.

The step itself, Algorithm 1 of the paper, is `cpr_fast.pretrain.step.step.train_step`.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from cpr_fast.config import Config, View
from cpr_fast.data.clips.sampling import plan_first
from cpr_fast.data.index.index import Index
from cpr_fast.data.storage.unreadable import by_kind
from cpr_fast.errors import InputError
from cpr_fast.pretrain.run.dump import dump_memory
from cpr_fast.pretrain.run.log import StepLog
from cpr_fast.pretrain.run.online import OnlineRetrieval
from cpr_fast.pretrain.state.cycle import CycleState
from cpr_fast.pretrain.state.schedule import cycle_epochs, learning_rate
from cpr_fast.pretrain.step.step import train_step
from cpr_fast.runtime import distributed
from cpr_fast.runtime.distributed import World
from cpr_fast.runtime.interrupt import Interrupted, StopRequest, stop_requests
from cpr_fast.runtime.metrics import FILE as METRICS_FILE
from cpr_fast.runtime.metrics import MetricsWriter, environment, rewind
from cpr_fast.runtime.progress import track
from cpr_fast.runtime.watchdog import Watchdog
from cpr_fast.weights.checkpoint import LAST, CheckpointError, load_checkpoint, load_initial, save_step

if TYPE_CHECKING:
    from cpr_fast.data.clips.loader import Batch

log = logging.getLogger(__name__)


class Loader(Protocol):
    """What the loop asks of `cpr_fast.data.clips.loader.TrainLoader`."""

    skipped: Sequence[Any]

    def __len__(self) -> int: ...
    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Run:
    """What stays the same from the first step to the last."""

    config: Config
    world: World
    index: Index
    folder: Path
    make_loader: Callable[..., Loader]
    writer: MetricsWriter | None  # None on all processes but the first
    online: OnlineRetrieval | None
    progress: bool
    stop: StopRequest
    watch: Watchdog


def pretrain(
    config: Config,
    *,
    resume: bool | Literal["auto"] = False,
    index: Index | None = None,
    make_loader: Callable[..., Loader] | None = None,
    held_out: Index | None = None,
    make_windows: Callable[[Index, View], Any] | None = None,
    progress: bool = True,
) -> Path:
    """Trains the cycles of `config.schedule` and returns the run folder, `config.run.out`.

    Deterministic: every draw is a function of the seed and the step, so a resumed run computes what an uninterrupted
    one does (bitwise on the CPU). Under `torchrun` all processes train together and the first one writes.

    Args:
        resume: goes on from `checkpoints/last.pt` of the run folder, mid-epoch if it was written there; "auto", and
            always where torchrun has restarted the processes: if there is one.
        index: the training videos; by default the rows of `data.index` whose split is `data.split`.
        make_loader: called as `TrainLoader` of `cpr_fast.data.clips.loader`, the default.
        held_out: the videos of online retrieval; by default the rows of `data.index` whose split is
            `health.online_split`.
        make_windows: as of `OnlineRetrieval`.
        progress: draws a bar on stderr.
    Raises:
        InputError: the run folder, index or config does not fit.
        NonFiniteError: features or loss became NaN or infinite.
        Interrupted: SIGTERM or SIGUSR1 asked to stop, and the run has saved where it was.
    """
    if make_loader is None:
        from cpr_fast.data.clips.loader import TrainLoader as make_loader  # here, so that other loaders need no DALI
    world = distributed.init(config.run.device)
    _set_precision(config, world)
    if index is None:
        whole = Index.load(config.data.index, require_flow=config.data.flow == "stored")
        index = whole.select_for_training(config.data.split)
    folder = Path(config.run.out)
    saved = _open_run(config, folder, resume, world)
    with ExitStack() as stack:
        writer = None
        if world.is_main:
            writer = stack.enter_context(MetricsWriter(folder, tensorboard=config.run.tensorboard))
            about = {"kind": "note", "text": f"resumed at step {saved['step']}"} if saved else {"kind": "run"}
            writer.write({**about, **environment(world.device), "config": config.to_dict()})
        stop = stack.enter_context(stop_requests())
        note = (lambda text: writer.write({"kind": "note", "text": text})) if writer else (lambda text: None)
        watch = stack.enter_context(Watchdog(world, config.run.stall_timeout_s, note))
        stack.enter_context(torch.random.fork_rng([world.device] if world.device.type == "cuda" else []))
        torch.manual_seed(config.run.seed)
        online = _online(config, held_out, world, watch, make_windows)
        run = Run(config, world, index, folder, make_loader, writer, online, progress and world.is_main, stop, watch)
        _run_cycles(run, saved)
    return folder


def _online(
    config: Config,
    held_out: Index | None,
    world: World,
    watch: Watchdog,
    make_windows: Callable[[Index, View], Any] | None,
) -> OnlineRetrieval | None:
    """What measures retrieval between epochs, if the run wants it."""
    if not config.health.online_every:
        return None
    if held_out is None:
        stored = config.data.flow == "stored"
        held_out = Index.load(config.data.index, require_flow=stored).select(split=config.health.online_split)
    return OnlineRetrieval(config, held_out, [c.view for c in config.schedule.cycles], world, watch, make_windows)


def _run_cycles(run: Run, saved: dict[str, Any] | None) -> None:
    """Every cycle of the schedule, or those that `saved`, a checkpoint, leaves to do."""
    weights = saved["encoders"] if saved else load_initial(run.config.model)
    distributed.set_rng_states(run.world.device, saved.get("rng") if saved else None)
    for number, epochs in enumerate(cycle_epochs(run.config.schedule)):
        if saved and saved["epoch"] >= epochs.stop:
            continue  # done before the checkpoint
        cycle = run.config.schedule.cycles[number]
        state = CycleState(run.config, cycle, weights, run.index, run.world)
        start_step = 0
        if saved and saved["cycle"] == number and saved["epoch"] in epochs:
            state.load_state_dict(saved["cycle_state"])
            epochs, start_step = range(saved["epoch"], epochs.stop), saved["step_in_epoch"]
        _run_cycle(run, state, number, epochs, start_step, weights)
        weights = weights | state.trained()


def _run_cycle(
    run: Run, state: CycleState, number: int, epochs: range, start_step: int, weights: dict[str, Any]
) -> None:
    """The steps of a cycle from `start_step` of the first of `epochs`; a checkpoint at the end of every epoch."""
    config, world = run.config, run.world
    one_clip = {"plan": plan_first} if config.model.shared else {}  # IIC compares two views of one clip
    loader = run.make_loader(
        run.index, config.data, state.views, seed=config.run.seed, device=world.device, rank=world.rank,
        world_size=world.size, **one_clip,
    )  # fmt: skip
    rows = StepLog(run.writer, state, number, run.index)
    steps = len(loader)  # of an epoch
    description = f"cycle {number + 1}/{len(config.schedule.cycles)}: {state.cycle.view}, mining {state.cycle.mining}"
    batches = _timed_batches(loader, epochs, start_step, run.watch)
    left = len(epochs) * steps - start_step
    try:
        for epoch, i, batch, data_wait_s in track(
            batches, description, total=left, unit="steps", progress=run.progress
        ):
            step = epoch * steps + i
            run.watch.doing(f"computing step {step}")
            lr = learning_rate(epoch - cycle_epochs(config.schedule)[number].start, state.cycle, config.optim,
                               config.schedule.gamma)  # fmt: skip
            state.set_learning_rate(lr)
            result = train_step(state, batch, step)
            rows.step(step, epoch, lr, data_wait_s, result)
            last, best = i + 1 == steps, False
            if last:
                rows.epoch(epoch, step, len(distributed.union(path for path, _ in loader.skipped)), result)
                if config.run.dump_memory and world.is_main:
                    dump_memory(run.folder, state, number)
                state.start_epoch()
                if run.online is not None and (epoch + 1) % config.health.online_every == 0:
                    best = _measure_retrieval(run, state, rows, epoch, step)
            every, signum = config.run.checkpoint_every, distributed.largest(run.stop.signum)
            if last or signum or (every and (step + 1) % every == 0):
                run.watch.doing(f"writing the checkpoint of step {step}")
                rows.check()
                where = {"step": step + 1, "epoch": epoch + last, "step_in_epoch": 0 if last else i + 1}
                path = _save(run, state, {**where, "cycle": number}, weights, best)
            if signum:
                raise Interrupted(signum, f"after step {step}; saved {path}")
        _name_skipped(run, number, loader)
    finally:
        loader.close()


def _measure_retrieval(run: Run, state: CycleState, rows: StepLog, epoch: int, step: int) -> bool:
    """Online retrieval by the encoder that learns; whether its R@1 is the best of the cycle so far."""
    run.watch.doing(f"measuring retrieval after step {step}")
    measured = run.online.measure(state.encoders.query, state.cycle.view)
    best = state.best is None or measured["r@1"] > state.best["r@1"]
    if best:
        state.best = {"epoch": epoch, "r@1": measured["r@1"]}
    rows.online(epoch, step, measured, best)
    return best


def _name_skipped(run: Run, number: int, loader: Loader) -> None:
    """Reports at the end of a cycle which files could not be read, on stderr and as a note, by kind of problem."""
    skipped = sorted(distributed.union((str(path), reason) for path, reason in loader.skipped))
    if skipped and run.writer is not None:
        count = f"{len(skipped)} {'file' if len(skipped) == 1 else 'files'}"
        text = f"cycle {number + 1}: {count} could not be read and were replaced by other videos: "
        text += "; ".join(by_kind(skipped))
        run.writer.write({"kind": "note", "text": text})
        log.warning(text)


def _timed_batches(
    loader: Loader, epochs: range, start_step: int, watch: Watchdog
) -> Iterator[tuple[int, int, Batch, float]]:
    """(epoch, step in it, batch, seconds the loop waited for it) from `start_step` of the first epoch on."""
    for epoch in epochs:
        batches = iter(loader.epoch(epoch, start_step))
        for i in range(start_step, len(loader)):
            watch.doing(f"waiting for the batch of step {epoch * len(loader) + i}")
            began = time.perf_counter()
            batch = next(batches)
            yield epoch, i, batch, time.perf_counter() - began
        start_step = 0


def _save(run: Run, state: CycleState, where: dict[str, int], weights: dict[str, Any], best: bool) -> Path:
    """Writes a checkpoint from which `pretrain(resume=True)` goes on exactly here; returns its path."""
    rng = distributed.rng_states(run.world.device)
    folder = run.folder / "checkpoints"
    if not run.world.is_main:
        return folder / LAST
    payload = {
        "config": run.config.to_dict(),
        "environment": environment(run.world.device),
        "encoders": weights | state.trained(),
        "cycle_state": state.state_dict(),
        "processes": run.world.size,
        "rng": rng,
        **where,
    }
    return save_step(folder, where["step"], payload, keep=run.config.run.keep_checkpoints, best=best)


def _open_run(config: Config, folder: Path, resume: bool | Literal["auto"], world: World) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None and a fresh run folder. Refuses to overwrite or to mix runs."""
    last = folder / "checkpoints" / LAST
    if resume == "auto" or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        resume = bool(distributed.largest(last.exists()))
    if not resume:
        if last.exists():
            raise InputError(f"run.out: {str(folder)!r} already holds a run; resume it, or choose another folder")
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / METRICS_FILE).unlink(missing_ok=True)
            temporary = folder / "config.json.tmp"
            temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
            os.replace(temporary, folder / "config.json")
        return None
    saved = load_checkpoint(last, device=world.device)
    asked = _what_counts(config.to_dict(), world.size)
    before = Config.from_dict(saved["config"]).to_dict()  # with today's default where that version had no such setting
    for section, values in _what_counts(before, saved["processes"]).items():
        for key, was in values.items():
            now = asked[section][key]
            if now != was:
                raise CheckpointError(f"{section}.{key}: the run in {str(folder)!r} has {was!r}, got {now!r}")
    if world.is_main:
        rewind(folder, step=saved["step"], epoch=saved["epoch"])
    return saved


def _what_counts(config: dict[str, Any], processes: int) -> dict[str, dict[str, Any]]:
    """The settings of a `Config.to_dict()` that decide what is computed, not where, by how many and how fast."""
    kept = {section: dict(values) for section, values in config.items()}
    kept["run"] = {"seed": kept["run"]["seed"]}
    kept["model"].pop("init")  # the checkpoint holds those weights
    for section in ("probe", "finetune", "health"):  # come after pretraining, or only watch it
        kept.pop(section, None)
    for key in ("index", "workers", "prefetch", "cache_gib"):
        kept["data"].pop(key)
    kept["data"]["batch_size x processes"] = kept["data"].pop("batch_size") * processes
    kept["model"].pop("recompute")
    parts = kept["optim"].pop("accumulate")
    kept["memory"]["shuffle_bn_groups"] = kept["memory"]["shuffle_bn_groups"] or processes * parts
    return kept


def _set_precision(config: Config, world: World) -> None:
    """TensorFloat-32 and cuDNN's search for the fastest convolution on CUDA."""
    if world.device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    elif config.optim.precision == "fp16":
        raise InputError("optim.precision: 'fp16' expects a CUDA device; got the CPU, where 'bf16' is the faster one")
