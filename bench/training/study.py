"""Runs the registered study of what the paper claims. bench/results/study.md is its protocol and holds its results.

    python bench/training/study.py WORK [--sets synthetic …] [--seeds 0 …] [--settings start untrained …]
    python bench/training/study.py WORK --later | --better | --reasons | --again [--sets synthetic …] [--seeds 0 …]
    python bench/training/study.py WORK --sets jhmdb --seeds 100 --settings start infonce ubernce --base size=32
    python bench/training/study.py --table

Videos, flow and runs are in WORK. The sets run one after the other, and within a set one seed after the other with all
settings, so that what is there is balanced at any time. Each finished run appends a row to study.jsonl; rows that are
there are neither run again nor replaced. SIGTERM and Ctrl-C stop it after a step, and the same command continues.

Before the first row of a set, trials with InfoNCE and UberNCE choose its base among the registered candidates; their
rows go to study_trials.jsonl. Seeds from 100 on are trials, too: `--base` changes their base, and they may not mine.
`--table` writes the tables of all rows into study.md, the figures study.png and study_<set>.png beside it, and the
claims into docs/evidence.md and README.md.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from evidence.rows import ROWS, TRIALS, add_row, is_done, keep_queries, read_rows
from evidence.runs import continued_by_the_same_command, run_setting
from evidence.settings import (
    AGAIN,
    ALL,
    BETTER,
    CANDIDATES,
    LATER,
    REASONS,
    SEEDS,
    SETTINGS,
    TRIAL,
    TRIAL_SEEDS,
    Base,
    chosen_base,
    settings_digest,
)
from evidence.summary import claim_summary
from evidence.tables import (
    claim_table,
    draw,
    draw_overview,
    progress,
    replace_results,
    setting_table,
    trial_table,
)
from evidence.videos import SETS, description, prepare
from measure import RESULTS, uncommitted, world, write_result

OVERVIEW = "study.png"
REPOSITORY = Path(__file__).resolve().parents[2]


def run_all(args: argparse.Namespace) -> None:
    """Runs the rows that are asked for and not there yet, and prints one line for each."""
    for name in args.sets:
        index = prepare(name, args.work / "data" / name, progress=True)
        about = description(index)
        base = changed(CANDIDATES[name][0], args.base) if args.base else choose_base(args, name, index, about)
        for seed in args.seeds:
            for setting in args.settings:
                run_row(args, name, base, setting, seed, index, about)


def choose_base(args: argparse.Namespace, name: str, index: Path, about: dict[str, Any]) -> Base:
    """Returns the base of a set; runs the trials of its candidates, in order, that it needs and that are not there."""
    for base in CANDIDATES[name]:
        if chosen := base_of(name, about, read_rows(args.results / TRIALS)):
            return chosen
        for setting in TRIAL:
            run_row(args, name, base, setting, TRIAL_SEEDS, index, about)
    return base_of(name, about, read_rows(args.results / TRIALS))


def base_of(name: str, about: dict[str, Any], trials: list[dict[str, Any]]) -> Base | None:
    """Returns the base that the rows of the trials choose for a set; None if another trial is needed."""
    found = []
    for base in CANDIDATES[name]:
        wanted = {settings_digest(base, setting, about["digest"]): setting for setting in TRIAL}
        mine = {wanted[row["settings"]]: row["views"]["two_stream"]["map"] for row in trials
                if row["set"] == name and row["seed"] == TRIAL_SEEDS and row["settings"] in wanted}  # fmt: skip
        if len(mine) < len(TRIAL):
            break
        found.append(mine)
    return chosen_base(name, found)


def run_row(
    args: argparse.Namespace, name: str, base: Base, setting: str, seed: int, index: Path, about: dict[str, Any]
) -> None:
    """Runs one row unless it is there."""
    trial = seed >= TRIAL_SEEDS
    path = args.results / (TRIALS if trial else ROWS)
    key = {"set": name, "setting": setting, "seed": seed, "settings": settings_digest(base, setting, about["digest"])}
    if is_done(read_rows(path), key):
        return
    machine = world("cpu") | {"threads": torch.get_num_threads()}
    measures, scores = run_setting(base, setting, seed, index, about["digest"], args.work / "runs" / name)
    if not trial:
        keep_queries(args.results, name, about["digest"], scores)
    add_row(path, {**key, "base": dataclasses.asdict(base), "data": about, **measures, **machine})
    both = list(measures["views"].values())[-1]
    print(f"{name}, {setting}, seed {seed}: mAP {both['map']:.3f}, R@1 {both['r@1']:.3f}, "
          f"{measures['training']['cpu_s']:.0f} CPU s of training, {measures['evaluation_cpu_s']:.0f} of evaluation",
          flush=True)  # fmt: skip


def changed(base: Base, changes: list[str]) -> Base:
    """Returns a base with fields replaced: size=32, or start=8,17 for pairs."""
    fields = {field.name for field in dataclasses.fields(Base)}
    values = {}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in fields:
            raise SystemExit(f"--base: expected one of {', '.join(sorted(fields))}, got {name!r}")
        if isinstance(getattr(base, name), str):
            values[name] = text
            continue
        numbers = tuple(map(int, text.split(",")))
        values[name] = numbers if isinstance(getattr(base, name), tuple) else numbers[0]
    return dataclasses.replace(base, **values)


def table(folder: Path) -> str:
    """Returns the tables of all rows, as Markdown; draws the figures into the folder."""
    rows, trials = read_rows(folder / ROWS), read_rows(folder / TRIALS)
    parts = [f"Registered rows that are there: {progress(rows, SETS, list(SETTINGS))}."]
    by_set = registered_rows(rows, trials)
    for name, current in by_set.items():
        draw(current, folder / f"study_{name}.png")
        parts += [f"### {name}", setting_table(current), claim_table(current, folder, name),
                  f"![PMR over epochs, and mAP of every seed](study_{name}.png)"]  # fmt: skip
        if others := sum(row["set"] == name for row in rows) - len(current):
            parts.append(f"{others} rows of other settings than the registered ones are left out.")
    if by_set:
        draw_overview(by_set, folder / OVERVIEW)
        parts.insert(1, f"![mAP and PMR of every setting and set]({OVERVIEW})")
    if trials:
        parts += ["### Trials that chose the bases, InfoNCE and UberNCE alone", trial_table(trials)]
        parts += [sentence] if (sentence := uncommitted(trials)) else []
    return "\n\n".join(parts)


def registered_rows(rows: list[dict[str, Any]], trials: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of every set that has some, with the settings which its base gives now."""
    found = {name: registered(name, [row for row in rows if row["set"] == name], trials) for name in SETS}
    return {name: mine for name, mine in found.items() if mine}


