"""Chooses the settings that an index is judged with: those of a named recipe, or of the recipe made for that index."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cpr_fast.config import Config, ConfigError, load
from cpr_fast.doctor.findings import Finding

LARGEST = 2**20  # bytes; a larger file is not a recipe
MARK = "written by `cpr-fast init`"


class Recipe(NamedTuple):
    """Settings, the file they are from (None: the defaults), and a sentence about this choice."""

    config: Config
    path: Path | None
    said: str


def choose_recipe(index: Path | None, named: Path | None, findings: list[Finding]) -> Recipe:
    """Returns the recipe `named`, or the only recipe that names `index` beside the index or in the working directory,
    or the defaults if there is no such recipe or several.

    A recipe of `cpr-fast init` that cannot be read is reported in `findings`.
    """
    if named is not None:
        return Recipe(load(named), named, f"judged with the settings of {named} (--config)")
    if index is None:
        return Recipe(Config(), None, "")
    found = dict(_recipes_of(index, findings))
    if len(found) == 1:
        ((path, config),) = found.items()
        return Recipe(config, path, f"judged with the settings of {path}, which names this index; to judge another "
                      "recipe: --config RECIPE.toml")  # fmt: skip
    defaults = "judged with the default settings, which suit ten thousand videos"
    if found:
        which = (
            f"several recipes name this index ({', '.join(map(str, found))}); choose one: --config {next(iter(found))}"
        )
    else:
        quoted = shlex.quote(str(index))
        which = f"no recipe names this index; `cpr-fast init {quoted}` writes one, --config RECIPE.toml names another"
    return Recipe(Config(), None, f"{defaults}: {which}")


def _recipes_of(index: Path, findings: list[Finding]) -> Iterator[tuple[Path, Config]]:
    """Yields the TOML files beside the index and in the working directory whose `data.index` is this index."""
    folders = {os.path.realpath(folder): folder for folder in (index.parent, Path())}
    for folder in folders.values():
        for path in sorted(folder.glob("*.toml")):
            try:
                if path.stat().st_size > LARGEST:
                    continue
                config = load(path)
                if config.data.index and os.path.samefile(config.data.index, index):
                    yield path, config
            except ConfigError as error:
                text = path.read_text(encoding="utf-8", errors="replace")
                if MARK in text and index.name in text:
                    findings.append(Finding("error", str(error), "correct it, or run `cpr-fast init` again", "fails"))
            except OSError:
                continue
