"""Reports the rank that a run waits for, and what that rank is doing, long before the process group times out.

While a collective operation waits for one rank, all other ranks appear to hang, too. Therefore every rank counts the
operations that it starts. All ranks start the same operations in the same order, so the rank with the lowest count is
the one that the others wait for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from cpr_fast.runtime.distributed import World

BEATS = 5  # number of reports of each rank per timeout

log = logging.getLogger(__name__)


class Watchdog:
    """A thread in every rank that publishes what the main thread is doing, and reads what the other ranks publish.

    Args:
        world: This process among the processes of the run.
        timeout_s: Number of seconds after which a rank that starts no operation is reported; 0 turns the watchdog off.
        note: Called with the text of each report, which is also logged.
    """

    def __init__(self, world: World, timeout_s: float, note: Callable[[str], None] = lambda text: None) -> None:
        self.world, self.timeout_s, self.note = world, timeout_s, note
        self._main = threading.get_ident()
        self._begun, self._what, self._since = 0, "starting", time.monotonic()
        self._heard: dict[int, tuple[int | None, float]] = {}  # rank -> its last beat, and when it changed
        self._named: tuple[int, ...] = ()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cpr-fast-watchdog", daemon=True)

    def doing(self, what: str) -> None:
        """Records that the main thread starts an operation, such as "waiting for the batch of step 7"."""
        self._begun, self._what, self._since = self._begun + 1, what, time.monotonic()

    def getting_on(self) -> None:
        """Records progress within an operation. It is not counted: the number of its parts may differ between ranks."""
        self._since = time.monotonic()

    def __enter__(self) -> Watchdog:
        if self.timeout_s > 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self.timeout_s)

    def _watch(self) -> None:
        store = None
        if self.world.store is not None:
            # The watchdog uses a separate connection, because the process group may hold the lock of its connection
            # while it waits.
            store = dist.PrefixStore("watchdog", self.world.store.clone())
        beat = 0
        while not self._over.wait(self.timeout_s / BEATS):
            beat += 1
            try:
                self._say(self._share(store, beat))
            except RuntimeError:  # the store is closed, because the run ends
                return
        if store is not None:
            with contextlib.suppress(RuntimeError):
                store.set(str(self.world.rank), json.dumps({"left": True}))

    def _share(self, store: dist.Store | None, beat: int) -> list[dict[str, Any]]:
        """Publishes the state of this rank and returns the latest state of every rank."""
        idle_s = time.monotonic() - self._since
        mine = {"beat": beat, "begun": self._begun, "what": self._what, "idle_s": idle_s, "where": self._where()}
        if store is None:
            return [mine]
        store.set(str(self.world.rank), json.dumps(mine))
        keys = [str(rank) for rank in range(self.world.size)]
        return [json.loads(store.get(key)) if store.check([key]) else {"beat": 0} for key in keys]

    def _where(self) -> str:
        """Returns the file, line and function that the main thread is executing."""
        frame = sys._current_frames().get(self._main)
        return (
            "" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}, {frame.f_code.co_name}"
        )

    def _say(self, states: list[dict[str, Any]]) -> None:
        """Reports the ranks that are behind. Only the first rank that is not behind reports, and only once."""
        now = time.monotonic()
        for rank, state in enumerate(states):
            if rank not in self._heard or self._heard[rank][0] != state.get("beat") or "left" in state:
                self._heard[rank] = (state.get("beat"), now)
        silent = {rank: now - at for rank, (_, at) in self._heard.items() if now - at > self.timeout_s}
        behind = min((state["begun"] for state in states if "begun" in state), default=0)
        stalled = [
            rank
            for rank, state in enumerate(states)
            if rank in silent or (state.get("begun") == behind and state["idle_s"] > self.timeout_s)
        ]
        speaker = next((rank for rank in range(len(states)) if rank not in stalled), 0)
        if stalled and tuple(stalled) != self._named and speaker == self.world.rank:
            for rank in stalled:
                text = _sentence(rank, states[rank], silent.get(rank))
                log.warning("%s", text)
                self.note(text)
        self._named = tuple(stalled)


def _sentence(rank: int, state: dict[str, Any], silent_s: float | None) -> str:
    doing = f"{state['what']} (in {state['where']})" if "what" in state else "starting"
    if silent_s is not None:
        return f"rank {rank} has not reported for {silent_s:.1f} s; it was {doing}"
    return f"rank {rank} has been {doing} for {state['idle_s']:.1f} s, and the run waits for it"
