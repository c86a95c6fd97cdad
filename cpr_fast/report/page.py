"""`write_report`: run folders in, one self-contained HTML page out (no network, no scripts)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from ..data.index import Video
from ..published import published_tables
from .clips import film_strip
from .figures import Band, Bar, Line, bar_figure, line_figure
from .runs import MODEL_NAMES, VIEW_NAMES, Cycle, Run

RANKS = (1, 5, 10, 20, 50)
SHEET_QUERIES = 6  # rows of a contact sheet
SERIES = {"rgb": 0, "flow": 1, "two_stream": 2}


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
        comparison=_comparison(loaded) if len(loaded) > 1 else None,
        published=published_tables().values(),
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
    return {
        "run": run,
        "tiles": _tiles(run),
        "retrieval": _retrieval_table(run),
        "retrieval_figure": _retrieval_figure(run),
        "retrieved": _retrieved_sheet(run),
        "mining_figures": _mining_figures(run),
        "mined": _mined_sheets(run),
        "class_rates": _class_rates(run),
        "training_figures": _training_figures(run),
        "speed": run.speed(),
        "cycles": [_cycle_row(cycle) for cycle in run.cycles],
        "config": _flat_config(run.config),
        "skipped": max((row.get("skipped") or 0 for row in run.epochs), default=0),
    }


def _tiles(run: Run) -> list[dict[str, str]]:
    """The few numbers to see first."""
    tiles = []
    if (best := run.headline()) and best.get("r@1") is not None:
        other = run.best_other()
        note = f"best of the others {_percent(other['r@1'])} ({MODEL_NAMES[other['name']].lower()})" if other else ""
        tiles.append({"name": f"R@1, {VIEW_NAMES[best['view']]}", "value": _percent(best["r@1"]), "note": note})
    mined = [row for row in run.epochs if row.get("pmr") is not None]
    mining = [row for row in mined if row["view"] == mined[-1]["view"]]
    if mining:
        chance = f", chance {_percent(run.chance_pmr)}" if run.chance_pmr is not None else ""
        tiles.append(
            {
                "name": f"PMR, {VIEW_NAMES[mining[-1]['view']]}, last epoch",
                "value": _percent(mining[-1]["pmr"]),
                "note": f"first mining epoch {_percent(mining[0]['pmr'])}{chance}",
            }
        )
        if mining[-1].get("cmr_median") is not None:
            value = _percent(mining[-1]["cmr_median"])
            tiles.append(
                {"name": "Median CMR, last epoch", "value": value, "note": "sources of a class that were mined"}
            )
    if speed := run.speed():
        wait = speed["data_wait_s"] / max(1e-9, speed["data_wait_s"] + speed["step_time_s"])
        note = f"{_percent(wait)} of a step waits for data"
        tiles.append({"name": "Clips per second", "value": _number(speed["clips_per_s"]), "note": note})
    return tiles


def _retrieval_table(run: Run) -> list[dict[str, Any]]:
    """The rows of the table, trained first, then by R@1."""
    rows = sorted(run.retrieval, key=lambda row: (row["name"] != "trained", -(row.get("r@1") or 0)))
    names = {"method": MODEL_NAMES, "view_name": VIEW_NAMES}
    return [
        row | {"method": names["method"][row["name"]], "view_name": names["view_name"][row["view"]]} for row in rows
    ]


def _retrieval_figure(run: Run) -> str | None:
    rows = [row for row in run.retrieval if row.get("r@1") is not None]
    bars = [
        Bar(
            f"{MODEL_NAMES[row['name']].split(',')[0]} · {VIEW_NAMES[row['view']]}",
            row["r@1"],
            tuple(row["r@1_ci95"]) if row.get("r@1_ci95") else None,
            0 if row["name"] == "trained" else 5,
        )
        for row in sorted(rows, key=lambda row: -row["r@1"])
    ]
    return bar_figure(bars, title="R@1, % (line: 95 % interval)") if bars else None


def _bands(run: Run, only_mining: bool = False) -> list[Band]:
    cycles = [c for c in run.cycles if c.epochs and (c.mining == "cascade" or not only_mining)]
    return [Band(c.epochs[0]["epoch"] - 0.5, c.epochs[-1]["epoch"] + 0.5, c.name) for c in cycles]


def _curves(run: Run, key: str, label: str = "", offset: int = 0) -> list[Line]:
    """One line per cycle of an epoch quantity, coloured by view; a view is named once."""
    lines: list[Line] = []
    for cycle in run.cycles:
        rows = [row for row in cycle.epochs if row.get(key) is not None]
        if rows:
            name = label or VIEW_NAMES[cycle.view]
            named = any(line.label == name for line in lines)
            x, y = [row["epoch"] for row in rows], [row[key] for row in rows]
            lines.append(Line("_" if named else name, x, y, SERIES[cycle.view] + offset))
    return lines


def _mining_figures(run: Run) -> list[str]:
    bands = _bands(run, only_mining=True)
    figures = []
    for key, title in (
        ("pmr", "PMR: share of mined clips that are right"),
        ("mining_r1", "Mining R@1: first mined clip is right"),
        ("cmr_median", "CMR: sources of a class mined, median"),
    ):
        lines = _curves(run, key)
        if lines and key == "pmr" and run.chance_pmr is not None:
            lines.append(Line("chance", [bands[0].start, bands[-1].end], [run.chance_pmr] * 2, 5, dashed=True))
        if lines:
            figures.append(line_figure(lines, x="epoch", y=title, percent=True, bands=bands))
    return figures


def _training_figures(run: Run) -> list[str]:
    figures = []
    if losses := _curves(run, "loss"):
        figures.append(line_figure(_step_losses(run) + losses, x="epoch", y="Loss", zero=False, bands=_bands(run)))
    if len(run.steps) > 1:
        steps = [row["step"] for row in run.steps]
        waits = Line("waiting for data", steps, [row.get("data_wait_s") for row in run.steps], 1, marker=False)
        computes = Line("computing", steps, [row.get("step_time_s") for row in run.steps], 0, marker=False)
        figures.append(line_figure([computes, waits], x="step", y="Seconds per step"))
        rate = Line("", steps, [row.get("clips_per_s") for row in run.steps], 2, marker=False)
        figures.append(line_figure([rate], x="step", y="Clips per second"))
    return figures


def _step_losses(run: Run) -> list[Line]:
    """Losses of single steps, faint, spread over their epoch so that its mean lies in the middle of them."""
    lines = []
    for cycle in run.cycles:
        per_epoch: dict[int, list[float | None]] = {}
        for row in cycle.steps:
            per_epoch.setdefault(row["epoch"], []).append(row["loss"])
        x = [epoch - 0.5 + (i + 0.5) / len(rows) for epoch, rows in per_epoch.items() for i in range(len(rows))]
        y = [loss for rows in per_epoch.values() for loss in rows]
        lines.append(Line("", x, y, SERIES[cycle.view], faint=True, marker=False))
    return lines


def _class_rates(run: Run) -> dict[str, Any] | None:
    """Best and worst classes by CMR in the last mining epoch, as the paper lists them: top 3 and bottom 3."""
    row = next((row for row in reversed(run.epochs) if row.get("cmr_per_class")), None)
    if row is None or run.index is None or len(run.index.classes) != len(row["cmr_per_class"]):
        return None
    rates = [(n, r) for n, r in zip(run.index.classes, row["cmr_per_class"], strict=True) if r is not None]
    rates.sort(key=lambda item: -item[1])
    full = sum(rate == 1 for _, rate in rates)
    return {"top": rates[:3], "bottom": rates[3:][-3:], "full": full, "classes": len(rates), "epoch": row["epoch"]}


def _mined_sheets(run: Run) -> list[dict[str, Any]]:
    """Per view, queries of the last mining epoch with what was mined for them."""
    sheets = []
    for view in ("rgb", "flow"):
        rows = [row for row in run.mined if row["view"] == view]
        last = [row for row in rows if row["epoch"] == rows[-1]["epoch"]][:SHEET_QUERIES]
        if last and run.index is not None:
            known = [r for r in last if all(0 <= c["video"] < len(run.index) for c in (r["query"], *r["mined"]))]
            queries = [
                {
                    "query": _clip(run, run.index[row["query"]["video"]], row["query"]["start"]),
                    "found": [_clip(run, run.index[c["video"]], c["start"], c["correct"]) for c in row["mined"]],
                }
                for row in known
            ]
            sheets.append({"title": f"{VIEW_NAMES[view]} queries, epoch {last[0]['epoch']}", "queries": queries})
    return sheets


def _retrieved_sheet(run: Run) -> dict[str, Any] | None:
    """Test queries with their nearest training videos."""
    if not run.retrieved:
        return None
    queries = [
        {
            "query": _whole_video(row["query"]),
            "found": [_whole_video(video, video["label"] == row["query"]["label"]) for video in row["nearest"]],
        }
        for row in run.retrieved[:SHEET_QUERIES]
    ]
    return {"title": f"Nearest neighbours, {VIEW_NAMES[run.retrieved[0]['view']]}", "queries": queries}


def _clip(run: Run, video: Video, start: int, correct: bool | None = None) -> dict[str, Any]:
    data = run.config["data"]
    strip = film_strip(video.path, video.num_frames, start, data["frames"] * data["stride"])
    return {"label": video.label, "source": video.source, "strip": strip, "correct": correct}


def _whole_video(video: dict[str, Any], correct: bool | None = None) -> dict[str, Any]:
    strip = film_strip(Path(video["path"]), video["num_frames"], 0, video["num_frames"])
    return {"label": video["label"], "source": video["source"], "strip": strip, "correct": correct}


def _cycle_row(cycle: Cycle) -> dict[str, Any]:
    """A line of the table of cycles: values of the first epoch that has them (the memory fills first) and the last."""
    row: dict[str, Any] = {"name": cycle.name, "epochs": len(cycle.epochs)}
    for key in ("loss", "pmr", "mining_r1"):
        values = [epoch[key] for epoch in cycle.epochs if epoch.get(key) is not None] or [None]
        row |= {f"{key}_first": values[0], f"{key}_last": values[-1]}
    return row | {"seconds": sum(epoch.get("epoch_time_s") or 0 for epoch in cycle.epochs)}


def _comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """Several runs beside each other: PMR over their mining epochs, and their headline rates."""
    lines = []
    for number, run in enumerate(runs):
        rows = [row for row in run.epochs if row.get("pmr") is not None]
        if rows:
            lines.append(Line(run.name, range(len(rows)), [row["pmr"] for row in rows], number))
    figure = line_figure(lines, x="mining epoch, all cycles", y="PMR", percent=True) if lines else None
    return {"figure": figure, "rows": [{"name": run.name, "best": run.headline()} for run in runs]}


def _flat_config(config: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Sections of (key, value); cycles as one line each."""
    sections = []
    for section, values in config.items():
        rows = [(key, str(value)) for key, value in values.items() if key != "cycles"]
        for number, cycle in enumerate(values.get("cycles", ())):
            rows.append((f"cycles[{number}]", ", ".join(f"{k} = {v}" for k, v in cycle.items() if v not in (None, []))))
        sections.append((section, rows))
    return sections


def _breakable(name: str) -> Markup:
    """A class name that may break between its words: CamelCase, snake_case and kebab-case."""
    return Markup(re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[_-])", "<wbr>", str(escape(name))))


def _percent(rate: float | None, unit: str = " %") -> str:
    return "–" if rate is None else f"{100 * rate:.1f}{unit}"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"
