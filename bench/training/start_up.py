"""Measures how long the command line takes for an answer that needs neither torch nor a data set.

    python bench/training/start_up.py [--rounds 20] [--before CHECKOUT] [--before-rounds 5]

Writes bench/results/start_up.md and start_up.json. Each command is run in a separate process; the time is the CPU
time (user and system) of that process, which other load on the machine changes little. With --before, the commands of
an older checkout, whose compiled modules are built, are measured in turn with those of this one. They may take seconds,
so there are fewer rounds of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import ROOT, commit_of, world, write_result

# Description of the input, and the command line; files and folders called "no" do not exist.
COMMANDS = {
    "help": "--help",
    "version": "--version",
    "misspelt command": "retreive no.pt",
    "unknown option": "pretrain config.toml --data.batchsize 8",
    "unknown option before CONFIG": "pretrain --resme config.toml",
    "missing config": "pretrain no.toml",
    "missing index": "pretrain config.toml --data.index no.csv",
    "missing start weights": "pretrain config.toml --model.init.rgb no.pt",
    "missing checkpoint": "retrieve no.pt --index index.csv",
    "missing checkpoint of a probe": "probe no.pt --index index.csv",
    "missing index of flow": "flow no.csv --out flow",
    "bad shard": "flow index.csv --out flow --shard 3/3",
    "missing data set": "index no --out index.csv",
    "missing index of the doctor": "doctor no.csv",
    "missing run folder": "report no",
}
CONFIG = '[data]\nindex = "index.csv"\n'


def cpu_s(checkout: Path, words: str, folder: Path) -> tuple[float, int]:
    """Returns the CPU time of a command in seconds, and its exit code."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "cpr_fast", *words.split()]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime, process.returncode


def measure(checkouts: dict[str, Path], rounds: dict[str, int]) -> list[dict]:
    """Returns a row for each command with the median time and the exit code in every checkout."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.toml").write_text(CONFIG)
        (folder / "index.csv").touch()
        for answer, words in COMMANDS.items():
            row: dict = {"answer": answer, "command": f"cpr-fast {words}"}
            samples: dict[str, list[float]] = {which: [] for which in checkouts}
            for number in range(max(rounds.values())):
                for which, checkout in checkouts.items():
                    if number >= rounds[which]:
                        continue
                    seconds, row[f"{which}_exit_code"] = cpu_s(checkout, words, folder)
                    samples[which].append(seconds)
            rows.append(row | {f"{which}_s": round(statistics.median(times), 3) for which, times in samples.items()})
            print(rows[-1], flush=True)
    return rows


def page(result: dict, before: str | None) -> str:
    """Returns the result as a Markdown page."""
    which = (["before"] if before else []) + ["after"]
    lines = [
        "# Answers of the command line",
        "",
        f"`{result['command']}`, {result['device']}, commit {result['commit']}"
        + (f"; before: commit {before}" if before else "")
        + ". CPU time (user and system) of the whole process, median of "
        + ", ".join(f"{result['rounds'][name]} runs ({name})" for name in which)
        + "; the exit code in brackets.",
        "",
        "| what was typed | command | " + " | ".join(f"{name}, s" for name in which) + " |",
        "|---|---|" + "---|" * len(which),
    ]
    for row in result["rows"]:
        cells = [f"{row[f'{name}_s']:.3f} ({row[f'{name}_exit_code']})" for name in which]
        lines.append(f"| {row['answer']} | `{row['command']}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--before", type=Path, help="an older checkout to compare with")
    parser.add_argument("--before-rounds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    checkouts = {"before": arguments.before.resolve()} if arguments.before else {}
    before = commit_of(arguments.before) if arguments.before else None
    rounds = {"before": arguments.before_rounds, "after": arguments.rounds}
    rows = measure(checkouts | {"after": ROOT}, rounds)
    result = world("cpu") | {"before_commit": before, "rounds": rounds, "rows": rows}
    write_result("start_up.json", json.dumps(result, indent=1) + "\n")
    write_result("start_up.md", page(result, before))


if __name__ == "__main__":
    main()
