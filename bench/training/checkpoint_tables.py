"""The tables and the plot of `checkpoint_choice.py`: how well the score without labels orders checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
from evidence.videos import SETS, TITLES
from matplotlib import pyplot
from measure import uncommitted
from page import markdown_table
from scipy.stats import rankdata, spearmanr

from cpr_fast.mining.unlabelled import SIGNS
from cpr_fast.wording import listed

Row = dict[str, Any]
GOAL = 0.8
LEAST = 5  # number of checkpoints from which a correlation is given
TARGETS = {"r@1": "R@1", "r@1_all": "R@1, all videos", "map": "mAP"}
VIEWS = {"rgb": "RGB", "flow": "flow"}
COLOURS = {"rgb": "tab:blue", "flow": "tab:orange"}
# The runs that were looked at before the score was fixed.
CHOSEN_ON = tuple(f"qs/avx512-1-seed-{seed}" for seed in (0, 1, 2))


def correlation(rows: Iterable[Row], sign: str, target: str) -> float | None:
    """Returns Spearman's correlation, None for too few rows or a constant."""
    pairs = [(row[sign], row[target]) for row in rows if row[sign] is not None]
    if len(pairs) < LEAST or any(len(set(values)) == 1 for values in zip(*pairs, strict=True)):
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def groups(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[list[Row]]:
    return [list(group) for _, group in groupby(sorted(rows, key=key), key=key)]


def cycle_of(row: Row) -> tuple[str, str, str]:
    """Returns what the checkpoints have in common among which a run has to choose, but for the number of the cycle."""
    return row["set"], row["run"], row["view"]


def within(rows: list[Row], sign: str, target: str) -> tuple[float | None, int]:
    """Returns the mean correlation among the checkpoints of a run and view, and the number of such groups."""
    found = [correlation(group, sign, target) for group in groups(rows, cycle_of)]
    known = [value for value in found if value is not None]
    return (sum(known) / len(known) if known else None), len(known)


def between(rows: list[Row], sign: str, target: str) -> tuple[float | None, int]:
    """Returns the correlation among the last checkpoints of all runs of one view, and their number."""
    last = [max(group, key=lambda row: row["epoch"]) for group in groups(rows, cycle_of)]
    return correlation(last, sign, target), len(last)


def plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def cell(value: float | None) -> str:
    return plain(value) + (" †" if value is not None and value < GOAL else "")


def parts(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yields the parts of the rows that are judged, with their names: the runs on which the score was chosen, then the
    others by set and view."""
    chosen = [row for row in rows if row["run"] in CHOSEN_ON]
    held = [row for row in rows if row not in chosen]
    of_sets = (("", name, [row for row in held if row["set"] == name]) for name in SETS)
    named = [("chosen on: ", "synthetic", chosen), *of_sets]
    for prefix, name, part in named:
        for view, title in VIEWS.items():
            if of_view := [row for row in part if row["view"] == view]:
                yield f"{prefix}{TITLES[name]}, {title}", of_view
        if part:
            yield f"{prefix}{TITLES[name]}, both views", part
    yield "held out, all sets", held


def mean_of_views(rows: list[Row], target: str) -> float | None:
    """Returns the mean correlation of the score over the held-out rows of each set and view."""
    held = [row for row in rows if row["run"] not in CHOSEN_ON]
    found = [correlation(group, "score", target) for group in groups(held, lambda row: (row["set"], row["view"]))]
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known else None


def measured_with(rows: list[Row]) -> str:
    """Returns the processors, versions of torch and commits of the rows."""
    found = {key: listed(sorted({row[key] for row in rows})) for key in ("device", "torch", "commit")}
    return f"{found['device']}, torch {found['torch']}, commit {found['commit']}"


def tables(rows: list[Row]) -> Iterator[str]:
    """Yields the parts of the section "Results"."""
    runs = {(row["set"], row["run"]) for row in rows}
    yield (
        f"{len(rows)} encoders of {len(runs)} runs. Spearman's correlation of the score; † below {GOAL}. Within: mean "
        f"over the runs and views with at least {LEAST} checkpoints. Between: among the last checkpoints of the runs. "
        f"Measured with {measured_with(rows)}. {uncommitted(rows)}".rstrip()
    )
    header = ["encoders", "number", "runs", *TARGETS.values(), "R@1 / R@1, all, with mAP", "within: R@1, all",
              "within: mAP", "between: R@1, all", "between: mAP"]  # fmt: skip
    lines = []
    for name, part in parts(rows):
        cells = [cell(correlation(part, "score", target)) for target in TARGETS]
        one_view = len({(row["set"], row["view"]) for row in part}) == 1
        extra = [within(part, "score", target)[0] for target in ("r@1_all", "map")]
        extra += [between(part, "score", target)[0] if one_view else None for target in ("r@1_all", "map")]
        ceiling = " / ".join(plain(correlation(part, "map", target)) for target in ("r@1", "r@1_all"))
        lines.append([name, str(len(part)), str(len({row["run"] for row in part})), *cells, ceiling,
                      *map(cell, extra)])  # fmt: skip
    yield markdown_table(header, lines)
    means = [mean_of_views(rows, target) for target in TARGETS]
    yield (
        "Mean over the sets and views of the held-out rows: "
        + ", ".join(f"{title} {plain(mean)}" for title, mean in zip(TARGETS.values(), means, strict=True))
        + "."
    )
    yield "### Each sign alone\n\nSpearman's correlation with mAP and, after the slash, with R@1 among all videos."
    signs = ["score", *SIGNS]
    alone = []
    for name, part in parts(rows):
        values = [[correlation(part, sign, target) for target in ("map", "r@1_all")] for sign in signs]
        alone.append([name, *(" / ".join(map(plain, pair)) for pair in values)])
    yield markdown_table(["encoders", *signs], alone)
    yield "### Other forms of the score\n\n" + forms_table(rows)
    yield "### What the choice costs\n\n" + chosen_table(rows)


def forms() -> dict[str, tuple[tuple[float, ...], float]]:
    """Returns the weights of the three signs and the power of the logarithm of the effective rank of every form that is
    tried, by name; the score has equal weights and the power 1."""
    found = {}
    for weights in product((0, 0.5, 1, 2, 4), (0, 0.5, 1, 2), (0, 0.5, 1, 2, 4)):
        if total := sum(weights):
            shares = tuple(round(weight / total, 3) for weight in weights)
            found |= {f"{shares}, {power}": (shares, power) for power in (0, 0.5, 1, 1.5, 2)}
    return found


def value_of(row: Row, weights: Sequence[float], power: float) -> float:
    """Returns the value of a form; `siblings`, where it is None, is left out of the mean, as it is of the score."""
    known = [(weight, row[sign]) for weight, sign in zip(weights, SIGNS[:3], strict=True) if row[sign] is not None]
    mean = sum(weight * sign for weight, sign in known) / (sum(weight for weight, _ in known) or 1)
    return mean * math.log(row["effective_rank"]) ** power if mean > 0 else mean


def judged(values: np.ndarray, target: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Returns, for forms with values [F, N] and a target [N], Spearman's correlation within each part of the rows that
    has at least `LEAST`, averaged over the parts [F]."""
    found = []
    for part in np.unique(parts):
        mine = parts == part
        if mine.sum() >= LEAST:
            ranks = rankdata(np.vstack([values[:, mine], target[mine]]), axis=1)
            ranks -= ranks.mean(1, keepdims=True)
            norms = np.linalg.norm(ranks, axis=1)
            found.append(ranks[:-1] @ ranks[-1] / np.maximum(norms[:-1] * norms[-1], 1e-12))
    return np.mean(found, 0) if found else np.zeros(len(values))


def in_order(values: np.ndarray, target: np.ndarray, parts: np.ndarray, mine: np.ndarray) -> tuple[int, int]:
    """Returns how many pairs of rows of the same part, at least one of which is in `mine`, have values in the order of
    their targets, and how many there are; equal targets are left out."""
    pairs = [
        (i, j)
        for i in np.flatnonzero(mine)
        for j in np.flatnonzero(parts == parts[i])
        if target[i] != target[j] and not (mine[j] and j < i)
    ]
    return sum((values[i] - values[j]) * (target[i] - target[j]) > 0 for i, j in pairs), len(pairs)


def forms_table(rows: list[Row]) -> str:
    """Returns how well other forms of the score do, chosen on all held-out rows, or on rows that are not judged."""
    tried = forms()
    values = np.array([[value_of(row, *form) for row in rows] for form in tried.values()])
    score = list(tried).index("(0.333, 0.333, 0.333), 1")
    chosen = np.array([row["run"] in CHOSEN_ON for row in rows])
    sets = np.array([row["set"] for row in rows])
    runs = np.array([f"{row['set']}/{row['run']}" for row in rows])
    parts = np.array([f"{row['set']} {row['view']} {row['run'] in CHOSEN_ON}" for row in rows])
    lines = []
    for target, title in TARGETS.items():
        wanted = np.array([row[target] for row in rows])

        def correlations(mask: np.ndarray, wanted: np.ndarray = wanted) -> np.ndarray:
            return judged(values[:, mask], wanted[mask], parts[mask])

        held = correlations(~chosen)
        of_sets = {name: correlations(~chosen & (sets == name)) for name in np.unique(sets[~chosen])}
        without_set = [found[correlations(sets != name).argmax()] for name, found in of_sets.items()]
        counts = np.zeros(3)
        for run in np.unique(runs[~chosen]):
            mine, best = runs == run, correlations(runs != run).argmax()
            ours, pairs = in_order(values[score], wanted, parts, mine)
            counts += (ours, in_order(values[best], wanted, parts, mine)[0], pairs)
        lines.append(
            [title, f"{held[score]:.2f}", f"{held.max():.2f}", f"{held[correlations(chosen).argmax()]:.2f}",
             f"{np.mean([found[score] for found in of_sets.values()]):.2f}", f"{np.mean(without_set):.2f}",
             *(f"{100 * count / counts[2]:.1f}" for count in counts[:2])]
        )  # fmt: skip
    header = ["target", "score", "best form on these rows", "form chosen on the three runs", "score, mean of sets",
              "form chosen without the set", "score: pairs in order, %", "form chosen without the run"]  # fmt: skip
    return (
        f"{len(tried)} forms: weighted means of the three signs, times a power (0 to 2) of the logarithm of the "
        "effective rank. The first three columns are means over the held-out sets and views. *Without the set*: the "
        "form is the best one on the rows of the other sets. *Pairs in order*: of two checkpoints of one set and view, "
        "one of them of the run that is left out, the form that is best on the rows of all other runs gives the higher "
        "value to the one with the higher target.\n\n" + markdown_table(header, lines)
    )


def chosen_table(rows: list[Row]) -> str:
    """Returns, for the runs of which several checkpoints were measured, the mean mAP and R@1 of the checkpoint that the
    score chooses, of the last one, and of the one with the best mAP."""
    lines = []
    for name, part in parts(rows):
        several = [group for group in groups(part, cycle_of) if len(group) >= LEAST]
        if not several:
            continue
        picks = {
            "score": [max(group, key=lambda row: row["score"]) for group in several],
            "last": [max(group, key=lambda row: row["epoch"]) for group in several],
            "best": [max(group, key=lambda row: row["map"]) for group in several],
        }
        means = {pick: [sum(row[target] for row in chosen) / len(chosen) for target in ("map", "r@1_all")]
                 for pick, chosen in picks.items()}  # fmt: skip
        lines.append(
            [name, str(len(several)), *(" / ".join(f"{100 * v:.1f}" for v in pair) for pair in means.values())]
        )
    return "mAP / R@1 among all videos, in percent.\n\n" + markdown_table(
        ["encoders", "choices", "by the score", "the last", "by mAP"], lines
    )


def draw(rows: list[Row], path: Path) -> None:
    """Draws R@1 among all videos over the score, a panel for each set."""
    names = [name for name in SETS if any(row["set"] == name for row in rows)]
    figure, axes = pyplot.subplots(1, len(names), figsize=(4 * len(names), 3.4), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        for view, title in VIEWS.items():
            mine = [row for row in rows if row["set"] == name and row["view"] == view]
            rho = correlation(mine, "score", "r@1_all")
            label = title if rho is None else f"{title}, rho {rho:.2f}"
            axis.scatter([row["score"] for row in mine], [100 * row["r@1_all"] for row in mine], s=12,
                         color=COLOURS[view], label=label, alpha=0.7)  # fmt: skip
        axis.set(title=TITLES[name], xlabel="score without labels", ylabel="R@1 among all videos, %")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
