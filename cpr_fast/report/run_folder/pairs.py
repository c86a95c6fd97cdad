"""Pairs of runs, compared query by query and, with several seeds, seed by seed.

Letters: Q queries, S pairs of runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cpr_fast.config.recipes import retrieve_command
from cpr_fast.errors import InputError
from cpr_fast.evaluate.retrieval.paired import paired_difference, seed_difference
from cpr_fast.evaluate.retrieval.queries import QueryScores, hits_at_1, matched
from cpr_fast.report.run_folder.run import Run
from cpr_fast.wording import listed

MEASURES = ("map", "r@1")
Kind = tuple[str, str]  # protocol and recipe


def compare_runs(first: Sequence[Run], second: Sequence[Run]) -> list[dict[str, Any]]:
    """Compares the trained networks of S runs of one setting with those of S runs of another.

    Runs are paired by their recorded seeds, or in the given order if a seed was not recorded.

    Returns:
        A block for every protocol and recipe that all runs were evaluated with: `protocol`, `recipe`, `pairs` (folders
        of the `first` and the `second` run, and their `seed` or None), `without_class` (queries left out of mAP) and
        `rows`: for every `view` and `measure` ("map", "r@1") the entries of `paired_difference`, computed on each
        query's mean over the pairs, and `seeds`: the entries of `seed_difference`, None for one pair.
    Raises:
        InputError: The numbers of runs or their seeds do not go together, no evaluation is common to all, the measures
            of single queries were not stored, or the queries differ.
    """
    pairs = _paired(first, second)
    runs = [run for _, *both in pairs for run in both]
    kinds = [kind for kind in _kinds(runs[0]) if all(kind in _kinds(run) for run in runs)]
    if not kinds:
        had = "; ".join(f"{run.folder}: {', '.join(' '.join(kind) for kind in _kinds(run)) or 'none'}" for run in runs)
        index = next((index for run in runs for index in run.evaluated_indexes), None)
        commands = [retrieve_command(run.folder, index) if index else run.evaluation_command for run in runs]
        raise InputError(
            f"expected evaluations with the same protocol and test-time recipe, got {had}; run "
            f"{listed([f'`{command}`' for command in commands])}, with the same options for every run; R@k and mAP are "
            "measured only of videos with labels"
        )
    return [_compare(pairs, kind) for kind in kinds]


def _paired(first: Sequence[Run], second: Sequence[Run]) -> list[tuple[int | None, Run, Run]]:
    """Returns (seed, run of the first setting, run of the second)."""
    if len(first) != len(second):
        raise InputError(f"expected as many runs of both settings, got {len(first)} and {len(second)}")
    seeds = [[run.config.get("run", {}).get("seed") for run in runs] for runs in (first, second)]
    if None in seeds[0] + seeds[1] or len(first) == 1:
        return [(None, *pair) for pair in zip(first, second, strict=True)]
    for runs, found in zip((first, second), seeds, strict=True):
        if len(set(found)) < len(found):
            raise InputError(f"expected runs of different seeds, got the seeds {_listed(found)} of {_names(runs)}")
    if set(seeds[0]) != set(seeds[1]):
        raise InputError(f"expected the same seeds of both settings, got {_listed(seeds[0])} and {_listed(seeds[1])}")
    of_seed = dict(zip(seeds[1], second, strict=True))
    return [(seed, run, of_seed[seed]) for seed, run in zip(seeds[0], first, strict=True)]


def _compare(pairs: Sequence[tuple[int | None, Run, Run]], kind: Kind) -> dict[str, Any]:
    reference = _scores(pairs[0][1], kind)
    loaded = [[_matched(reference, pairs[0][1], run, kind) for run in both] for _, *both in pairs]
    views = [
        name.removeprefix("trained/")
        for name in reference.average_precision
        if name.startswith("trained/") and all(name in scores.first_hit for both in loaded for scores in both)
    ]
    rows = [
        {"view": view, "measure": measure} | _row(loaded, view, measure, reference)
        for view in views
        for measure in MEASURES
    ]
    named = [{"first": str(ours.folder), "second": str(theirs.folder), "seed": seed} for seed, ours, theirs in pairs]
    left_out = int(next(iter(reference.average_precision.values())).isnan().sum())
    return {"protocol": kind[0], "recipe": kind[1], "pairs": named, "without_class": left_out, "rows": rows}


def _row(loaded: Sequence[Sequence[QueryScores]], view: str, measure: str, reference: QueryScores) -> dict[str, Any]:
    """Returns the difference of one measure; `loaded` are the scores of both runs of every pair."""
    name = f"trained/{view}"
    values = torch.stack(
        [
            torch.stack([s.average_precision[name] if measure == "map" else hits_at_1(s.first_hit[name]) for s in both])
            for both in loaded
        ]
    )  # [S, 2, Q]
    ours, theirs = values.mean(0)
    found = paired_difference(ours, theirs, reference.source_ids())
    by_seed = [(a - b).nanmean().item() for a, b in values]
    several = len(by_seed) > 1 and found["queries"] > 0
    return found | {"seeds": seed_difference(by_seed) if several else None}


def _kinds(run: Run) -> list[Kind]:
    """Returns the protocols and recipes of a run's evaluations on labelled videos."""
    rows = [row for rows in run.evaluations for row in rows if row["name"] == "trained" and row.get("r@1") is not None]
    return list(dict.fromkeys((row["protocol"], row["recipe"]) for row in rows))


def _scores(run: Run, kind: Kind) -> QueryScores:
    rows = [row for rows in run.evaluations for row in rows if (row["protocol"], row["recipe"]) == kind]
    place = next((row["queries_file"] for row in rows if row["name"] == "trained" and row.get("queries_file")), None)
    if place is None:
        raise InputError(
            f"{run.folder}: expected the measures of every query, but none are stored since an older version evaluated "
            f"it; run `{run.evaluation_command}`"
        )
    return QueryScores.load(Path(run.folder) / place)


def _matched(reference: QueryScores, known: Run, run: Run, kind: Kind) -> QueryScores:
    scores = _scores(run, kind)
    try:
        return matched(reference, scores)
    except InputError as error:
        raise InputError(f"{known.folder} and {run.folder}, {' '.join(kind)}: {error}") from None


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(str(run.folder) for run in runs)


def _listed(seeds: Sequence[int | None]) -> str:
    return ", ".join(map(str, seeds))
