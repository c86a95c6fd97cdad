"""The findings of `doctor` with their advice: their order, and functions that print them as tables."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from cpr_fast.data.index.summary import splits_of
from cpr_fast.wording import counted, printable

Level = Literal["ok", "warning", "error"]
Effect = Literal["fails", "settings", "results", "time", "capacity", "note"]

LEVELS: tuple[Level, ...] = ("error", "warning", "ok")
EFFECTS: dict[Effect, str] = {  # what a finding affects, the most important first
    "fails": "a command fails",
    "settings": "`pretrain` fails with these settings",
    "results": "changes results",
    "time": "costs time",
    "capacity": "disk or memory",
    "note": "for information",
}
COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


@dataclass(frozen=True)
class Finding:
    """One fact about the machine or the data, with what to do about it ("" if there is nothing to do)."""

    level: Level
    text: str
    advice: str = ""
    effect: Effect = "note"


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Returns the findings by level, then by effect: the ones to act on first come first."""
    places = list(EFFECTS)
    return sorted(findings, key=lambda finding: (LEVELS.index(finding.level), places.index(finding.effect)))


def show(result: dict[str, Any], *, tables: bool = False) -> None:
    """Prints the result of `doctor` to stdout: with `tables` everything that was measured, and last the findings, the
    ones to act on first, so that they are on the screen when the command ends."""
    from rich.console import Console

    console = Console()
    if tables:
        _show_tables(console, result)
    for line in _context(result):
        console.print(printable(line), highlight=False, markup=False, soft_wrap=True)
    _show_findings(console, result["findings"])


def _context(result: dict[str, Any]) -> list[str]:
    """Returns two lines: counts of the videos, classes and sources; and the settings that the data are judged with."""
    lines = []
    if data := result["data"]:
        splits = ("splits: " if any(data["splits"]) else "") + splits_of(data["splits"])
        counts = [counted(data["videos"], "video"), counted(data["classes"], "class", "classes")]
        lines.append(f"Data: {', '.join(counts)}, {counted(data['sources'], 'source')}; {splits}")
    if result.get("judged"):
        lines.append(f"The data are {result['judged']}")
    return lines


def _show_tables(console: Any, result: dict[str, Any]) -> None:
    _show_machine(console, result)
    for title, facts in (("Data", result["data"]), ("Estimates", result["estimates"])):
        if facts:
            console.print(_facts(title, facts))
    if result["breakdown"]:
        stages = _table("Time of a training step", "stage", "seconds per step")
        for stage, value in result["breakdown"]["stage_s_per_step"].items():
            stages.add_row(stage, f"{value:.4g}")
        stages.add_row("loader alone", f"{result['breakdown']['loader_s_per_step']:.4g}")
        console.print(stages)


def _show_machine(console: Any, result: dict[str, Any]) -> None:
    about, kernels = result["environment"], result["kernels"]
    machine = {
        "device": about["device"],
        **result["machine"],
        "kernels": kernels.get("cpu_variant", "not built"),
        "CUDA kernels": _cuda_kernels(kernels),
        "versions": ", ".join(f"{name} {number}" for name, number in (about["versions"] | about["packages"]).items()),
    }
    console.print(_facts("Machine", machine))
    if result["codecs"]:
        codecs = _table("Codecs, by decoding a test video", "codec", "PyAV", "DALI")
        for row in result["codecs"]:
            codecs.add_row(*(_plain(row[key]) for key in ("codec", "pyav", "dali")))
        console.print(codecs)
    missing = [row for row in result["optional"] if not row["installed"]]
    if missing:
        parts = _table("Optional parts that are not installed", "part", "needed for", "install with")
        for row in missing:
            parts.add_row(*(_plain(row[key]) for key in ("part", "needed_for", "install")))
        console.print(parts)


def _cuda_kernels(kernels: dict[str, Any]) -> str:
    """Returns the GPU architectures of this build and what its version of CUDA needs, or "none"."""
    if not kernels.get("cuda_architectures"):
        return "none"
    architectures = ", ".join(kernels["cuda_architectures"])
    return f"{architectures}; CUDA {kernels['cuda_version']}, driver {kernels['cuda_oldest_driver']} or newer"


def _show_findings(console: Any, findings: list[dict[str, str]]) -> None:
    """Prints the findings as a numbered list, because a table would truncate long paths."""
    to_do = [finding for finding in findings if finding["level"] != "ok"]
    console.print("What to change, most important first" if to_do else "Nothing to change", style="bold")
    for number, finding in enumerate(findings, 1):
        colour, effect = COLOURS[finding["level"]], EFFECTS[finding["effect"]]
        note = "" if finding["level"] == "ok" else f" ({effect})"
        console.print(f"{number:3}. [{colour}]{finding['level']}[/]{note}: ", end="", highlight=False)
        console.print(printable(finding["text"]), highlight=False, markup=False, soft_wrap=True)
        if finding["advice"]:
            console.print(printable(f"     -> {finding['advice']}"), highlight=False, markup=False, soft_wrap=True)


def _facts(title: str, facts: dict[str, Any]) -> Any:
    table = _table(title, "", "")
    table.show_header = False
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key or 'no name'}: {amount}" for key, amount in value.items())
        elif isinstance(value, list):
            value = len(value)
        elif isinstance(value, bool):
            value = "yes" if value else "no"
        table.add_row(name.replace("_", " "), _plain("unknown" if value is None else str(value)))
    return table


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _plain(text: str) -> Any:
    """Returns text in which rich does not interpret markup, because file names may contain square brackets."""
    from rich.text import Text

    return Text(printable(str(text)))
