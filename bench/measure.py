"""Interleaved CPU-time measurement and the rows it writes; shared by the two feature-kernel benchmarks."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cpr_fast import _host

SHAPES = [(32, 2048), (32, 16384), (256, 16384)]  # B, K
ROUNDS = 31


def measure_interleaved(calls: dict[str, Callable], shape: dict) -> list[dict]:
    """Process CPU time of each form on one thread, in turn (ABAB...), so that a slow spell of the machine hits all."""
    torch.set_num_threads(1)
    times_ms: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(ROUNDS + 2):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if round_ >= 2:  # the first two warm up
                times_ms[name].append((time.process_time() - start) * 1e3)
    ours = statistics.median(times_ms["cpr_fast"])
    rows = []
    for name, samples in times_ms.items():
        low, median, high = statistics.quantiles(samples, n=4)
        row = {"form": name, "cpu_time_ms": median, "quartiles_ms": [low, high], "fastest_ms": min(samples)}
        row["over_cpr_fast"] = median / ours
        rows.append(shape | row)
        print(json.dumps(rows[-1]))
    return rows


def write_rows(name: str, rows: list[dict]) -> None:
    """One JSON object per line, each with the world it was measured in."""
    root = Path(__file__).resolve().parent.parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    world = {
        "device": cpu_name(),
        "threads": 1,
        "cpu_variant": _host.build_info()["cpu_variants"].split(",")[0],
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "command": f"PYTHONPATH=. python bench/{Path(sys.argv[0]).name}",
    }
    path = root / "bench" / "results" / name
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row | world) + "\n" for row in rows))
    os.replace(temporary, path)


def cpu_name() -> str:
    """The processor's model name and its family and model numbers, which tell generations apart in virtual machines."""
    fields = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if ":" in line
    )
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    return f"{fields.get('model name')} (family {fields.get('cpu family')}, model {fields.get('model')})"
