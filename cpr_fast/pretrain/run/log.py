"""The rows that a run writes while it trains, and the one place where a step waits for the device."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch

from cpr_fast.data.index.index import Index
from cpr_fast.pretrain.run.dump import dump_step
from cpr_fast.pretrain.state.cycle import CycleState
from cpr_fast.pretrain.step.result import StepResult
from cpr_fast.runtime.metrics import MetricsWriter

log = logging.getLogger(__name__)

MINED_QUERIES = 6  # queries per epoch kept for the contact sheet
NOTHING_MINED = {"pmr": None, "mining_r1": None}  # rows that did have every rate of `MiningQuality`


class NonFiniteError(ArithmeticError):
    """Features or loss became NaN or infinite; the message names the step and the videos of its batch."""


class StepLog:
    """Writes the rows of one cycle; on processes other than the first (`writer` None) it only checks for NaN."""

    def __init__(self, writer: MetricsWriter | None, state: CycleState, number: int, index: Index) -> None:
        self.writer, self.state, self.index = writer, state, index
        self.common = {"cycle": number, "view": state.cycle.view, "mining": state.cycle.mining}
        self.pending: list[tuple[int, StepResult]] = []
        self.clips_per_step = 2 * state.config.data.batch_size * state.world.size
        self.epoch_began = time.perf_counter()
        self._restart_clock()

    def step(self, step: int, epoch: int, lr: float, data_wait_s: float, result: StepResult) -> None:
        """Notes a step; every `run.log_every` steps writes a row, with times averaged over the steps since the last."""
        self.pending.append((step, result))
        self.data_wait_s += data_wait_s
        self.steps += 1
        if (step + 1) % self.state.config.run.log_every:
            return
        loss, rates = self.check()
        wall_s, wait_s = (time.perf_counter() - self.clock_began) / self.steps, self.data_wait_s / self.steps
        self._restart_clock()
        row = {"step": step, "epoch": epoch, **self.common, "loss": loss, "lr": lr, **NOTHING_MINED, **rates}
        times = {"step_time_s": wall_s - wait_s, "data_wait_s": wait_s, "clips_per_s": self.clips_per_step / wall_s}
        self._write({"kind": "step", **row, **times})

    def check(self) -> tuple[float, dict[str, float]]:
        """Loss and mining rates of the newest step. Raises NonFiniteError if any step since the last call had one.

        This is the one place where a step waits for the device: everything it reads comes over in one copy.
        """
        if not self.pending:
            return float("nan"), {}
        newest = self.pending[-1][1]
        flags = [result.finite.float() for _, result in self.pending]
        values = torch.stack([newest.loss, *newest.rates.values(), *flags]).tolist()
        loss, rates, flags = values[0], values[1 : -len(flags)], values[-len(flags) :]
        for (step, result), finite in zip(self.pending, flags, strict=True):
            if not finite:
                raise NonFiniteError(self._of_not_finite(step, result))
        self.pending.clear()
        return loss, dict(zip(newest.rates, rates, strict=True))

    def _of_not_finite(self, step: int, result: StepResult) -> str:
        """The sentence of a NonFiniteError; the first process also writes the step to a file."""
        paths = [str(self.index[i].path) for i in result.video.tolist()]
        bad = {name: int((~f.isfinite()).any(2).any(0).sum()) for name, f in
               (("queries", result.queries), ("keys", result.keys))}  # fmt: skip
        counts = ", ".join(f"{name} of {count} of {len(paths)} clips" for name, count in bad.items())
        written = ""
        if self.writer is not None:
            written = f"; all of it is in {dump_step(self.writer.path.parent, self.state, step, result, paths)}"
        return (
            f"step {step}: features or loss are NaN or infinite ({counts}; loss {result.loss.item():.4g}){written}; "
            f"videos of its batch: {', '.join(paths)}"
        )

    def epoch(self, epoch: int, step: int, skipped: int, result: StepResult) -> None:
        """Writes the rows of an epoch that ends with `step`: what it learnt and mined, its health and its alarms, and,
        if it mined, a few queries with what its last step mined for them."""
        self.check()
        loss_sum, steps = self.state.loss_sum.tolist()
        quality = NOTHING_MINED | {"cmr_median": None, "cmr_per_class": None}
        if self.state.cycle.mining == "cascade" and steps:
            measured = self.state.quality
            quality = measured.summary() | {
                "cmr_per_class": measured.class_rates().tolist(),
                "right_counts": measured.right.tolist(),
                "right_per_class": measured.right_of_class.tolist(),
            }
        row = {"epoch": epoch, **self.common, "loss": loss_sum / steps if steps else None, **quality}
        epoch_time_s = time.perf_counter() - self.epoch_began
        self._write({"kind": "epoch", **row, "epoch_time_s": epoch_time_s, "skipped": skipped})
        self._health(epoch, step)
        if result.mined_video is not None:
            for query in range(min(MINED_QUERIES, len(result.video))):
                self._write({"kind": "mined", "epoch": epoch, **self.common, **self._mined(result, query)})
        self.epoch_began = time.perf_counter()
        self._restart_clock()

    def _health(self, epoch: int, step: int) -> None:
        health = self.state.health
        row, common = health.summary(step), {"epoch": epoch, "step": step, **self.common}
        self._write({"kind": "health", **common, **row})
        for text in health.alarms(row, self.state.config.health):
            self._write({"kind": "alarm", **common, "text": text})
            if self.writer is not None:
                log.warning("epoch %d: %s", epoch, text)

    def online(self, epoch: int, step: int, measured: dict[str, Any], best: bool) -> None:
        """Writes what retrieval among held-out videos gave after an epoch; the next one is not charged for the time."""
        self._write({"kind": "online", "epoch": epoch, "step": step, **self.common, **measured, "best": best})
        self.epoch_began = time.perf_counter()
        self._restart_clock()

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
