"""The deviations of this package from the paper and from the published code: the rows of `fidelity.toml`.

`docs/fidelity.md` shows all of them, and `cpr-fast explain` those that concern a recipe. The tables of that page are
written by `python -m cpr_fast.experiments.fidelity docs/fidelity.md`, from these rows and from the recipes.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import sys
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpr_fast.config import Config, Cycle, load
from cpr_fast.config.recipes import find_config, recipes

FILE = Path(__file__).with_suffix(".toml")
HEADER = ("", "subject", "paper", "published code", "ours", "why", "setting or file")
RECIPE_HEADER = (
    "recipe", "frames", "stride", "size", "augment", "crop_attempts", "flow_colour", "grayscale", "short_videos",
    "batch x GPUs", "memory", "stages", "ratio", "top_k", "protocol", "cycles", "milestones", "deviates in",
)  # fmt: skip


@dataclass(frozen=True)
class Deviation:
    """A deviation of this package from the paper or from the published code.

    Attributes:
        id: The letter of its group and its number in the group, such as "M3".
        group: The name of its group.
        subject: What is done differently.
        paper, code, ours: What the paper says, what the published code does, and what this package does.
        why: The reason.
        where: The setting, or the file, that decides what this package does.
        when: The runs that it concerns: for each of these `facts`, one of the patterns must match.
    """

    id: str
    group: str
    subject: str
    paper: str
    code: str
    ours: str
    why: str
    where: str
    when: dict[str, list[Any]]

    def concerns(self, known: dict[str, set[Any]]) -> bool:
        """Returns whether the deviation concerns a run with these facts."""
        return all(
            any(fnmatch.fnmatchcase(str(value), str(pattern)) for value in known[name] for pattern in patterns)
            for name, patterns in self.when.items()
        )


def deviations() -> list[Deviation]:
    """Returns all deviations, group by group."""
    return [
        Deviation(
            id=f"{group['letter']}{number}", group=group["name"], **row | {"when": _patterns(row.get("when", {}))}
        )
        for group in tomllib.loads(FILE.read_text(encoding="utf-8"))["group"]
        for number, row in enumerate(group["deviation"], 1)
    ]


def _patterns(when: dict[str, Any]) -> dict[str, list[Any]]:
    return {name: value if isinstance(value, list) else [value] for name, value in when.items()}


def concerning(config: Config, recipe: str = "") -> list[Deviation]:
    """Returns the deviations that concern a config; `recipe` is its name if it comes with the package."""
    known = facts(config, recipe)
    return [deviation for deviation in deviations() if deviation.concerns(known)]


def facts(config: Config, recipe: str = "") -> dict[str, set[Any]]:
    """Returns the facts of a config that decide which deviations concern it, each with its values.

    These are all settings but the tables, such as "memory.kind", and `recipe`, the `view`s that are read, the `mining`
    of the cycles, and `stages`: "even" or "odd".
    """
    cycles = config.schedule.cycles
    settings = {
        f"{section.name}.{key}": {value}
        for section in dataclasses.fields(config)
        for key, value in vars(getattr(config, section.name)).items()
        if not isinstance(value, dict)
    }
    return settings | {
        "recipe": {recipe},
        "view": {view for cycle in cycles for view in cycle.views(shared=config.model.shared)},
        "mining": {cycle.mining for cycle in cycles},
        "stages": {"odd" if config.mining.stages == "auto" or config.mining.stages % 2 else "even"},
    }


def deviation_table() -> str:
    """Returns the table of all deviations in Markdown, with a row for the name of every group."""
    rows, group = [], ""
    for row in deviations():
        if row.group != group:
            group = row.group
            rows.append([f"**{row.id[0]}**", f"**{group}**", *[""] * (len(HEADER) - 2)])
        rows.append([row.id, row.subject, row.paper, row.code, row.ours, row.why, f"`{row.where}`"])
    return _markdown(HEADER, rows)


def recipe_table() -> str:
    """Returns the settings of every recipe, and the deviations that concern it, in Markdown."""
    return _markdown(RECIPE_HEADER, (_recipe_row(name, load(find_config(name))) for name in recipes()))


def _recipe_row(name: str, config: Config) -> list[str]:
    data, cycles = config.data, config.schedule.cycles
    mines = any(cycle.mining == "cascade" for cycle in cycles)
    top_k = dict.fromkeys(config.mining.top_k if cycle.top_k is None else cycle.top_k for cycle in cycles)
    shared = config.model.shared
    views = [" + ".join(cycle.views(shared=shared) if shared else [cycle.view]) for cycle in cycles]
    cascade = [str(config.mining.stages), f"{config.mining.ratio:g}", ", ".join(map(str, top_k))]
    return [
        f"`{name}`", str(data.frames), str(data.stride), str(data.size), data.augment, str(data.crop_attempts),
        "yes" if data.flow_colour else "no", data.grayscale, data.short_videos,
        f"{data.batch_size} x {config.memory.shuffle_bn_groups or 1}",
        f"queue {config.memory.size}" if config.memory.kind == "queue" else config.memory.kind,
        *(cascade if mines else ["", "", ""]),
        config.loss.protocol,
        _joined([f"{view} {cycle.epochs} {cycle.mining}" for view, cycle in zip(views, cycles, strict=True)]),
        _joined([_falls(cycle, config) for cycle in cycles]),
        ranges(row.id for row in concerning(config, name)),
    ]  # fmt: skip


def _falls(cycle: Cycle, config: Config) -> str:
    """Returns the epochs at which the learning rate of a cycle drops, or "cosine"."""
    if cycle.applied_to(config.optim).schedule == "cosine":
        return "cosine"
    return " ".join(map(str, cycle.milestones))


def _joined(values: Sequence[str]) -> str:
    """Returns the values of the cycles: once if all are equal."""
    same = len(values) > 1 and len(set(values)) == 1
    return f"{len(values)} x ({values[0]})" if same else "; ".join(values)


def ranges(ids: Iterable[str]) -> str:
    """Returns ids with consecutive numbers joined: D1, D2, D3, M2 -> "D1-3 M2"."""
    joined: list[tuple[str, int, int]] = []
    for text in ids:
        letter, number = text[0], int(text[1:])
        if joined and joined[-1][0] == letter and joined[-1][2] == number - 1:
            joined[-1] = (letter, joined[-1][1], number)
        else:
            joined.append((letter, number, number))
    return " ".join(f"{letter}{first}" + (f"-{last}" if last > first else "") for letter, first, last in joined)


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines).replace("|  |", "| |").replace("|  |", "| |")


def with_tables(page: str) -> str:
    """Returns the text of docs/fidelity.md with its two tables, below their headings, replaced by new ones."""
    for heading, table in {"## Deviations": deviation_table(), "## Recipes": recipe_table()}.items():
        before, mark, after = page.partition(f"\n{heading}\n")
        text, bar, rest = after.partition("\n| ")
        below = (bar + rest).lstrip("\n").split("\n")
        kept = next((i for i, line in enumerate(below) if not line.startswith("|")), len(below))
        page = before + mark + text + "\n" + table + "\n".join(below[kept:])
    return page


if __name__ == "__main__":
    for name in sys.argv[1:]:
        file = Path(name)
        file.write_text(with_tables(file.read_text(encoding="utf-8")), encoding="utf-8")
