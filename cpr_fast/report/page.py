"""`write_report`: run folders in, one self-contained HTML page out (no network, no scripts)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from cpr_fast.report.sections.comparison import comparison
from cpr_fast.report.sections.mining import class_rates, extremes, inside_figures, mining_figures
from cpr_fast.report.sections.runs import MODEL_NAMES, VIEW_NAMES, Run
from cpr_fast.report.sections.sheets import mined_sheets, retrieved_sheet
from cpr_fast.report.sections.tables import (
    classification_rows,
    cycle_row,
    flat_config,
    published_beside,
    retrieval_blocks,
)
from cpr_fast.report.sections.training import training_figures

RANKS = (1, 5, 10, 20, 50)


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write the page of one or more run folders to `out`, whole or not at all.

    What a run does not have (no mining yet, no retrieval yet, videos gone) is said in a sentence in its place.

    Raises:
        InputError: a folder without metrics.jsonl, or with an empty one; the message names it.
    """
    loaded = [Run(Path(folder)) for folder in runs]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cpr_fast.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": _percent, "number": _number, "breakable": _breakable}
    page = environment.get_template("page.html.j2").render(
        runs=[_section(run) for run in loaded],
        comparison=comparison(loaded) if len(loaded) > 1 else None,
        published=published_beside(loaded),
        ranks=RANKS,
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, out)
    return out


def _section(run: Run) -> dict[str, Any]:
    """Everything the template shows of one run."""
    classes = class_rates(run)
    return {
        "run": run,
        "tiles": _tiles(run),
        "retrieval": retrieval_blocks(run),
        "retrieved": retrieved_sheet(run),
        "classified": classification_rows(run),
        "mining_figures": mining_figures(run),
        "inside_figures": inside_figures(run),
        "mined": mined_sheets(run),
        "class_rates": classes,
        "extremes": extremes(classes["classes"]) if classes else None,
        "training_figures": training_figures(run),
        "speed": run.speed(),
        "cycles": [cycle_row(cycle) for cycle in run.cycles],
        "config": flat_config(run.config),
        "skipped": max((row.get("skipped") or 0 for row in run.epochs), default=0),
    }


def _tiles(run: Run) -> list[dict[str, Any]]:
    """The few numbers to see first: value, a line about it, and whether that line is good news (None: neither)."""
    tiles = []
    if (best := run.headline()) and best.get("r@1") is not None:
        note, good = "", None
        if other := run.best_other():
            good = best["r@1"] > other["r@1"]
            note = f"best of the others {_percent(other['r@1'])} ({MODEL_NAMES[other['name']].lower()})"
        name = f"R@1, {VIEW_NAMES[best['view']]}"
        tiles.append({"name": name, "value": _percent(best["r@1"]), "note": note, "good": good})
    for task, name in (("probe", "Linear probe"), ("finetune", "Finetuned")):
        if found := run.accuracy(task):
            view = f"{name}, {VIEW_NAMES[found['view']]}"
            note = f"accuracy, recipe {found['recipe']}"
            tiles.append({"name": view, "value": _percent(found["accuracy"]), "note": note, "good": None})
    tiles += _mining_tiles(run)
    if speed := run.speed():
        wait = speed["data_wait_s"] / max(1e-9, speed["data_wait_s"] + speed["step_time_s"])
        note = f"{_percent(wait)} of a step waits for data"
        tiles.append({"name": "Clips per second", "value": _number(speed["clips_per_s"]), "note": note, "good": None})
    return tiles


def _mining_tiles(run: Run) -> list[dict[str, Any]]:
    mined = [row for row in run.epochs if row.get("pmr") is not None]
    mining = [row for row in mined if row["view"] == mined[-1]["view"]]
    if not mining:
        return []
    last, chance = mining[-1], run.chance_pmr
    note = f"first mining epoch {_percent(mining[0]['pmr'])}"
    note += f", chance {_percent(chance)}" if chance is not None else ""
    good = last["pmr"] > chance if chance is not None else None
    name = f"PMR, {VIEW_NAMES[last['view']]}, last epoch"
    tiles = [{"name": name, "value": _percent(last["pmr"]), "note": note, "good": good}]
    if last.get("cmr_median") is not None:
        note = "sources of a class that were mined"
        name, value = "Median CMR, last epoch", _percent(last["cmr_median"])
        tiles.append({"name": name, "value": value, "note": note, "good": None})
    return tiles


def _breakable(name: str) -> Markup:
    """A class name that may break between its words: CamelCase, snake_case and kebab-case."""
    return Markup(re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[_-])", "<wbr>", str(escape(name))))


def _percent(rate: float | None, unit: str = " %") -> str:
    return "–" if rate is None else f"{100 * rate:.1f}{unit}"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"
