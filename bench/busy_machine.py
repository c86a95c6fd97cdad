"""CPU time of the kernels on a machine that is busy with other work, against the same machine without that work.

    python bench/busy_machine.py [--work flow cascade_select mil_nce] [--rounds 5] [--threads 1 2]

Does each work in turn without and with one competing process per CPU (`yes > /dev/null`), and measures user and system
time of the process, which would rise with the load if threads waited actively for each other. Writes
bench/results/busy_machine.json and .md; rows of other commits are kept, to compare with.

- flow: 24 frame pairs of UCF101 videos from $CPR_FAST_SHARED/data/ucf101_100 (default ../shared) at 320x240, in batches
  of unequal pairs, as `cpr-fast flow` solves them; the time is that of a pair.
- cascade_select: 32 queries, 16,384 entries of 128 dimensions, two views, seven stages.
- mil_nce: 32 queries, 16,384 entries of 128 dimensions, five positives; loss and gradient.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from measure import RESULTS, world, write_result
from page import markdown_table

from cpr_fast.data.flow.levels import FlowSolver
from cpr_fast.mining.stages import stage_keep, stage_views
from cpr_fast.ops import cascade_select, mil_nce

NAME = "busy_machine"
SIZE, PAIRS = (320, 240), 24
QUERIES, ENTRIES, WIDTH, STAGES, CALLS = 32, 16384, 128, 7, 40


@contextmanager
def competitors(count: int) -> Iterator[None]:
    """Runs `count` processes that use a CPU each."""
    running = [subprocess.Popen(["yes"], stdout=subprocess.DEVNULL) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def flow() -> tuple[Callable[[], object], int]:
    """Returns what is measured, and the number of units that a call does; so do the other works."""
    from support import real_clips

    pairs, solver = real_clips.read_gray(PAIRS, 2, SIZE).numpy(), FlowSolver(torch.device("cpu"))
    return lambda: solver.levels(pairs), PAIRS


def selection() -> tuple[Callable[[], object], int]:
    random = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(2, ENTRIES + QUERIES, WIDTH, generator=random), dim=2)
    memory, queries = features.split([ENTRIES, QUERIES], dim=1)
    memory, queries = memory.contiguous(), queries.contiguous()
    views, keep = stage_views(STAGES), stage_keep(STAGES, ENTRIES, 0.5, 5)
    return lambda: [cascade_select(queries, memory, views, keep) for _ in range(CALLS)], CALLS


def loss() -> tuple[Callable[[], object], int]:
    random = torch.Generator().manual_seed(0)
    memory, query, key = (
        torch.nn.functional.normalize(torch.randn(count, WIDTH, generator=random), dim=1)
        for count in (ENTRIES, QUERIES, QUERIES)
    )
    positives = torch.randint(ENTRIES, (QUERIES, 5), generator=random)
    query.requires_grad_()

    def step() -> None:
        for _ in range(CALLS):
            torch.autograd.grad(mil_nce(query, key, memory, positives), query)

    return step, CALLS


WORKS = {"flow": flow, "cascade_select": selection, "mil_nce": loss}


def timed(call: Callable[[], object], units: int) -> tuple[float, float]:
    """Returns CPU seconds (user and system, all threads) and elapsed seconds of a unit."""
    cpu, elapsed = time.process_time(), time.perf_counter()
    call()
    return (time.process_time() - cpu) / units, (time.perf_counter() - elapsed) / units


def measured(name: str, options: argparse.Namespace, cpus: int) -> list[dict]:
    """Returns a row of each number of threads and of competitors for one work."""
    call, units = WORKS[name]()
    samples: dict[tuple[int, int], list] = {(threads, load): [] for threads in options.threads for load in (0, cpus)}
    for round_ in range(options.rounds + 1):
        for threads, load in samples:
            torch.set_num_threads(threads)
            with competitors(load):
                sample = (*timed(call, units), os.getloadavg()[0])
            if round_:  # the first one is a warm-up
                samples[threads, load].append(sample)
    rows = []
    for (threads, load), found in samples.items():
        cpu, elapsed, others = (statistics.median(column) for column in zip(*found, strict=True))
        rows.append({"work": name, "threads": threads, "competitors": load, "cpu_ms": round(1e3 * cpu, 3),
                     "elapsed_ms": round(1e3 * elapsed, 3), "load_average": round(others, 1)})  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaving the `with` block ends the competing processes
    cpus = len(os.sched_getaffinity(0))
    rows = [row for name in options.work for row in measured(name, options, cpus)]
    result = world("cpu") | {"cpus": cpus, "rounds": options.rounds, "size": "320x240", "rows": rows}
    file = RESULTS / f"{NAME}.json"
    earlier = json.loads(file.read_text()) if file.exists() else []
    results = [other for other in earlier if other["commit"] != result["commit"]] + [result]
    write_result(f"{NAME}.json", json.dumps(results, indent=1) + "\n")
    write_result(f"{NAME}.md", table(results))


def table(results: list[dict]) -> str:
    """Returns the page of all results."""
    lines = [
        "# CPU time of the kernels on a busy machine",
        "",
        "`python bench/busy_machine.py` does each work in turn without and with one competing process per CPU; medians",
        "over the rounds, of a frame pair at 320x240 or of a call with 32 queries and 16,384 entries. *Ratio*: CPU",
        "time with the competitors over that without. *Load*: the machine's load average, which includes whatever else",
        "ran there: where it exceeds the number of CPUs without competitors, the machine was not idle, and a ratio is",
        "only that of more load to less. The commits with flow alone were measured by an earlier form of the script.",
        "",
    ]
    header = ["processor", "commit", "work", "threads", "competitors", "CPU ms", "ratio", "elapsed ms", "load"]
    cells = []
    for result in results:
        alone = {(row["work"], row["threads"]): row["cpu_ms"] for row in result["rows"] if not row["competitors"]}
        for row in result["rows"]:
            ratio = row["cpu_ms"] / alone[row["work"], row["threads"]]
            cells.append([result["device"], result["commit"], row["work"], str(row["threads"]),
                          str(row["competitors"]), str(row["cpu_ms"]), f"{ratio:.2f}", str(row["elapsed_ms"]),
                          str(row["load_average"])])  # fmt: skip
    return "\n".join(lines) + "\n" + markdown_table(header, cells)


if __name__ == "__main__":
    main()
