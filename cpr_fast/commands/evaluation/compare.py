"""`cpr-fast compare`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import tyro

from cpr_fast.commands.inputs import require_runs
from cpr_fast.commands.options import Json, required
from cpr_fast.commands.output import about_unfinished, left_out_of_map, show, table
from cpr_fast.errors import InputError
from cpr_fast.evaluate.retrieval.names import MEASURES, MISSING, VIEW_NAMES, percent, signed, signed_interval
from cpr_fast.wording import counted

# Below this number of sources the interval is too narrow: in 1,500 simulations of equal means for each number, the 95 %
# interval contained the true value in 80 % with 4 sources, in 89 % with 8 and in 92 % with 20.
FEW_SOURCES = 20


def compare(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, required("RUNS")],
    *,
    against: Annotated[tuple[Path, ...], tyro.conf.arg(help_behavior_hint="(default: two RUNS)")] = (),
    json: Json = False,
) -> None:
    """Test whether the retrieval of two runs differs, query by query and, with several seeds, seed by seed.

    The runs must have been evaluated by `cpr-fast retrieve` on the same queries and gallery.

    Args:
        runs: Two run folders; or, with --against, one or more runs of the first setting, which differ by their seed.
        against: As many runs of the second setting, with the same seeds.
    """
    first, second = (runs, against) if against else (runs[:1], runs[1:])
    if not against and len(runs) != 2:
        raise InputError(f"RUNS: expected two run folders, or --against with the runs to compare with, got {len(runs)}")
    require_runs("RUNS", runs)
    require_runs("--against", against)
    from cpr_fast.runtime.progress import announce

    announce("Reading the runs")
    from cpr_fast.report.run_folder.pairs import compare_runs
    from cpr_fast.report.run_folder.run import Run

    blocks = compare_runs([Run(folder) for folder in first], [Run(folder) for folder in second])
    page = shlex.join(["cpr-fast", "report", *map(str, (*first, *second)), "--out", "comparison.html"])
    lines = []
    if not json:
        lines += [line for block in blocks for line in (*_lines(block), "")]
        lines += [*_meaning(blocks[0]), *about_unfinished((*first, *second))]
    show({"comparisons": blocks}, json, lines=lines, next_step=page)


def _lines(block: dict[str, Any]) -> list[str]:
    """Returns the pairs of runs, and a table with a row for each view and measure."""
    row = block["rows"][0]
    title = (f"{counted(row['queries'], 'query', 'queries')} of {counted(row['sources'], 'source')}, "
             f"protocol {block['protocol']}, "
             f"test-time recipe {block['recipe']}")  # fmt: skip
    pairs = [f"{pair['first']} against {pair['second']}" + _seed(pair["seed"]) for pair in block["pairs"]]
    header = ["View · measure, in %", "First", "Second", "Difference", "95 % interval (sources)", "p"]
    header += ["95 % interval (seeds)", "p", "d_z"] if row["seeds"] else []
    body = [
        [
            f"{VIEW_NAMES[row['view']]} · {MEASURES[row['measure']]}", percent(row["first"], ""),
            percent(row["second"], ""), signed(row["difference"]), *_certainty(row),
            *([*_certainty(row["seeds"]), _effect(row["seeds"]["d_z"])] if row["seeds"] else []),
        ]
        for row in block["rows"]
    ]  # fmt: skip
    return [title, *pairs, "", table(header, body)]


def _seed(seed: int | None) -> str:
    return "" if seed is None else f", seed {seed}"


def _certainty(found: dict[str, Any]) -> tuple[str, str]:
    return signed_interval(found["ci95"]), MISSING if found["p"] is None else f"{found['p']:.2g}"


def _effect(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _meaning(block: dict[str, Any]) -> list[str]:
    """Returns what a reader of the tables needs to know."""
    lines = [
        "difference: first - second, in percentage points; p is two-sided",
        "sources: paired bootstrap over the sources of the queries: how the difference varies with the videos",
    ]
    seeds = len(block["pairs"])
    if seeds > 1:
        lines += [
            f"first and second are means over {counted(seeds, 'pair')}; seeds: paired t-test of these "
            f"{seeds} differences: "
            "how the difference varies with the training",
            "d_z: effect size, the mean of the differences divided by their standard deviation",
        ]
    sources = min(row["sources"] for row in block["rows"])
    if sources < FEW_SOURCES:
        lines.append(
            f"caution: from {counted(sources, 'source')}, fewer than {FEW_SOURCES}, the interval is "
            f"too narrow and p too small"
        )
    return lines + left_out_of_map(block["without_class"])
