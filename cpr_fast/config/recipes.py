"""The recipes that come with the package, found by their bare name from any folder."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from cpr_fast.config.sections import ConfigError
from cpr_fast.wording import expected, similar_path

FOLDER = Path(__file__).resolve().parents[1] / "configs"
SUFFIXES = (".toml", ".json")  # of a recipe, and of the settings in a run folder


def recipes() -> dict[str, str]:
    """Returns the name of every recipe with the start of its description, up to the first line that ends a sentence."""
    return {file.stem: _description(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.toml"))}


def _description(text: str) -> str:
    said: list[str] = []
    for line in text.split("\n"):
        said.append(line.lstrip("# "))
        if not said[-1] or said[-1].endswith("."):
            break
    return " ".join(said).strip()


def init_command(index: str | Path) -> str:
    """Returns the command that writes a recipe for an index. It names the recipe where the default name, recipe.toml,
    is taken, because `init` replaces no file."""
    names = ("recipe.toml", *(f"{Path(index).stem}{number}.toml" for number in ("", *range(2, 100))))
    name = next((name for name in names if not os.path.lexists(name)), names[0])
    return f"cpr-fast init {shlex.quote(str(index))}" + (f" --out {shlex.quote(name)}" if name != names[0] else "")


def pretrain_command(arguments: Iterable[str], run: str | Path, new: str | Path) -> str:
    """Returns the command that trains a recipe, which `arguments` name, perhaps with settings.

    Args:
        run: The run folder of these settings.
        new: The folder that a new run can have: `run`, or another one if `run` holds a run already.
    """
    other = [] if Path(run) == Path(new) else ["--run.out", str(new)]
    return shlex.join(["cpr-fast", "pretrain", *arguments, *other])


def retrieve_command(run: str | Path, index: str | Path, *, published: bool = False) -> str:
    """Returns the command that evaluates a run on an index: on 5 windows of each video, or on all, as published. The
    index may be a store of features, which is a folder."""
    checkpoint = shlex.quote(f"{run}/checkpoints/last.pt")
    return f"cpr-fast retrieve {checkpoint} --index {shlex.quote(str(index))}" + (
        "" if published or os.path.isdir(index) else " --clips 5"
    )


def program(processes: int) -> str:
    """Returns how a command begins that this number of processes of one machine run together."""
    return "cpr-fast" if processes == 1 else f"torchrun --nproc-per-node {processes} -m cpr_fast"


def resume_command(run: str | Path, *, option: str = "--resume", processes: int = 1) -> str:
    """Returns the command that continues a run with the settings in its config.json. It names the run folder by its
    absolute path, so it works from any folder, and after the run folder was moved."""
    folder = os.path.abspath(run)
    settings = os.path.join(folder, "config.json")
    return f"{program(processes)} pretrain {shlex.quote(settings)} --run.out {shlex.quote(folder)} {option}"


def find_config(name: str | Path) -> Path:
    """Returns the path of a config: an existing file, or a recipe by its name, such as "cpr_ucf101".

    Raises ConfigError with a suggestion if neither exists. A name that ends in .toml or .json, or that holds a slash,
    is that of a file.
    """
    path = Path(name)
    if os.path.isfile(path):  # False also for a name that is too long
        return path
    known = recipes()
    if path.parent == Path(".") and path.name.removesuffix(".toml") in known:
        return FOLDER / f"{path.name.removesuffix('.toml')}.toml"
    if path.suffix or "/" in str(name) or os.path.lexists(path):
        sentence = f"CONFIG: {expected('a recipe (a TOML file)', name)}".partition("; did you mean")[0]
        otherwise = "`cpr-fast init INDEX.csv` writes a recipe for your videos"
    else:
        sentence = f"CONFIG: expected a TOML file or the name of a recipe, got {str(name)!r}, which is neither"
        otherwise = "`cpr-fast recipes` lists the recipes"
    close = _similar(str(name), known)
    raise ConfigError(f"{sentence}; {f'did you mean {close}?' if close else otherwise}")


def _similar(name: str, known: Iterable[str]) -> str:
    """Returns what a user may have meant by the name of a config that is no file: a config of a similar name, or else a
    recipe that comes with the package, or "" if there is neither."""
    if os.path.isdir(name):
        settings = os.path.join(name, "config.json")
        return repr(settings) if os.path.isfile(settings) else ""
    for other in (name, *(f"{stem}{suffix}" for suffix in SUFFIXES for stem in (name, os.path.splitext(name)[0]))):
        if file := similar_path(other):
            return repr(file)
    return next((f"the recipe {name!r}" for name in difflib.get_close_matches(Path(name).stem, known, n=1)), "")
