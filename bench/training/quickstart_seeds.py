"""Runs the quick start with several training seeds and compares it with what it promises.

    python bench/training/quickstart_seeds.py WORK [--seeds 0 1 …] [--variant portable] [--threads 1]
    python bench/training/quickstart_seeds.py --table

The seeds share the videos and the flow in WORK/data, and each has a run folder of its own. A finished run appends a
row to bench/results/quickstart.json. A row of the same seed, settings, instruction set and number of threads is never
run again or replaced; rows of other settings stay. The row holds what `cpr-fast quickstart --seed S` returns, the
retrieval of the start (the checkpoint before the first cascade cycle), the mining quality, and the untrained network
of the same seed beside the one of seed 0, which the quick start shows.
"""

import argparse
import dataclasses
import fcntl
import hashlib
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from evidence.settings import without_later_settings
from measure import RESULTS, cpu_variants, force_variant, world, write_result

from cpr_fast.config import Config
from cpr_fast.evaluate.retrieval.retrieve import retrieve
from cpr_fast.experiments import quickstart as module
from cpr_fast.runtime.metrics import read_metrics

NAME = "quickstart.json"
KEPT = ("name", "view", "r@1", "r@1_ci95", "r@5", "r@10", "map", "map_ci95", "queries", "gallery", "chance_r@1")
PIXELS = ("single_frame", "mean_colour", "mean_flow")
IDENTITY = ("seed", "settings", "variant", "threads")


def settings() -> dict[str, Any]:
    """Returns what identifies the settings of a row: the videos, and the digest of quickstart.toml without comments.

    Settings that the config has got since do not change the digest, as long as they have their defaults.
    """
    config = without_later_settings(module.quickstart_config(Path("index.csv"), Path("run"), 0).to_dict())
    return {**module.VIDEOS, "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]}


def start_cycles(config: Config) -> int:
    """Returns the number of cycles before the first one that mines."""
    return next(i for i, cycle in enumerate(config.schedule.cycles) if cycle.mining != "none")


def kept(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: row[key] for key in KEPT if key in row} for row in results]


def run_seed(work: Path, name: str, seed: int) -> dict[str, Any]:
    """Runs the quick start of one seed, and returns its measures."""
    out, data = work / f"{name}-seed-{seed}", work / "data"
    out.mkdir(parents=True, exist_ok=True)
    data.mkdir(exist_ok=True)
    if not (out / "data").is_symlink():
        (out / "data").symlink_to(data.resolve(), target_is_directory=True)
    original = module.quickstart_config
    epochs = sum(cycle.epochs for cycle in original(Path(), out, seed).schedule.cycles)

    def config(index: Path, run: Path, seed: int) -> Config:
        """Keeps the checkpoint of every epoch, of which the start is one; nothing that is computed depends on it."""
        plain = original(index, run, seed)
        return dataclasses.replace(plain, run=dataclasses.replace(plain.run, keep_checkpoints=epochs))

    with mock.patch.object(module, "quickstart_config", config):
        found = module.quickstart(out, seed=seed)
    cycles = original(Path(), out, seed).schedule.cycles
    before = sum(cycle.epochs for cycle in cycles[: start_cycles(original(Path(), out, seed))])
    start = sorted((out / "checkpoints").glob("step-*.pt"))[before - 1]
    index = out / "data" / "index.csv"
    own = retrieve(start, index, untrained_seed=seed)["results"]
    return {
        "seed": seed,
        "results": kept(found["results"]),
        "start": kept([row for row in own if row["name"] == "trained"]),
        "untrained_of_seed": kept([row for row in own if row["name"] == "untrained"]),
        "mining": mining(out),
        **{key: value for key, value in found.items() if key.endswith(("_time_s", "_cpu_s"))},
    }


def mining(run: Path) -> list[dict[str, Any]]:
    """Returns PMR of the first and of the last epoch of every cascade cycle."""
    epochs = [row for row in read_metrics(run) if row["kind"] == "epoch" and row["mining"] == "cascade"]
    found = []
    for cycle in sorted({row["cycle"] for row in epochs}):
        own = [row for row in epochs if row["cycle"] == cycle]
        found.append({"view": own[0]["view"], "pmr_first": own[0]["pmr"], "pmr_last": own[-1]["pmr"]})
    return found


