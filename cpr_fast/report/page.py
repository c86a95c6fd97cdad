"""Writes the report of run folders: one self-contained HTML page without scripts or network access."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from cpr_fast.evaluate.retrieval.names import percent, without_copies
from cpr_fast.report.run_folder.outcome import verdict
from cpr_fast.report.run_folder.run import Run
from cpr_fast.report.run_folder.unfinished import unfinished
from cpr_fast.report.sections.beside import published_beside
from cpr_fast.report.sections.classification import classification_table, confusions
from cpr_fast.report.sections.comparison import comparison
from cpr_fast.report.sections.header import RATE, TERMS, facts, headline, tiles
from cpr_fast.report.sections.mining import (
    chosen_cascades,
    class_rates,
    extremes,
    inside_figures,
    mining_figures,
    no_rates,
)
from cpr_fast.report.sections.retrieval import retrieval_blocks, same_video_table
from cpr_fast.report.sections.sheets import mined_sheets, retrieved_sheet
from cpr_fast.report.sections.training import cycle_table, flat_config, training_figures
from cpr_fast.report.unlabelled import Compared, signs
from cpr_fast.runtime.files import replacing


def write_report(
    runs: Sequence[Path], out: Path, *, similar: Path | None = None, compared: Compared | None = None
) -> Path:
    """Writes the page of one or more run folders to `out`; the file is written completely or not at all.

    If a part of a run is missing (no mining or retrieval yet, videos that no longer exist), a sentence states the
    reason.

    Args:
        similar: the page of similar, duplicated and odd videos of the first run, to be linked.
        compared: the videos of the index of the first run, where they are compared with each other already.
    Raises:
        InputError: a folder has no metrics.jsonl, or an empty one; the message names it.
    """
    loaded = [Run(Path(folder)) for folder in runs]
    published = published_beside(loaded)
    page = render(
        "page.html.j2",
        runs=[_section(run, compared if run is loaded[0] else None) for run in loaded],
        comparison=comparison(loaded) if len(loaded) > 1 else None,
        published=published,
        same_data=any(block.same_data for block in published),
        terms=TERMS,
        similar=None if similar is None else os.path.relpath(similar, Path(out).parent),
    )
    return write_page(page, Path(out))


def render(template: str, **values: Any) -> str:
    """Fills a template of this folder."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cpr_fast.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "number": _number, "breakable": _breakable}
    return environment.get_template(template).render(**values)


def write_page(page: str, out: Path) -> Path:
    """Writes a page; the file gets its final name only when it is complete. Bytes of file names that are not UTF-8
    become \\xNN."""
    text = page.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    with replacing(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return out


def _section(run: Run, compared: Compared | None) -> dict[str, Any]:
    """Returns all values that the template shows for one run."""
    classes = class_rates(run)
    no_labels = run.index is not None and not run.index.classes
    mined = mined_sheets(run)
    return {
        "run": run,
        "facts": facts(run),
        "unfinished": unfinished(run),
        "verdict": verdict(run),
        "headline": signs(run, compared) if run.unlabelled else headline(run),
        "tiles": tiles(run),
        "retrieval": retrieval_blocks(run),
        "same_video": same_video_table(run),
        "copies": without_copies(run.same_video[0].get("copies")) if run.same_video else "",
        "retrieved": retrieved_sheet(run),
        "classified": classification_table(run),
        "confusions": confusions(run),
        "mining_figures": mining_figures(run),
        "inside_figures": inside_figures(run),
        "chosen": chosen_cascades(run),
        "mined": mined,
        "judged": any(
            clip["correct"] is not None for sheet in mined for line in sheet["queries"] for clip in line["found"]
        ),
        "no_rates": no_rates(run, no_labels),
        "class_rates": classes,
        "extremes": extremes(classes["classes"]) if classes else None,
        "training_figures": training_figures(run),
        "speed": run.speed(),
        "rate": RATE,
        "cycles": cycle_table(run, no_labels),
        "config": flat_config(run.config),
        "skipped": max((row.get("skipped") or 0 for row in run.epochs), default=0),
        "chance_pmr": run.chance_pmr,
        "unlabelled": run.unlabelled,
        "evaluate": run.evaluation_command,
    }


def _breakable(name: str) -> Markup:
    """Returns a class name in which lines may break between the words: CamelCase, snake_case and kebab-case."""
    return Markup(re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[_-])", "<wbr>", str(escape(name))))


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"
