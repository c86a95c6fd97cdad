"""Types of command-line options that several commands share."""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import tyro

from cpr_fast.commands.inputs import unknown_option

# Of a positional list: the command itself refuses an empty one, and the help would show an empty default.
REQUIRED = tyro.conf.arg(help_behavior_hint="(required)")
CheckpointFiles = Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="CHECKPOINT",
        help_behavior_hint="(required)",
        help="A checkpoint of `pretrain` or `import-checkpoint`: FILE, or one for each view: rgb=FILE flow=FILE.",
    ),
]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Json = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Print one JSON object on stdout.")]
# The names of `cpr_fast.evaluate.features.recipe`, repeated here so that the command line need not import that module.
RecipeName = Literal["paper", "coclr", "iic"]


def require_known_options(command: str, run: Callable[..., Any], arguments: Sequence[str]) -> None:
    """Checks the options of a command line against the parameters of `run`, the function of the command.

    Raises InputError with the most similar option for a word that looks like an option and is none. The parser would
    complain about missing arguments first, and suggests nothing for short names.
    """
    known = {"--help", "-h"}
    for name, hint in typing.get_type_hints(run, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        if name == "return" or tyro.conf.Positional in marks:
            continue
        renamed = [mark.name for mark in marks if getattr(mark, "name", None)]
        option = (renamed or [name])[0].replace("_", "-")
        known.add(f"--{option}")
        if hint is bool:
            known.add(f"--no-{option}")
    for word in arguments:
        if word[:1] == "-" and word.lstrip("-")[:1].isalpha():
            option = word.partition("=")[0]
            if option.replace("_", "-") not in known:
                raise unknown_option(option, known, otherwise=f"`cpr-fast {command} --help` lists the options")