def value(rows: list[dict[str, Any]], name: str, view: str, key: str) -> float:
    return next(row[key] for row in rows if (row["name"], row["view"]) == (name, view))


def measures(row: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of a row that the promises are about; all of two streams but the pixel baselines."""
    results = row["results"]
    return {
        "r@1": value(results, "trained", "two_stream", "r@1"),
        "map": value(results, "trained", "two_stream", "map"),
        "start_r@1": value(row["start"], "trained", "two_stream", "r@1"),
        "start_map": value(row["start"], "trained", "two_stream", "map"),
        "untrained": value(results, "untrained", "two_stream", "r@1"),
        "untrained_of_seed": value(row["untrained_of_seed"], "untrained", "two_stream", "r@1"),
        "pixels": max(each["r@1"] for each in results if each["name"] in PIXELS),
    }


def kept_promises(found: dict[str, float]) -> dict[str, bool]:
    return {
        "1.5 x best pixel baseline": found["r@1"] >= 1.5 * found["pixels"],
        "2 x untrained": found["r@1"] >= 2 * found["untrained"],
        "2 x untrained of the same seed": found["r@1"] >= 2 * found["untrained_of_seed"],
        "mAP above the start": found["map"] > found["start_map"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the table of the seeds, their means, and how many seeds keep each promise, as Markdown."""
    columns = {
        "R@1": "r@1", "mAP": "map", "start R@1": "start_r@1", "start mAP": "start_map", "untrained R@1": "untrained",
        "untrained, same seed": "untrained_of_seed", "best pixel baseline R@1": "pixels",
    }  # fmt: skip
    found = [measures(row) for row in rows]
    lines = ["| seed | " + " | ".join(columns) + " | pretraining, CPU s |", "|---|" + "---|" * (len(columns) + 1)]
    for row, each in zip(rows, found, strict=True):
        cells = " | ".join(f"{each[key]:.3f}" for key in columns.values())
        lines.append(f"| {row['seed']} | {cells} | {row['pretrain_cpu_s']:.0f} |")
    if len(found) > 1:
        means = [(statistics.mean(each[key] for each in found), [each[key] for each in found])
                 for key in columns.values()]  # fmt: skip
        cells = " | ".join(f"{mean:.3f} ± {statistics.stdev(own) / len(own) ** 0.5:.3f}" for mean, own in means)
        lines.append(f"| mean ± standard error | {cells} | |")
    lines.append("")
    for name in kept_promises(found[0]):
        lines.append(f"{name}: {sum(kept_promises(each)[name] for each in found)} of {len(found)} seeds")
    return "\n".join(lines)


def is_of(row: dict[str, Any], identity: dict[str, Any]) -> bool:
    return all(row.get(key) == wanted for key, wanted in identity.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=Path("runs/quickstart_seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--variant", default=cpu_variants()[0], choices=cpu_variants(), help="of the CPU kernels")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: as the quick start")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of quickstart.json")
    parser.add_argument("--table", action="store_true", help="only print the table of the existing rows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    identity = {"settings": settings(), "variant": args.variant, "threads": args.threads}
    if not args.table:
        force_variant(args.variant)
        for seed in args.seeds:
            if not any(is_of(row, {**identity, "seed": seed}) for row in stored(args.results)):
                about = world("cpu")
                row = run_seed(args.work, f"{args.variant}-{args.threads}", seed)
                append({**row, **identity, **about}, args.results)
    print(table([row for row in stored(args.results) if is_of(row, identity)]))


def append(row: dict[str, Any], folder: Path) -> None:
    """Adds a row to quickstart.json, which several processes may do at the same time, if no other has added it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        rows = stored(folder)
        if not any(is_of(each, {key: row[key] for key in IDENTITY}) for each in rows):
            write_result(NAME, json.dumps([*rows, row], indent=1) + "\n", folder)
    finally:
        os.close(handle)


def stored(folder: Path) -> list[dict[str, Any]]:
    path = folder / NAME
    return json.loads(path.read_text()) if path.exists() else []


if __name__ == "__main__":
    main()
