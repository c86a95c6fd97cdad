"""Rows of `metrics.jsonl` and of the ledger that a run writes while it trains.

Reading the loss for a row is the only point at which a training step waits for the device.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cpr_fast.data.index.index import Index
from cpr_fast.errors import FailedError
from cpr_fast.evaluate.retrieval.names import percent
from cpr_fast.mining.auto import Choice
from cpr_fast.pretrain.ledger.rows import observe, step_row, weights_row
from cpr_fast.pretrain.run.dump import dump_step
from cpr_fast.pretrain.state.cycle import CycleState
from cpr_fast.pretrain.state.schedule import Rates
from cpr_fast.pretrain.step.contrast import chance_loss
from cpr_fast.pretrain.step.result import StepResult
from cpr_fast.runtime.metrics import MetricsWriter
from cpr_fast.weights.reading import CheckpointError
from cpr_fast.wording import counted

log = logging.getLogger(__name__)

MINED_QUERIES = 6  # queries per epoch whose mined entries the report shows as pictures
NOTHING_MINED = {"pmr": None, "mining_r1": None}  # rates of steps and epochs that mined nothing


class NonFiniteError(FailedError, ArithmeticError):
    """Features or loss became NaN or infinite. The message names the step and the videos of its batch."""


class LedgerRows(Protocol):
    """Where the rows of a ledger go: a `Ledger`, or what compares them with those of one."""

    def write(self, row: dict[str, Any]) -> None: ...


class StepLog:
    """Writes the rows of one cycle. In processes other than the first, `writer` is None and it only checks for NaN.
    Without a `ledger` it writes no rows of one."""

    def __init__(
        self,
        writer: MetricsWriter | None,
        state: CycleState,
        number: int,
        index: Index,
        ledger: LedgerRows | None = None,
    ) -> None:
        self.writer, self.state, self.index, self.ledger = writer, state, index, ledger
        self.common = {"cycle": number, "view": state.cycle.view, "mining": state.cycle.mining}
        self.changing = _changing(state)
        self.unmeasured = NOTHING_MINED | ({"grad_norm": None} if state.config.optim.clip_norm else {})
        self.pending: list[tuple[int, StepResult]] = []
        self.observed: list[tuple[dict[str, int], Tensor]] = []  # of the same steps, for the ledger
        self.epochs = sum(cycle.epochs for cycle in state.config.schedule.cycles)
        self.current = ""  # the epoch of the newest step, for people: counted from 1
        self.newest: dict[str, float] = {}  # loss and PMR of the last row, for the progress line
        self.chosen: dict[str, Any] | None = None  # the newest choice of a cascade
        self.newest_random = False  # whether that loss was computed with random vectors in the queue
        self.clips_per_step = 2 * state.config.data.batch_size * state.world.size
        self.epoch_began = time.perf_counter()
        self._restart_clock()

    @property
    def loss_chance(self) -> float | None:
        """See `chance_loss`; it depends on the number of mined entries, which may be chosen anew in every epoch."""
        return chance_loss(self.state.config, self.state.cycle, self.state.memory.size, self.state.mined_count)

    def step(self, step: int, epoch: int, rates: Rates, data_wait_s: float, result: StepResult) -> None:
        """Records a step, and every `run.log_every` steps writes a row, with times averaged over these steps."""
        self.pending.append((step, result))
        if self.ledger is not None:
            self.observed.append(({"step": step, "epoch": epoch, "cycle": self.common["cycle"]}, observe(result)))
        self.current = f"epoch {epoch + 1} of {self.epochs}"
        self.data_wait_s += data_wait_s
        self.steps += 1
        if (step + 1) % self.state.config.run.log_every:
            return
        loss, measured = self.check()
        wall_s, wait_s = (time.perf_counter() - self.clock_began) / self.steps, self.data_wait_s / self.steps
        self._restart_clock()
        row = {"step": step, "epoch": epoch, **self.common, "loss": loss}
        row |= {name: getattr(rates, name) for name in self.changing} | self.unmeasured | measured
        times = {"step_time_s": wall_s - wait_s, "data_wait_s": wait_s, "clips_per_s": self.clips_per_step / wall_s}
        self._write({"kind": "step", **row, **times})
        shown = (("loss", loss), ("pmr", measured.get("pmr")))
        self.newest = {name: value for name, value in shown if value is not None}
        self.newest_random = self._random_negatives(1) > 0

    def status(self) -> str:
        """Returns the epoch, loss and PMR of the last logged step, and the filled share of the memory, for the progress
        line. Does not read from the device.

        While a queue still holds the random vectors that it began with, the loss is near 0 even if nothing is learnt,
        because they are easy negatives; it is then not compared with chance.
        """
        memory = self.state.memory
        chance = "" if self.loss_chance is None else f" (chance {self.loss_chance:.3f})"
        if self.newest_random:
            chance = " (low while the queue holds random vectors)"
        shown = [f"step PMR {percent(value)}" if name == "pmr" else f"step loss {value:.3f}{chance}"
                 for name, value in self.newest.items() if math.isfinite(value)]  # fmt: skip
        return ", ".join(
            [*filter(None, [self.current]), *shown, f"memory {min(1, memory.count / memory.size):.0%} full"]
        )

    def check(self) -> tuple[float, dict[str, float]]:
        """Returns the loss of the newest step, its mining rates, and the norm of its gradient if that is limited.

        This is a sync point, the only one of a training step: all values are copied from the device at once. The rows
        of the ledger are written here, too, also of a step that is not finite.

        Raises:
            NonFiniteError: features or loss of any step since the last call are NaN or infinite.
        """
        if not self.pending:
            return float("nan"), {}
        newest = self.pending[-1][1]
        measured = newest.rates if newest.grad_norm is None else {"grad_norm": newest.grad_norm, **newest.rates}
        flags = [result.finite.float() for _, result in self.pending]
        numbers = torch.stack([newest.loss, *measured.values(), *flags]).double().view(torch.int64)  # exact
        observed = [tensor for _, tensor in self.observed]
        copied = torch.cat([numbers, *observed]).cpu().numpy()
        values = copied[: len(numbers)].view("float64").tolist()
        loss, found, flags = values[0], values[1 : -len(flags)], values[-len(flags) :]
        self._write_ledger(copied[len(numbers) :], len(newest.video))
        for (step, result), finite in zip(self.pending, flags, strict=True):
            if not finite:
                raise NonFiniteError(self._of_not_finite(step, result))
        self.pending.clear()
        return loss, dict(zip(measured, found, strict=True))

    def _write_ledger(self, values: np.ndarray, clips: int) -> None:
        """Writes the rows of the steps since the last call to the ledger: `values` are those of `observe`, one step
        after the other, `clips` are R*B."""
        if self.ledger is None:
            return
        for at, tensor in self.observed:
            self.ledger.write(step_row(values[: len(tensor)], clips, **at))
            values = values[len(tensor) :]
        self.observed.clear()

    def _of_not_finite(self, step: int, result: StepResult) -> str:
        """Returns the message of a NonFiniteError. The first process also writes the step to a file."""
        paths = [str(self.index[i].path) for i in result.video.tolist()]
        bad = {name: int((~f.isfinite()).any(2).any(0).sum()) for name, f in
               (("queries", result.queries), ("keys", result.keys))}  # fmt: skip
        counts = ", ".join(f"{name} of {count} of {counted(len(paths), 'clip')}" for name, count in bad.items())
        return (
            f"step {step + 1}: features or loss are NaN or infinite ({counts}; loss {result.loss.item():.4g}). "
            f"{self._dump(step, result, paths)}Try a lower optim.lr, or optim.precision = 'fp32'. "
            f"Videos of the batch: {', '.join(paths)}"
        )

    def _dump(self, step: int, result: StepResult, paths: list[str]) -> str:
        """Writes the step to a file, and returns a sentence with the name of the file."""
        held = {"encoders": self.state.trained(), "cycle_state": self.state.state_dict()}
        if self.writer is None:
            return ""
        try:
            return f"The step is saved in {dump_step(self.writer.path.parent, self.state, held, step, result, paths)}. "
        except CheckpointError as error:  # a full disk must not hide the reason why the run stopped
            return f"The step could not be saved ({error}). "

    def epoch(self, epoch: int, step: int, skipped: int, result: StepResult) -> None:
        """Writes the rows of an epoch that ends with `step`: loss and mining quality, health and alarms, and, if the
        cycle mines, a few queries of the last step with the entries mined for them."""
        self.check()
        weights = weights_row(self.state, step=step, epoch=epoch, cycle=self.common["cycle"])
        if self.ledger is not None:
            self.ledger.write(weights)
        loss_sum, steps = self.state.loss_sum.tolist()
        quality = NOTHING_MINED | {"cmr_median": None, "cmr_per_class": None}
        if self.state.cycle.mining == "cascade" and steps:
            measured = self.state.quality
            quality = measured.summary() | {
                "cmr_per_class": measured.class_rates().tolist(),
                "right_counts": measured.right.tolist(),
                "right_per_class": measured.right_of_class.tolist(),
            }
        row = {
            "epoch": epoch,
            **self.common,
            "loss": loss_sum / steps if steps else None,
            "loss_chance": self.loss_chance,
            "learning_steps": int(steps),
            "random_negatives": self._random_negatives(int(steps)),
            "weights_change": self.state.weights_change(),
            **quality,
        }
        epoch_time_s = time.perf_counter() - self.epoch_began
        self._write({"kind": "epoch", **row, "epoch_time_s": epoch_time_s, "skipped": skipped})
        self._health(epoch, step)
        if result.mined_video is not None:
            for query in range(min(MINED_QUERIES, len(result.video))):
                self._write({"kind": "mined", "epoch": epoch, **self.common, **self._mined(result, query)})
        self.epoch_began = time.perf_counter()
        self._restart_clock()

    def _random_negatives(self, steps: int) -> float:
        """Returns the share of the queue that held random vectors at the start of an epoch that has just ended after
        `steps` learning steps."""
        memory = self.state.memory
        keys = memory.count - steps * self.clips_per_step // 2  # one key per video
        return max(0.0, 1 - keys / memory.size) if memory.starts_random else 0.0

    def _health(self, epoch: int, step: int) -> None:
        health = self.state.health
        row, common = health.summary(step), {"epoch": epoch, "step": step, **self.common}
        self._write({"kind": "health", **common, **row})
        for text in health.alarms(row, self.state.config.health):
            self._write({"kind": "alarm", **common, "text": text})
            if self.writer is not None:
                log.warning("epoch %d of %d: %s", epoch + 1, self.epochs, text)

    def cascade(self, epoch: int, step: int, choice: Choice) -> str | None:
        """Writes the cascade that was chosen before a step, with the criteria that it was chosen by. Returns the reason
        in one sentence, None if the cascade is the one before."""
        names = self.state.views[:2]
        chosen = {"order": [names[view] for view in choice.views], "ratio": choice.ratio, "top_k": choice.top_k}
        judged = [{**row, "views": [names[view] for view in row["views"]]} for row in choice.judged]
        text = choice.reason(names)
        row = {"epoch": epoch, "step": step, **self.common, **chosen, "keep": choice.keep, "text": text}
        self._write({"kind": "cascade", **row, "criteria": choice.criteria, "judged": judged})
        before, self.chosen = self.chosen, chosen
        return None if chosen == before else text

    def online(self, epoch: int, step: int, measured: dict[str, Any], best: bool) -> None:
        """Writes what was measured after an epoch to choose the best checkpoint. Its time does not count for the next
        epoch."""
        self._write({"kind": "online", "epoch": epoch, "step": step, **self.common, **measured, "best": best})
        self.epoch_began = time.perf_counter()
        self._restart_clock()

    @contextlib.contextmanager
    def untimed(self) -> Iterator[None]:
        """Leaves the seconds that a block takes out of the times of the present steps and of the epoch.

        Waits for the device first: the work of earlier steps that is still queued belongs to their times.
        """
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        self.clock_began += seconds
        self.epoch_began += seconds

    def _restart_clock(self) -> None:
        self.clock_began, self.data_wait_s, self.steps = time.perf_counter(), 0.0, 0

    def _mined(self, result: StepResult, query: int) -> dict[str, Any]:
        label = self.index.labels[int(result.video[query])]
        pairs = zip(result.mined_video[query].tolist(), result.mined_start[query].tolist(), strict=True)
        return {
            "query": {"video": int(result.video[query]), "start": int(result.start[query])},
            "mined": [
                {"video": video, "start": start, "correct": bool(label >= 0 and self.index.labels[video] == label)}
                for video, start in pairs
                if video >= 0
            ],
        }

    def _write(self, row: dict[str, Any]) -> None:
        if self.writer is not None:
            self.writer.write(row)


def _changing(state: CycleState) -> list[str]:
    """Returns the names of the values in the row of a step that the schedules of a cycle set: the learning rate, and
    the others if they change within the cycle."""
    names = ["lr"]
    if state.cycle.applied_to(state.config.optim).final_weight_decay is not None:
        names.append("weight_decay")
    moving = state.encoders.momentum is not None  # the keys are those of a moving average
    if moving and state.cycle.applied_to(state.config.memory).final_ema_momentum is not None:
        names.append("ema_momentum")
    return names
