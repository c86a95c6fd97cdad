"""Chooses the settings that an index is judged with: those of a named recipe, of the recipe made for that index, or
those that `cpr-fast init` would choose."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cpr_fast.config import Config, ConfigError, load
from cpr_fast.config.recipes import init_command, pretrain_command
from cpr_fast.data.index.index import Index
from cpr_fast.doctor.findings import Finding
from cpr_fast.errors import InputError
from cpr_fast.experiments.sizing import Facts, sized_recipe, usable_cores
from cpr_fast.runtime.files import new_run_folder

LARGEST = 2**20  # bytes; a larger file is not a recipe
MARK = "written by `cpr-fast init`"


class Recipe(NamedTuple):
    """The settings that an index is judged with.

    Attributes:
        config: None where there is no recipe, and `init` writes none for such an index.
        path: The file that the settings are from; None if they are those that `init` would choose.
        said: A sentence about this choice, which follows "The data are"; "" if there is none.
        next_step: The command to run next if nothing is wrong.
    """

    config: Config | None
    path: Path | None
    said: str
    next_step: str


def choose_recipe(index: Path | None, named: Path | None, findings: list[Finding], *, gpu: bool = False) -> Recipe:
    """Returns the recipe `named`, or the only recipe that names `index` beside the index or in the working directory,
    or what `init` would choose if there is no such recipe or several.

    A recipe of `cpr-fast init` that cannot be read is reported in `findings`.

    Args:
        gpu: Whether training would run on a GPU.
    """
    if named is not None:
        config = load(named)
        said = f"judged with the settings of {named} (--config)"
        return Recipe(config, named, said, _pretrain(named, config))
    if index is None:
        return Recipe(None, None, "", "cpr-fast index VIDEOS --out index.csv")
    found = dict(recipes_of(index, findings))
    if len(found) == 1:
        ((path, config),) = found.items()
        return Recipe(config, path, f"judged with the settings of {path}, which names this index; to judge another "
                      "recipe: --config RECIPE.toml", _pretrain(path, config))  # fmt: skip
    sized = _sized(index, gpu)
    if found:
        next_step = f"cpr-fast doctor {shlex.quote(str(index))} --config {shlex.quote(str(next(iter(found))))}"
        which = f"several recipes name this index ({', '.join(map(str, found))}); --config chooses one"
    else:
        next_step = init_command(index)
        which = f"no recipe names this index; `{next_step}` writes one"
    said = f"judged with the settings that `cpr-fast init` would choose: {which}" if sized else ""
    return Recipe(sized, None, said, next_step)


def _pretrain(recipe: Path, config: Config) -> str:
    run = Path(config.run.out)
    return pretrain_command([str(recipe)], run, new_run_folder(run))


def _sized(index: Path, gpu: bool) -> Config | None:
    """Returns the settings that `init` would choose, or None if it would refuse the index, for a reason that the checks
    of the index report."""
    try:
        videos = Index.load(index, require_flow=False, skipped=[])
        return sized_recipe(Facts.of(videos, cores=usable_cores(), gpu=gpu), str(index), "runs/mine").config
    except (InputError, OSError, ValueError):
        return None


def recipes_of(index: Path, findings: list[Finding]) -> Iterator[tuple[Path, Config]]:
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
