"""CPU time of TV-L1 flow on a machine that is busy with other work, against the same machine without that work.

    python bench/data/flow_busy_machine.py [--pairs 24] [--rounds 5] [--threads 1 2]

Solves frame pairs of UCF101 videos from $CPR_FAST_SHARED/data/ucf101_100 (default ../shared) in batches of unequal
pairs, as `cpr-fast flow` does, in turn without and with one competing process per CPU (`yes > /dev/null`). It measures
user and system time of the process, which would rise with the load if threads waited actively for each other. Writes
bench/results/flow_busy_machine.json and .md; rows of other commits are kept, to compare with.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from measure import RESULTS, world, write_result
from support import real_clips

from cpr_fast.data.flow.levels import FlowSolver

SIZE = (320, 240)
NAME = "flow_busy_machine"


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


def cpu_s_per_pair(solver: FlowSolver, pairs: np.ndarray) -> tuple[float, float]:
    """Returns CPU seconds (user and system, all threads) and elapsed seconds of a frame pair."""
    cpu, elapsed = time.process_time(), time.perf_counter()
    solver.levels(pairs)
    return (time.process_time() - cpu) / len(pairs), (time.perf_counter() - elapsed) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaving the `with` block ends the competing processes
    cpus = len(os.sched_getaffinity(0))
    pairs = real_clips.read_gray(options.pairs, 2, SIZE).numpy()
    solver = FlowSolver(torch.device("cpu"))
    samples: dict[tuple[int, int], list] = {(threads, load): [] for threads in options.threads for load in (0, cpus)}
    for round_ in range(options.rounds + 1):
        for threads in options.threads:
            torch.set_num_threads(threads)
            for load in (0, cpus):
                with competitors(load):
                    sample = (*cpu_s_per_pair(solver, pairs), os.getloadavg()[0])
                if round_:  # the first one is a warm-up
                    samples[threads, load].append(sample)
    rows = []
    for (threads, load), measured in samples.items():
        cpu, elapsed, others = (statistics.median(column) for column in zip(*measured, strict=True))
        rows.append({"threads": threads, "competitors": load, "cpu_ms_per_pair": round(1e3 * cpu, 2),
                     "elapsed_ms_per_pair": round(1e3 * elapsed, 2), "load_average": round(others, 1)})  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    result = world("cpu") | {
        "cpus": cpus,
        "pairs": options.pairs,
        "rounds": options.rounds,
        "size": "320x240",
        "rows": rows,
    }
    file = RESULTS / f"{NAME}.json"
    earlier = json.loads(file.read_text()) if file.exists() else []
    results = [other for other in earlier if other["commit"] != result["commit"]] + [result]
    write_result(f"{NAME}.json", json.dumps(results, indent=1) + "\n")
    write_result(f"{NAME}.md", table(results))


def table(results: list[dict]) -> str:
    last = results[-1]
    lines = [
        "# CPU time of flow on a busy machine",
        "",
        f"`{last['command']}` on {last['device']}, {last['cpus']} CPUs; medians of {last['rounds']} rounds of "
        f"{last['pairs']} frame pairs of UCF101 at {last['size']}, one after the other without and with one competing "
        "process per CPU. *Ratio*: CPU time with the competitors over CPU time without. *Load*: the machine's load "
        "average, which includes whatever else ran on it: where it exceeds the number of CPUs without competitors, the "
        "machine was not idle, and the ratio is only that of more load to less.",
        "",
        "| commit | threads | competitors | CPU ms a pair | ratio | elapsed ms a pair | load |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        alone = {row["threads"]: row["cpu_ms_per_pair"] for row in result["rows"] if not row["competitors"]}
        lines += [
            f"| {result['commit']} | {row['threads']} | {row['competitors']} | {row['cpu_ms_per_pair']} "
            f"| {row['cpu_ms_per_pair'] / alone[row['threads']]:.2f} | {row['elapsed_ms_per_pair']} "
            f"| {row['load_average']} |"
            for row in result["rows"]
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
