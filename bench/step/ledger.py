"""Measures the size of a run's ledger and its share of the time of a training step.

    python bench/step/ledger.py [--device cpu] [--seconds 20] [--steps 1000]

Every shape is that of a CPR step with a full memory. The time of the ledger is measured apart from that of the step,
because it is smaller than the spread of a step: the digests of the plan, which the thread of the loader computes; what
a step leaves for its row, which it does not wait for; and the row with its chain, written to a file, where the loss is
read. The weights are read once per epoch. Writes ledger.json and .md to $OUT (default bench/results). The exit status
is 1 if 1,000 steps take 1 MB or more, or if the ledger takes .5 % or more of a step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import RESULTS, samples_s, summary, world, write_result
from training_step import VIDEOS, make_batch, start

from cpr_fast.data.clips.loader import plan_digests
from cpr_fast.data.clips.sampling import Sources, plan_pairs
from cpr_fast.pretrain.ledger.chain import Ledger
from cpr_fast.pretrain.ledger.rows import observe, step_row, weights_row
from cpr_fast.pretrain.step.step import train_step

SHAPES = {  # the fewest operations per clip first: the ledger takes its largest share there
    "the quick start: R3D, width 1/8, 32 videos, 8x24x24":
        {"arch": "r3d", "width": 0.125, "batch": 32, "frames": 8, "size": 24},
    "S3D, width 1/4, 32 videos, 8x64x64": {"arch": "s3d", "width": 0.25, "batch": 32, "frames": 8, "size": 64},
    "S3D, width 1, 16 videos, 8x64x64": {"arch": "s3d", "width": 1.0, "batch": 16, "frames": 8, "size": 64},
}  # fmt: skip
MEMORY, EPOCH = 2048, 74  # steps of an epoch of UCF101's 9,537 videos in batches of 128
MOST_BYTES, MOST_SHARE = 1_000_000, 0.005


def calls(options: argparse.Namespace, ledger: Ledger) -> dict[str, Callable]:
    """Returns a step, and the parts of the ledger, by name."""
    state, batch = start(options), make_batch(options)
    seen = train_step(state, batch, 0)
    values, clips = observe(seen).cpu().numpy(), len(seen.video)
    sources = Sources(*(np.full(VIDEOS, value, np.int64) for value in (64, 240, 320)))
    plan = plan_pairs(sources, np.arange(options.batch), state.config.data, 0, 0)
    return {
        "step": lambda: train_step(state, batch, 0),
        "plan": lambda: plan_digests(plan, options.batch),
        "observe": lambda: observe(seen),
        "row": lambda: ledger.write(step_row(values, clips, step=0, epoch=0, cycle=0)),
        "weights": lambda: weights_row(state, step=0, epoch=0, cycle=0),
    }


def measured(options: argparse.Namespace) -> dict:
    """Returns the times of a shape in ms, and the share of the ledger in a step."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(folder)
        parts = calls(options, ledger)
        step = samples_s({"step": parts.pop("step")}, options.device, options.seconds)
        rows = {name: summary(of) for name, of in {**step, **samples_s(parts, options.device, 3)}.items()}
        ledger.close()
    of = {name: row["time_ms"] for name, row in rows.items()}
    share = (of["plan"] + of["observe"] + of["row"] + of["weights"] / EPOCH) / of["step"]
    return {"parts": rows, "share": share}


def size_of(steps: int, clips: int, mined: int) -> int:
    """Returns the bytes of a ledger of this many steps, which mine in all but their first ones."""
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(folder)
        for step in range(steps):
            values = draw.integers(-(2**62), 2**62, 2 + clips + mined)
            values[0] = np.float32(draw.random() * 8).view(np.int32)
            at = {"step": 100_000 + step, "epoch": 1000 + step // EPOCH, "cycle": 3}
            ledger.write(step_row(values, clips, **at))
            if step % EPOCH == EPOCH - 1:
                ledger.write({**at, "weights": f"{step:016x}"})
        ledger.close()
        return ledger.path.stat().st_size


def page(report: dict) -> str:
    lines = [
        "# The ledger of a run", "",
        f"`{report['command']}`, {report['device']}, torch {report['torch']}, commit {report['commit']}; medians, on a "
        f"CPU the time of one thread; memory {MEMORY}, 7 stages.", "",
        f"**{report['bytes'] / 1000:.0f} kB per {report['steps']:,} steps** (epochs of {EPOCH} steps), whatever the "
        "batch, the network and the number of mined entries are.", "",
        "| step | ms | digests of the plan | left for the row | row, written | weights, per epoch | share |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in report["shapes"].items():
        ms = {part: of["time_ms"] for part, of in row["parts"].items()}
        lines.append(
            f"| {name} | {ms['step']:.1f} | {ms['plan']:.3f} | {ms['observe']:.3f} | {ms['row']:.3f} | "
            f"{ms['weights']:.2f} | {100 * row['share']:.3f} % |"
        )
    lines += [
        "",
        "The first column of times is the whole step, the others are parts of the ledger, in ms. The share counts all "
        "of them as if they ran one after the other, and the weights once per epoch; the plan is digested in the "
        "thread that loads the next batch.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    report = vars(options) | world(options.device) | {"bytes": size_of(options.steps, 128, 5 * 128), "shapes": {}}
    for name, shape in SHAPES.items():
        report["shapes"][name] = measured(argparse.Namespace(**vars(options), **shape, memory=MEMORY))
    folder = Path(os.environ.get("OUT", RESULTS))
    write_result("ledger.json", json.dumps(report, indent=1) + "\n", folder)
    write_result("ledger.md", page(report), folder)
    print(page(report))
    small = report["bytes"] < MOST_BYTES * options.steps / 1000
    raise SystemExit(not (small and all(row["share"] < MOST_SHARE for row in report["shapes"].values())))


if __name__ == "__main__":
    main()
