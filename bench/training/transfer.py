"""Measures whether what a network learnt on one set of real videos helps on another one.

    python bench/training/transfer.py WORK [--seeds 0 …] [--targets jhmdb …]
    python bench/training/transfer.py --table

bench/results/transfer.md is its protocol and holds its results. WORK is the folder of study.py, whose runs are the
pretrained networks; those that are missing are trained. Each finished row is appended to transfer.jsonl and is neither
measured again nor replaced; a stopped call is continued by the same call.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from evidence.claims import verdict
from evidence.rows import TRIALS, add_row, is_done, read_rows
from evidence.runs import PROBE, continued_by_the_same_command, trained, untrained
from evidence.settings import SEEDS, settings_digest
from evidence.tables import replace_results
from evidence.videos import description, prepare
from measure import RESULTS, world, write_result
from page import markdown_table
from study import base_of

from cpr_fast.config import ClassifierConfig
from cpr_fast.evaluate.classify.classify import classify
from cpr_fast.evaluate.retrieval.paired import seed_difference
from cpr_fast.weights.checkpoint import load_checkpoint, save_checkpoint

ROWS, PAGE = "transfer.jsonl", "transfer.md"
SOURCES = ("jhmdb", "shrec17")  # the sets that networks are pretrained on
NETWORKS = ("untrained", "infonce", "cpr_n7")  # settings of the study
EPOCHS = {"jhmdb": 20, "shrec17": 8, "ucf101": 60}  # of finetuning, by target
BATCH = {"jhmdb": 32, "shrec17": 32, "ucf101": 8}


def finetuning(target: str) -> ClassifierConfig:
    """Returns the settings of finetuning on a target."""
    epochs = EPOCHS[target]
    return ClassifierConfig(epochs=epochs, milestones=(round(0.8 * epochs),), batch_size=BATCH[target], dropout=0.5)


def run_all(args: argparse.Namespace) -> None:
    """Measures the rows that are asked for and not there yet, seed by seed, and prints one line for each."""
    about = {name: prepare(name, args.work / "data" / name, progress=True) for name in {*SOURCES, *args.targets}}
    for seed in args.seeds:
        for target in args.targets:
            for source in SOURCES:
                for network in NETWORKS if source != target else ():
                    run_row(args, about, source, network, target, seed)


def run_row(
    args: argparse.Namespace, indexes: dict[str, Path], source: str, network: str, target: str, seed: int
) -> None:
    """Measures a network of one source on a target unless the row is there."""
    data = description(indexes[source])
    base = base_of(source, data, read_rows(args.results / TRIALS))
    if base is None:
        raise SystemExit(f"{source}: expected the trials that choose its base; run study.py first")
    row = {"set": f"{source} to {target}", "setting": network, "seed": seed}
    row["settings"] = settings_digest(base, network, data["digest"] + description(indexes[target])["digest"])
    if is_done(read_rows(args.results / ROWS), row):
        return
    machine = world("cpu") | {"threads": torch.get_num_threads()}
    config, last = trained(base, network, seed, indexes[source], data["digest"], args.work / "runs" / source)
    if network == "untrained":
        last = untrained_checkpoint(last, untrained(config, indexes[source], ("rgb", "flow"), seed))
    began = time.process_time()
    for task, settings in (("probe", PROBE), ("finetune", finetuning(target))):
        found = classify(last, [indexes[target]], task=task, settings=settings, recipe="paper", crops=1, seeds=(seed,),
                         out=args.work / "transfer" / f"{row['settings']}-{network}-seed-{seed}")  # fmt: skip
        row[task] = {each["view"]: each["accuracy"] for each in found["summary"]}
    row["cpu_s"] = round(time.process_time() - began, 1)
    add_row(args.results / ROWS, row | machine)
    print(f"{row['set']}, {network}, seed {seed}: finetuned {row['finetune']['two_stream']:.3f}, "
          f"probe {row['probe']['two_stream']:.3f}, {row['cpu_s']:.0f} CPU s", flush=True)  # fmt: skip


def untrained_checkpoint(start: Path, encoders: dict[str, torch.nn.Module]) -> Path:
    """Writes the checkpoint of a start with other weights beside the start's folder, and returns it."""
    payload = load_checkpoint(start)
    payload["encoders"] = {view: encoder.state_dict() for view, encoder in encoders.items()}
    folder = start.parents[2] / "untrained" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    return save_checkpoint(folder / "untrained.pt", payload)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns accuracies, and the differences that the protocol asks for, as Markdown."""
    accuracies, differences = [], []
    for name in dict.fromkeys(row["set"] for row in rows):
        by_key = {(row["setting"], row["seed"]): row for row in rows if row["set"] == name}
        for network in NETWORKS:
            mine = [by_key[network, seed] for seed in SEEDS if (network, seed) in by_key]
            if mine:
                cells = [_mean([row[task][view] for row in mine]) for task in ("finetune", "probe")
                         for view in ("rgb", "flow", "two_stream")]  # fmt: skip
                accuracies.append([name, network, str(len(mine)), *cells])
        for first, second in (("cpr_n7", "untrained"), ("cpr_n7", "infonce")):
            seeds = [seed for seed in SEEDS if (first, seed) in by_key and (second, seed) in by_key]
            for task in ("finetune", "probe") if seeds else ():
                pairs = [[by_key[network, seed][task]["two_stream"] for seed in seeds] for network in (first, second)]
                found = seed_difference([a - b for a, b in zip(*pairs, strict=True)])
                interval = found["ci95"]
                differences.append([
                    name, task, f"{first} - {second}", ", ".join(f"{value:+.3f}" for value in found["differences"]),
                    f"{found['difference']:+.3f}", "" if interval is None else "{:+.3f} to {:+.3f}".format(*interval),
                    verdict(found, None, complete=len(seeds) == len(SEEDS)),
                ])  # fmt: skip
    header = [
        "from, to",
        "network",
        "seeds",
        "finetuned, RGB",
        "flow",
        "two-stream",
        "probe, RGB",
        "flow",
        "two-stream",
    ]
    of_differences = ["from, to", "task", "difference", "by seed", "mean", "95 % over seeds", "verdict"]
    return "\n\n".join([
        markdown_table(header, accuracies),
        markdown_table(of_differences, differences),
    ])  # fmt: skip


def _mean(values: list[float]) -> str:
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), choices=SEEDS)
    parser.add_argument("--targets", nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of transfer.jsonl and the study's rows")
    parser.add_argument("--table", action="store_true", help="only write the tables of the existing rows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.table:
        text, page = table(read_rows(args.results / ROWS)), args.results / PAGE
        print(text)
        write_result(PAGE, replace_results(page.read_text(), text, "transfer.py"), args.results)
        return
    with continued_by_the_same_command():
        run_all(args)


if __name__ == "__main__":
    main()