def write_tables(folder: Path) -> None:
    """Writes the tables into study.md of the folder, if it is there, and those of the committed rows into the pages."""
    text, page = table(folder), folder / "study.md"
    print(text)
    if page.exists():
        write_result("study.md", replace_results(page.read_text(), text, "study.py"), folder)
    if folder == RESULTS:
        by_set = registered_rows(read_rows(folder / ROWS), read_rows(folder / TRIALS))
        for place, name, headlines in ((REPOSITORY / "docs", "evidence.md", False), (REPOSITORY, "README.md", True)):
            summary = claim_summary(by_set, folder, headlines=headlines)
            write_result(name, replace_results((place / name).read_text(), summary, "study.py"), place)


def registered(name: str, rows: list[dict[str, Any]], trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of a set that have the settings which its base gives now."""
    if not rows or (base := base_of(name, rows[0]["data"], trials)) is None:
        return []
    return [row for row in rows if row["settings"] == settings_digest(base, row["setting"], row["data"]["digest"])]


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    trials = [seed for seed in args.seeds if seed >= TRIAL_SEEDS]
    if trials and (mines := [name for name in args.settings if ALL[name].mining == "cascade"]):
        parser.error(f"--settings: trials (seeds from {TRIAL_SEEDS}) choose a base before anything mines, got {mines}")
    if args.base and len(trials) < len(args.seeds):
        parser.error(f"--base: the base of seeds below {TRIAL_SEEDS} is the registered one, got {args.base}")
    if other := [seed for seed in args.seeds if seed < TRIAL_SEEDS and seed not in SEEDS]:
        parser.error(f"--seeds: expected registered seeds {SEEDS}, or trials from {TRIAL_SEEDS} on, got {other}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?", default=Path("runs/study"))
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--settings", nargs="+", choices=list(ALL), help="default: those of the main table")
    which.add_argument("--later", action="store_const", dest="settings", const=list(LATER), help="the other claims")
    which.add_argument("--better", action="store_const", dest="settings", const=list(BETTER), help="other ways to mine")
    which.add_argument("--again", action="store_const", dest="settings", const=list(AGAIN), help="of another start")
    which.add_argument("--reasons", action="store_const", dest="settings", const=list(REASONS), help="why claims fail")
    parser.add_argument("--base", nargs="+", default=[], metavar="FIELD=VALUE", help="of a trial")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of study.jsonl")
    parser.add_argument("--table", action="store_true", help="only write the tables of the existing rows")
    args = parser.parse_args()
    args.settings = args.settings or list(SETTINGS)
    check(parser, args)
    torch.set_num_threads(args.threads)
    if args.table:
        write_tables(args.results)
        return
    args.results.mkdir(parents=True, exist_ok=True)
    with continued_by_the_same_command():
        run_all(args)


if __name__ == "__main__":
    main()
