"""Tests the paper's claims on small data: one row per setting and seed. results/claims.md describes the protocol.

    python bench/training/claims.py WORK [--data synthetic|ucf101_100] [--seeds 0 1 2]
        [--settings infonce coclr cpr_n7 …]
    python bench/training/claims.py --table [--data …]    # and the figure, bench/results/claims_<data>.png

Writes the index and the flow of the data set to WORK/<data>/data and trains in WORK/<data>/runs/<setting>-<seed>. Each
finished run appends a row to bench/results/claims.jsonl; existing rows are not run again. The settings of one seed
share the InfoNCE start (the first two cycles), which is trained once in WORK/<data>/runs/start-<seed>.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from measure import RESULTS, ROOT, world
from support import real_clips

from cpr_fast.config import Config, Cycle, InitConfig, load
from cpr_fast.data.flow.write import write_flow
from cpr_fast.data.index.build import IndexOptions, write_index
from cpr_fast.data.synthetic.videos import write_synthetic
from cpr_fast.evaluate.classify.classify import classify
from cpr_fast.evaluate.retrieval.retrieve import Protocol, retrieve
from cpr_fast.pretrain.run.loop import pretrain

ROWS = RESULTS / "claims.jsonl"
START_CYCLES = 2  # InfoNCE on each view; the setting decides how the later cycles mine

# The changes of the later cycles to the base config; "untrained" is the network of the seed before training.
SETTINGS: dict[str, dict] = {
    "untrained": {},
    "infonce": {"mining": "none"},
    "coclr": {"mining": "cascade", "stages": 1},
    "cpr_n7": {"mining": "cascade", "stages": 7},
    "ubernce": {"mining": "label"},
    "cpr_n3": {"mining": "cascade", "stages": 3},
    "cpr_n5": {"mining": "cascade", "stages": 5},
    "cpr_n3_r.8": {"mining": "cascade", "stages": 3, "ratio": 0.8},
    "cpr_n7_r.8": {"mining": "cascade", "stages": 7, "ratio": 0.8},
    "cpr_n7_query_anchor": {"mining": "cascade", "stages": 7, "anchor": "query"},
    "cpr_n7_coclr_protocol": {"mining": "cascade", "stages": 7, "protocol": "coclr"},
}


def make_data(data: str, folder: Path) -> Path:
    """Writes the index and the flow of the data set, and returns the index."""
    if data == "synthetic":
        index = write_synthetic(folder, version=2)
    else:
        index = folder / "index.csv"
        if not index.exists():
            write_index(real_clips.UCF101, index, IndexOptions(layout="folders"))
    write_flow(index, folder / "flow")
    return index


def base_config(data: str, index: Path) -> Config:
    """Returns the config of the quick start, or a shorter one for the 100 real clips.

    The quick start was tuned on another draw of the synthetic set.
    """
    base = load(ROOT / "cpr_fast" / "experiments" / "quickstart.toml")
    base = replace(base, "data", index=str(index), stride=2, size=32)  # for videos of 25 frames per second, 160x120
    if data == "ucf101_100":
        base = replace(base, "data", split="", batch_size=16)
        base = replace(base, "memory", size=64)
        base = replace(base, "schedule", cycles=tuple(Cycle(view, 15, "none", (12,)) for view in ("rgb", "flow") * 2))
    return base


def config_of(setting: str, seed: int, data: str, folder: Path, index: Path) -> Config:
    """Returns the config of the first START_CYCLES cycles for "start", else that of the later cycles of a setting."""
    base = replace(base_config(data, index), "run", out=str(folder / f"{setting}-{seed}"), seed=seed)
    cycles = base.schedule.cycles
    if setting == "start":
        return replace(base, "schedule", cycles=cycles[:START_CYCLES])
    changes = dict(SETTINGS[setting])
    mining = changes.pop("mining")
    start = str(folder / f"start-{seed}" / "checkpoints" / "last.pt")
    base = replace(base, "model", init=InitConfig(rgb=start, flow=start))
    base = replace(base, "loss", protocol=changes.pop("protocol", base.loss.protocol))
    base = replace(base, "mining", **changes)
    rest = tuple(dataclasses.replace(cycle, mining=mining) for cycle in cycles[START_CYCLES:])
    return replace(base, "schedule", cycles=rest)


def replace(config: Config, section: str, **changes: Any) -> Config:
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **changes)})


def train(config: Config) -> Path:
    """Starts or resumes a run, and returns its last checkpoint."""
    last = Path(config.run.out) / "checkpoints" / "last.pt"
    pretrain(config, resume=last.exists(), progress=False)
    return last


def mining_quality(run: Path) -> dict:
    """Reads PMR of each epoch, and PMR and median CMR of the last epoch, per view, from metrics.jsonl."""
    epochs = [row for row in map(json.loads, (run / "metrics.jsonl").open()) if row["kind"] == "epoch"]
    quality: dict = {}
    for view in ("rgb", "flow"):
        mined = [row for row in epochs if row["view"] == view and row["pmr"] is not None]
        if mined:
            quality[f"pmr_{view}_epochs"] = [round(row["pmr"], 4) for row in mined]
            quality[f"pmr_{view}"] = mined[-1]["pmr"]
            quality[f"cmr_median_{view}"] = mined[-1]["cmr_median"]
    return quality


def recalls(results: list[dict], name: str) -> dict:
    """Returns the recalls of one of the embeddings that `retrieve` compared, named `view_r@k`."""
    rows = [row for row in results if row["name"] == name]
    return {f"{row['view']}_{k}": row[k] for row in rows for k in ("r@1", "r@5", "r@10")}


def run_setting(setting: str, seed: int, data: str, work: Path, index: Path) -> dict:
    """Trains and evaluates one setting, and returns the measures of its row."""
    protocol: Protocol = "train_test" if data == "synthetic" else "leave_source_out"
    start = train(config_of("start", seed, data, work / "runs", index))
    if setting == "untrained":
        results = retrieve(start, index, protocol=protocol, untrained_seed=seed)["results"]
        pixels = {name for name in (row["name"] for row in results) if name not in ("trained", "untrained")}
        baselines = {f"{name}_{key}": value for name in sorted(pixels) for key, value in recalls(results, name).items()}
        return recalls(results, "untrained") | baselines
    config = config_of(setting, seed, data, work / "runs", index)
    last = train(config)
    results = retrieve(last, index, protocol=protocol)["results"]
    row = recalls(results, "trained") | mining_quality(Path(config.run.out))
    if data == "synthetic":  # the real clips have no test split
        probes = classify(last, [index], task="probe", crops=1, seeds=(seed,))["results"]
        row |= {f"probe_{probe['view']}": probe["accuracy"] for probe in probes}
    return row


def print_table(rows: list[dict]) -> None:
    """Prints mean and standard error over seeds, one line per setting."""
    columns = [
        "two_stream_r@1",
        "two_stream_r@5",
        "rgb_r@1",
        "flow_r@1",
        "pmr_rgb",
        "pmr_flow",
        "cmr_median_rgb",
        "probe_two_stream",
    ]
    print("| setting | seeds |" + "".join(f" {c.replace('_', ' ')} |" for c in columns))
    print("|" + "---|" * (len(columns) + 2))
    for setting in SETTINGS:
        mine = [row for row in rows if row["setting"] == setting]
        cells = []
        for column in columns:
            values = [row[column] for row in mine if column in row]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            cells.append(f"{statistics.mean(values):.3f} ± {error:.3f}" if values else "")
        if mine:
            print(f"| {setting} | {len(mine)} | " + " | ".join(cells) + " |")


def draw(rows: list[dict], path: Path) -> None:
    """Draws PMR over the epochs of the cascade cycles, and two-stream R@1 of every seed with its mean."""
    figure, (quality, recall) = plt.subplots(1, 2, figsize=(11, 3.6), constrained_layout=True)
    settings = [name for name in SETTINGS if any(row["setting"] == name for row in rows)]
    for position, setting in enumerate(settings):
        mine = [row for row in rows if row["setting"] == setting]
        for view, style in (("rgb", "-"), ("flow", "--")):
            curves = [row[f"pmr_{view}_epochs"] for row in mine if f"pmr_{view}_epochs" in row]
            if curves:
                means = [statistics.mean(values) for values in zip(*curves, strict=True)]
                quality.plot(range(1, len(means) + 1), means, style, color=f"C{position}", label=f"{setting}, {view}")
        values = [row["two_stream_r@1"] for row in mine]
        recall.plot([position] * len(values), values, "o", color=f"C{position}", alpha=0.6)
        recall.plot([position - 0.25, position + 0.25], [statistics.mean(values)] * 2, color=f"C{position}")
    quality.set(xlabel="epoch of the cycle", ylabel="PMR, mean over seeds", ylim=(0, None))
    quality.legend(fontsize=8)
    recall.set(ylabel="two-stream R@1", ylim=(0, 1), xticks=range(len(settings)), xticklabels=settings)
    recall.tick_params(axis="x", rotation=20)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=Path("runs/claims"))
    parser.add_argument("--data", default="synthetic", choices=["synthetic", "ucf101_100"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument(
        "--table", action="store_true", help="only print the means and draw the figure of the existing rows"
    )
    args = parser.parse_args()
    rows = [json.loads(line) for line in ROWS.open()] if ROWS.exists() else []
    rows = [row for row in rows if row["data"] == args.data]
    if args.table:
        draw(rows, RESULTS / f"claims_{args.data}.png")
        return print_table(rows)
    work = args.work / args.data
    index = make_data(args.data, work / "data")
    about = world("cpu")
    done = {(row["setting"], row["seed"]) for row in rows}
    for setting, seed in itertools.product(args.settings, args.seeds):
        if (setting, seed) in done:
            continue
        row = {"data": args.data, "setting": setting, "seed": seed}
        row |= run_setting(setting, seed, args.data, work, index) | about
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({key: value for key, value in row.items() if not key.endswith("_epochs")}), flush=True)


if __name__ == "__main__":
    main()
