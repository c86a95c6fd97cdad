"""Measures pretraining on stores of features: samples per second on two cores, and the time and memory of an epoch.

    python bench/step/feature_training.py [--clips 100000] [--large 1000000] [--epochs 2] [--folder DIR]

A sample is the step of one clip in one view: the forward passes of its query and its key, its loss, and the backward
pass; in a cascade also the forward pass of the key in the other view and the mining. The rates are those of whole
epochs, which include reading, logging and checkpoints, at D = 768 with a queue of 2,048 and a head of two linear layers
to 128 dimensions, for batches of 512 and 1,024. The large stores have D = 1,024; the smaller one of the two shows which
part of the memory depends on the size of the store. Every run is `cpr-fast pretrain` in a process of its own, on two
cores; its peak memory is that of the process, with the pages of files that it maps.

Writes bench/results/feature_training.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import RESULTS, ROOT, world, write_result

from cpr_fast.data.features.clips import Clip
from cpr_fast.data.features.store import Description
from cpr_fast.data.features.write import Computed, planned_shards, write_store
from cpr_fast.runtime.metrics import read_metrics

CLASSES, SAMPLES, CORES = 400, 2, 2
METHODS = {  # name -> mining, number of stages
    "InfoNCE": ("none", 1),
    "UberNCE": ("label", 1),
    "CoCLR": ("cascade", 1),
    "CPR": ("cascade", 7),
}
CONFIG = """
[data]
features = "{store}"
batch_size = {batch}
[memory]
size = 2048
[mining]
stages = {stages}
[optim]
precision = "{precision}"
[run]
out = "{out}"
device = "cpu"
log_every = 10
[[schedule.cycles]]
view = "rgb"
epochs = {epochs}
mining = "{mining}"
"""


def make_store(folder: Path, clips: int, width: int) -> None:
    """Writes a store of two views: class centres and noise, of which one block is used again with other signs."""
    random = np.random.default_rng(0)
    centres = {view: random.standard_normal((CLASSES, 1, width), np.float32) for view in ("rgb", "flow")}
    noise = random.standard_normal((4096, SAMPLES, width), np.float32)
    rows = [Clip(f"clip{i}", f"class{i % CLASSES}") for i in range(clips)]

    def compute(positions: range) -> Computed:
        numbers = np.array(positions)
        signs = np.random.default_rng(positions.start).choice(np.float32([-2, 2]), (len(numbers), 1, width))
        spread = noise[: len(numbers)] * signs
        return Computed(numbers, {v: of[numbers % CLASSES] + spread for v, of in centres.items()})

    about = Description({"rgb": width, "flow": width}, SAMPLES, False, "float16", {}, f"{clips} {width}",
                        planned_shards(clips, 4096))  # fmt: skip
    write_store(folder, rows, about, compute)


def train(store: Path, clips: int, method: str, batch: int, epochs: int, precision: str) -> dict:
    """Runs `cpr-fast pretrain` on the store; returns the measures of its last epoch and the peak memory."""
    mining, stages = METHODS[method]
    out = store.parent / "run"
    shutil.rmtree(out, ignore_errors=True)
    recipe = store.parent / "recipe.toml"
    recipe.write_text(CONFIG.format(store=store, batch=batch, stages=stages, out=out, epochs=epochs, mining=mining,
                                    precision=precision))  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(CORES)}
    process = subprocess.Popen([sys.executable, "-m", "cpr_fast", "pretrain", str(recipe), "--json"],
                               env=environment, stdout=subprocess.DEVNULL, preexec_fn=_two_cores)  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"pretrain ended with exit code {process.returncode}")
    rows = read_metrics(out)
    last = [row for row in rows if row["kind"] == "epoch"][-1]
    steps = [row for row in rows if row["kind"] == "step" and row["epoch"] == last["epoch"]]
    samples = clips // batch * batch
    return {
        "method": method,
        "precision": precision,
        "batch_size": batch,
        "samples_per_epoch": samples,
        "epoch_time_s": last["epoch_time_s"],
        "samples_per_s": samples / last["epoch_time_s"],
        "step_time_s": _median(row["step_time_s"] for row in steps),
        "data_wait_s": _median(row["data_wait_s"] for row in steps),
        "peak_memory_mib": usage.ru_maxrss / 1024,
        "loss": last.get("loss"),
        "pmr": last.get("pmr"),
    }


def _median(seconds: Iterable[float]) -> float | None:
    """Returns the median, or None for an epoch of fewer steps than are logged at once."""
    found = list(seconds)
    return statistics.median(found) if found else None


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.2f}"


def _two_cores() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])


def measure(clips: int, large: int, epochs: int, folder: Path) -> list[dict]:
    """Returns the rows of all runs."""
    rows = []
    small = [(method, batch, "fp32") for method in METHODS for batch in (512, 1024)]
    small += [(method, 1024, "bf16") for method in METHODS]
    plan = [(clips, 768, small)]
    plan += [(count, 1024, [(method, 1024, "fp32") for method in ("InfoNCE", "CPR")]) for count in (large // 4, large)]
    for count, width, runs in plan:
        store = folder / f"store-{count}-{width}"
        make_store(store, count, width)
        size = sum(path.stat().st_size for path in store.iterdir()) / 2**20
        for method, batch, precision in runs:
            row = train(store, count, method, batch, epochs if width == 768 else 1, precision)
            rows.append({"clips": count, "width": width, "store_mib": size, **row})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        shutil.rmtree(store)
    return rows


def page(report: dict) -> str:
    """Returns the rows as a Markdown page."""
    about = report["world"]
    lines = [
        "# Training on features",
        "",
        f"{about['device']}, {CORES} cores, torch {about['torch']}, commit {about['commit']}; `{about['command']}`.",
        "",
        "A sample is the step of one clip in one view: the forward passes of query and key, the loss and the backward",
        "pass, in a cascade also the key's forward pass in the other view and the mining. The rate is that of a whole",
        f"epoch. Stores hold {SAMPLES} samples of two views in float16; a queue of 2,048, two linear layers to 128",
        "dimensions. CPR has 7 stages. The peak memory is that of the process.",
        "",
        "| clips | D | store MiB | method | precision | batch | samples/s | epoch s | step ms | wait ms | peak MiB |",
        "|---:|---:|---:|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['clips']:,} | {row['width']:,} | {row['store_mib']:,.0f} | {row['method']} | {row['precision']} | "
            f"{row['batch_size']:,} | {row['samples_per_s']:,.0f} | {row['epoch_time_s']:.1f} | "
            f"{_ms(row['step_time_s'])} | {_ms(row['data_wait_s'])} | {row['peak_memory_mib']:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=100_000)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=2, help="epochs of the runs at D = 768; the last one is measured")
    parser.add_argument("--folder", type=Path, default=None, help="where the stores are written; they are removed")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = measure(options.clips, options.large, options.epochs, Path(folder))
    report = {"world": world("cpu"), "cores": CORES, "rows": rows}
    write_result("feature_training.json", json.dumps(report, indent=1) + "\n", options.out)
    write_result("feature_training.md", page(report), options.out)


if __name__ == "__main__":
    main()
