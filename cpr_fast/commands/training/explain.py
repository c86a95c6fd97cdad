"""`cpr-fast explain`."""

from __future__ import annotations

from pathlib import Path

from cpr_fast.commands.output import show
from cpr_fast.commands.training.pretrain import parse, settings
from cpr_fast.config import load
from cpr_fast.config.recipes import FOLDER, find_config, pretrain_command, recipes
from cpr_fast.errors import InputError
from cpr_fast.runtime.files import new_run_folder

FLAGS = ("--all", "--json", "--help", "-h")

HELP = """usage: cpr-fast explain CONFIG [--section.key VALUE ...]

Print what a recipe does, on one screen: data, clips, augmentation, network, memory, mining, loss and the steps of every
cycle; with --all also the evaluation and every deviation from the paper and the published code. CONFIG is a TOML file,
a run's config.json, or the name of a recipe, such as cpr_ucf101; `cpr-fast recipes` lists the recipes. Settings can be
changed on the command line as in `cpr-fast pretrain`.

options:
  --epochs N             Explain a run of N epochs in all, as `pretrain --epochs N` trains it.
  --all                  Also print the evaluation and every deviation.
  --json                 Print one JSON object on stdout.
"""


def parse_and_run(arguments: list[str]) -> None:
    """Runs `explain`: reads CONFIG, applies the changes of the command line, and prints what the config does."""
    given = parse(arguments, command="explain", flags=FLAGS)
    if given.flags & {"-h", "--help"}:
        print(HELP, end="")
        return
    if given.config is None:
        raise InputError("CONFIG: expected a TOML file or the name of a recipe, got none; see `cpr-fast recipes`")
    path = find_config(given.config)
    config = settings(load(path), given, command="explain")
    is_recipe = path.parent == FOLDER
    name = path.stem if is_recipe else str(Path(given.config))

    from cpr_fast.experiments.explain.page import explain

    lines, result = explain(config, name, recipes()[name] if is_recipe else "", whole="--all" in given.flags)
    named, run = [word for word in arguments if word not in FLAGS], Path(config.run.out)
    trained = pretrain_command(named, run, new_run_folder(run))
    show(result, "--json" in given.flags, lines=lines, next_step=trained)
