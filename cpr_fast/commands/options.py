"""Types of command-line options that several commands share."""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from cpr_fast.commands.inputs import unknown_option
from cpr_fast.errors import InputError


def required(metavar: str) -> Any:
    """Returns what the help says about a positional list, whose name in usage lines is `metavar`. The command itself
    refuses an empty one, and the help would show an empty default."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="(required)")


CheckpointFiles = Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="CHECKPOINT",
        help_behavior_hint="(required)",
        help="A checkpoint of `pretrain` or `import-checkpoint`: FILE, or one for each view: rgb=FILE flow=FILE.",
    ),
]
# An index that the command reads; the name in the help is the one that its errors and the README use.
IndexPath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Json = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Print one JSON object on stdout.")]
PicturesFps = Annotated[
    float | None,
    tyro.conf.arg(
        help="Frames per second of extracted frames and LMDB records, which do not state it, for a network that "
        "samples videos by time (data.fps); by default data.pictures_fps of its training."
    ),
]
# The names of `cpr_fast.evaluate.features.recipe`, repeated here so that the command line need not import that module.
RecipeName = Literal["paper", "coclr", "iic"]


def require_known_options(command: str, run: Callable[..., Any], arguments: Sequence[str]) -> None:
    """Checks the options of a command line, and their values, against the parameters of `run`, the function of the
    command.

    Raises InputError with the most similar option for a word that looks like an option and is none, and with what is
    expected for a value that is no number or none of the choices. The parser would complain about missing arguments
    first, suggests nothing for short names, and describes values in the words of Python's types.
    """
    known: dict[str, Any] = {"--help": None, "-h": None}
    for name, hint in typing.get_type_hints(run, include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        if name == "return" or tyro.conf.Positional in marks:
            continue
        renamed = [mark.name for mark in marks if getattr(mark, "name", None)]
        option = (renamed or [name])[0].replace("_", "-")
        known[f"--{option}"] = hint
        if hint is bool:
            known[f"--no-{option}"] = None
    option = ""
    for word in arguments:
        if word[:1] == "-" and word.lstrip("-")[:1].isalpha():
            name, equals, value = word.partition("=")
            option = name.replace("_", "-")
            if option not in known:
                raise unknown_option(name, known, otherwise=f"`cpr-fast {command} --help` lists the options")
            if equals:
                _require_value(option, known[option], value)
                option = ""
        elif option:
            _require_value(option, known[option], word)
            option = option if "tuple" in str(known[option]) else ""  # the next word is positional


def _require_value(option: str, hint: Any, value: str) -> None:
    """Raises InputError if the value is no number where `hint` wants one, or none of its choices."""
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    parts = typing.get_args(hint) or (hint,)
    if value == "None" and type(None) in parts:
        return
    wanted = [part for part in parts if part is not type(None) and part is not Ellipsis]
    if typing.get_origin(hint) is Literal:
        choices = wanted
    elif wanted and typing.get_origin(wanted[0]) is Literal:
        choices = list(typing.get_args(wanted[0]))
    else:
        choices = []
    if choices:
        if value not in map(str, choices):
            raise InputError(f"{option}: expected one of {', '.join(map(str, choices))}, got {value!r}")
        return
    for kind, name in ((int, "a whole number"), (float, "a number")):
        if wanted == [kind]:
            try:
                kind(value)
            except ValueError:
                raise InputError(f"{option}: expected {name}, got {value!r}") from None
