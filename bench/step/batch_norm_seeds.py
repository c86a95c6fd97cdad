"""Measures what the rounding of BatchNorm on the CPU is worth in training: does the spread of the seeds shrink?

    python bench/step/batch_norm_seeds.py WORK [--seeds 0 1 …] [--variants avx2 avx512]
    python bench/step/batch_norm_seeds.py --table

The first cycle of the quick start, InfoNCE on RGB for 16 epochs, is trained with our BatchNorm and with torch's, whose
sums for channels that are last in memory are less accurate (bench/results/batch_norm.md), for each seed and each
instruction set. A run is measured by its retrieval of the test split in mAP. Two numbers of each form are compared:

- the standard deviation over the seeds, whose runs differ in everything that is drawn;
- the root mean square difference of the same seed between the two instruction sets, whose runs differ in rounding only.

A number is said to shrink if the 95 % interval of the ratio ours / torch's (bootstrap over the seeds, 10,000 draws)
lies below 1. This was written before any run. Finished rows are appended to bench/results/batch_norm_seeds.json and
are not run again. WORK holds videos and flow of a quick start in WORK/data (they are made if they are missing).
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import AVX2, RESULTS, world, write_result
from page import markdown_table

from cpr_fast.data.flow.write import write_flow
from cpr_fast.data.synthetic.videos import write_synthetic
from cpr_fast.evaluate.retrieval.retrieve import retrieve
from cpr_fast.experiments.quickstart import VIDEOS, quickstart_config
from cpr_fast.pretrain.run.loop import pretrain

NAME = "batch_norm_seeds"
FORMS = ("cpr_fast", "torch")
VARIANTS = {"avx2": AVX2, "avx512": {}}
DRAWS = 10_000


def run(work: Path, seed: int, form: str) -> dict:
    """Trains and measures one seed in this process, and returns its measures."""
    index = work / "data" / "index.csv"
    out = work / f"run-{os.getpid()}"
    config = quickstart_config(index, out, seed)
    config = dataclasses.replace(
        config, schedule=dataclasses.replace(config.schedule, cycles=config.schedule.cycles[:1])
    )
    without = mock.patch("cpr_fast.ops.batch_norm._has_kernel", lambda *_: False)
    try:
        with without if form == "torch" else nullcontext():
            pretrain(config, progress=False)
        results = retrieve(out / "checkpoints" / "last.pt", index)["results"]
    finally:
        shutil.rmtree(out, ignore_errors=True)
    found = next(row for row in results if row["name"] == "trained")
    return {"map": found["map"], "r@1": found["r@1"]}


def rows_of(folder: Path) -> list[dict]:
    path = folder / f"{NAME}.json"
    return json.loads(path.read_text()) if path.exists() else []


def averages(rows: list[dict], form: str, seeds: list[int]) -> np.ndarray:
    """Returns mAP [variants, seeds] in percent."""
    value = {(row["seed"], row["variant"]): 100 * row["map"] for row in rows if row["form"] == form}
    return np.array([[value[seed, variant] for seed in seeds] for variant in VARIANTS])


def spreads(values: np.ndarray) -> tuple[float, float]:
    """Returns the standard deviation over seeds, and the root mean square difference between the instruction sets."""
    over_seeds = np.sqrt(values.var(axis=1, ddof=1).mean())
    return float(over_seeds), float(np.sqrt(((values[0] - values[1]) ** 2).mean()))


def table(rows: list[dict]) -> str:
    """Returns the page of results of the seeds that have all rows."""
    complete = {(row["seed"], row["variant"], row["form"]) for row in rows}
    seeds = sorted(
        seed
        for seed in {row["seed"] for row in rows}
        if all((seed, variant, form) in complete for variant in VARIANTS for form in FORMS)
    )
    ours, theirs = (averages(rows, form, seeds) for form in FORMS)
    random = np.random.default_rng(0)
    draws = [random.integers(len(seeds), size=len(seeds)) for _ in range(DRAWS)]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.array([np.divide(spreads(ours[:, d]), spreads(theirs[:, d])) for d in draws])
    lines = [["spread of mAP, points", "cpr_fast", "torch", "ratio", "95 %", "shrinks"]]
    for i, name in enumerate(("standard deviation over seeds", "between instruction sets, same seed")):
        low, high = np.nanquantile(ratios[:, i], [0.025, 0.975])
        a, b = spreads(ours)[i], spreads(theirs)[i]
        lines.append(
            [name, f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}", f"{low:.2f}-{high:.2f}", "yes" if high < 1 else "no"]
        )
    each = [["seed", *(f"{form}, {variant}" for form in FORMS for variant in VARIANTS)]]
    for column, seed in enumerate(seeds):
        each.append(
            [str(seed), *(f"{values[k, column]:.1f}" for values in (ours, theirs) for k in range(len(VARIANTS)))]
        )
    about = rows[-1]
    return "\n".join([
        "# What the rounding of BatchNorm is worth in training",
        "",
        "The first cycle of the quick start (InfoNCE on RGB, 16 epochs) with our BatchNorm and that of torch on "
        "channels",
        f"that are last in memory; mAP of the test split in percent, means {ours.mean():.1f} and {theirs.mean():.1f}.",
        f"`python bench/step/batch_norm_seeds.py WORK`, {about['device']}, torch {about['torch']}, one thread. The",
        "rule is stated in the script, which was committed before the runs.",
        "",
        markdown_table(lines[0], lines[1:]),
        "",
        markdown_table(each[0], each[1:]),
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=Path("runs/batch_norm_seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only write the page of the existing rows")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # seed and form, in a process of its own
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args.work, int(args.one[0]), args.one[1])))
        return
    if not args.table:
        index = args.work / "data" / "index.csv"
        if not index.exists():
            write_flow(write_synthetic(index.parent, **VIDEOS), index.parent / "flow")
        for seed, variant, form in ((s, v, f) for s in args.seeds for v in args.variants for f in FORMS):
            key = {"seed": seed, "variant": variant, "form": form}
            if any(key.items() <= row.items() for row in rows_of(args.results)):
                continue
            command = [sys.executable, __file__, str(args.work), "--one", str(seed), form]
            done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1", **VARIANTS[variant]}, check=True,
                                  stdout=subprocess.PIPE, text=True)  # fmt: skip
            row = key | json.loads(done.stdout.splitlines()[-1]) | world("cpu")
            print(json.dumps(row), flush=True)
            write_result(f"{NAME}.json", json.dumps([*rows_of(args.results), row], indent=1) + "\n", args.results)
    write_result(f"{NAME}.md", table(rows_of(args.results)), args.results)


if __name__ == "__main__":
    main()
