"""Calls operators with three threads while every core has a competing process, and prints what came out, as JSON.

    python on_busy_machine.py

It is a process of its own, because threads stay, and one that used torch's threads cannot use them after a fork.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import torch

from cpr_fast.mining.stages import stage_keep, stage_views
from cpr_fast.ops import cascade_select, mil_nce

THREADS, CALLERS = 3, 4
QUERIES, ENTRIES, WIDTH = 67, 20_001, 48  # a call takes longer than it takes until a helper gets a core


def helpers() -> int:
    """Returns the number of this process's threads that serve the operators."""
    return sum(task.read_text().strip() == "cpr_fast" for task in Path("/proc/self/task").glob("*/comm"))


def results(queries: torch.Tensor, memory: torch.Tensor, positives: torch.Tensor) -> list[torch.Tensor]:
    """Returns what a selection, a loss and its gradient give."""
    query = queries[0].clone().requires_grad_()
    loss = mil_nce(query, queries[1], memory[0], positives)
    selected = cascade_select(queries, memory, stage_views(5), stage_keep(5, ENTRIES, 0.5, 5))
    return [*selected, loss.detach(), *torch.autograd.grad(loss.sum(), query)]


def alike() -> bool:
    """Returns whether three threads give the bits of one."""
    torch.set_num_threads(1)  # torch's own threads do not work after a fork
    random = torch.Generator().manual_seed(0)
    queries, memory = (torch.randn(2, size, WIDTH, generator=random) for size in (QUERIES, ENTRIES))
    inputs = queries, memory, torch.randint(ENTRIES, (QUERIES, 5), generator=random)
    expected = results(*inputs)
    torch.set_num_threads(THREADS)
    found = [results(*inputs) for _ in range(12)]
    return all(torch.equal(x, y) for one in found for x, y in zip(one, expected, strict=True))


def in_forked_process() -> list[bool]:
    """Returns what a forked process found: whether results are alike there, and whether it has helpers of its own."""
    receiver, sender = os.pipe()
    if not os.fork():
        signal.alarm(60)  # ends it if it hangs
        try:
            os.write(sender, json.dumps([alike(), helpers() == THREADS - 1]).encode())
        finally:
            os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as answer:
        return json.loads(answer.read() or "null")


def from_several_threads() -> list[bool]:
    found: list[bool] = []
    callers = [threading.Thread(target=lambda: found.append(alike())) for _ in range(CALLERS)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return found


def main() -> None:
    report: dict[str, object] = {"alike": alike(), "helpers": helpers(), "forked": in_forked_process()}
    report["callers"] = from_several_threads()
    print(json.dumps(report))


if __name__ == "__main__":
    main()
