"""`cpr-fast pretrain`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shlex
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cpr_fast.commands.inputs import require_device, require_file, require_folder, unknown_option
from cpr_fast.config import Config, ConfigError, load
from cpr_fast.config.epochs import scale_epochs
from cpr_fast.config.recipes import FOLDER, find_config, retrieve_command
from cpr_fast.errors import InputError
from cpr_fast.wording import expected

if TYPE_CHECKING:
    from cpr_fast.data.index.index import Index

FLAGS = ("--resume", "--auto-resume", "--json", "--help", "-h", "--help-all", "--dump-memory", "--run.dump-memory")

ARGUMENTS = "--model.args."  # followed by the name of an argument that CONFIG has, whose kind is that of its value

# The settings that most runs change, for the short help.
COMMON = (
    "data.index",
    "data.features",
    "data.split",
    "data.batch_size",
    "data.workers",
    "data.flow",
    "data.fps",
    "memory.size",
    "mining.stages",
    "optim.precision",
    "run.out",
    "run.seed",
)

HELP = """usage: cpr-fast pretrain CONFIG [--section.key VALUE ...]

Pretrain encoders, without labels unless a cycle has mining = "label" (UberNCE). CONFIG is a TOML file, a run's
config.json, or the name of a recipe, such as cpr_ucf101; `cpr-fast recipes` lists the recipes. Every setting can be
changed on the command line. Under `torchrun` every process trains on its share of a batch.

options:
  --epochs N             Train for N epochs in all, shared among the cycles as in CONFIG.
  --resume               Continue from the last checkpoint of the run folder.
  --auto-resume          Continue if there is a checkpoint, and start otherwise; for jobs that are requeued.
  --dump-memory          Write RUN/memory/cycle-N.npz after every epoch, for `cpr-fast mine`.
  --json                 Print one JSON object on stdout.
  --help-all             List all settings.

settings that most runs change, with the values of {source}:
{settings}
"""


@dataclass
class Arguments:
    """The command line of `pretrain`, split into CONFIG, flags, and changes of settings."""

    config: str | None = None
    flags: set[str] = field(default_factory=set)
    epochs: int | None = None
    overrides: list[str] = field(default_factory=list)


def parse_and_run(arguments: list[str]) -> None:
    """Runs `pretrain`: reads CONFIG, applies the changes of the command line, and trains."""
    given = parse(arguments)
    wants_help = given.flags & {"-h", "--help", "--help-all"}
    if given.config is None:
        if wants_help:
            print(_help(Config(), "the defaults"))
            return
        raise InputError("CONFIG: expected a TOML file or the name of a recipe, got none; see `cpr-fast recipes`")
    path = find_config(given.config)
    config = load(path)
    if wants_help and "--help-all" not in given.flags:
        print(_help(config, given.config))
        return
    if "--help-all" in given.flags:
        given.overrides.append("--help")
    else:
        _require_inputs(config, given.overrides)
    config = settings(config, given, command="pretrain")
    resume = "auto" if "--auto-resume" in given.flags else "--resume" in given.flags
    if resume is True:
        _require_run(Path(config.run.out), path)
    from cpr_fast.runtime.busy import OtherPrograms
    from cpr_fast.runtime.progress import announce, announce_others

    others = OtherPrograms()
    index = _checked_videos(config, resume)
    announce("Loading PyTorch and NVIDIA DALI")
    from cpr_fast.commands.output import show_once
    from cpr_fast.pretrain.run.loop import pretrain

    announce_others(others)
    folder = pretrain(config, resume=resume, index=index)
    data = config.data.features or config.data.index
    evaluate = retrieve_command(folder, data, published=path.parent == FOLDER)
    show_once(
        {"run": str(folder.absolute())},
        "--json" in given.flags,
        lines=[f"run folder: {folder.absolute()}"],
        next_step=f"{evaluate}\ncpr-fast report {shlex.quote(str(folder))}",
    )


def settings(config: Config, given: Arguments, *, command: str) -> Config:
    """Returns a config with the changes of the command line."""
    if given.epochs is not None:
        config = scale_epochs(config, given.epochs)
    if given.overrides:
        _require_arguments(config, given.overrides)
        import tyro

        with _explained_defaults() if "--help" in given.overrides else contextlib.nullcontext():
            config = tyro.cli(Config, default=config, args=given.overrides, prog=f"cpr-fast {command} {given.config}")
    return config


def parse(arguments: list[str], *, command: str = "pretrain", flags: Sequence[str] = FLAGS) -> Arguments:
    """Splits the command line of `command`, which takes `flags` and settings. CONFIG is the one argument that is
    neither an option nor the value of one."""
    given, kinds, i = Arguments(), _kinds(Config), 0
    while i < len(arguments):
        word = arguments[i]
        i += 1
        if word in flags:
            given.flags.add(word)
            if word.endswith("dump-memory"):
                given.overrides.append("--run.dump-memory")
        elif word == "--epochs" or word.startswith("--epochs="):
            text = word.partition("=")[2] if "=" in word else (arguments[i] if i < len(arguments) else "")
            i += "=" not in word
            if not text.isdecimal():
                raise InputError(f"--epochs: expected a number of epochs, got {text!r}")
            given.epochs = int(text)
        elif word.startswith("-"):
            _require_known(word, kinds, command, flags)
            given.overrides.append(word)
            values = 0 if "=" in word else _number_of_values(word, kinds)
            if word.startswith(ARGUMENTS) and given.config is not None:
                values = 1000  # of a list; without CONFIG so far, the second word may be CONFIG
            while values and i < len(arguments) and not arguments[i].startswith("--"):
                given.overrides.append(arguments[i])
                i, values = i + 1, values - 1
        elif given.config is None:
            given.config = word
        else:
            raise InputError(f"CONFIG: expected one config, got {given.config!r} and {word!r}")
    return given


def _kinds(kind: type, prefix: str = "") -> dict[str, Any]:
    """Returns the type of every setting by its option, such as "--data.batch-size"."""
    found = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found |= _kinds(hint, f"{prefix}{name}.")
        else:
            found[f"--{prefix}{name}".replace("_", "-")] = hint
    return found


def _number_of_values(option: str, kinds: dict[str, Any]) -> int:
    """Returns how many values follow an option at most: none for a switch, any number for a list, else one."""
    kind = kinds.get(option.replace("_", "-"))
    if kind is bool or ".no-" in option:
        return 0
    return 1000 if typing.get_origin(kind) is tuple else 1


def _require_known(word: str, kinds: dict[str, Any], command: str, flags: Sequence[str]) -> None:
    """Raises InputError with a suggestion if the option is not one of `command`.

    This check runs before the parser of all settings is built, which takes longer, and before a missing CONFIG is
    reported: a word that follows an unknown option may be either its value or CONFIG.
    """
    option = word.partition("=")[0]
    name = option.replace("_", "-")
    if name.replace(".no-", ".") in kinds or name.startswith(("--schedule.cycles.", ARGUMENTS)):
        return
    raise unknown_option(
        option, [*kinds, *flags, "--epochs"], otherwise="`cpr-fast pretrain --help-all` lists all settings"
    )


def _require_arguments(config: Config, overrides: list[str]) -> None:
    """Checks that CONFIG has the arguments of its network that the command line changes."""
    for word in overrides:
        option = word.partition("=")[0]
        name = option.removeprefix(ARGUMENTS).partition(".")[0].replace("-", "_")
        known = {name, name.removeprefix("no_")} & config.model.args.keys()
        if f"{option}." == ARGUMENTS or (option.startswith(ARGUMENTS) and not known):
            held = ", ".join(config.model.args) or "none"
            raise ConfigError(
                f"{option}: expected --model.args.NAME VALUE with one of the names that CONFIG has in [model.args] "
                f"({held}); add others there"
            )


def _require_inputs(config: Config, overrides: list[str]) -> None:
    """Checks the input files of a run before the parser of all settings and torch are imported."""
    files = {"data.index": config.data.index, "data.features": config.data.features}
    files |= {f"model.init.{view}": file for view, file in vars(config.model.init).items()}
    for i, word in enumerate(overrides):
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("_", "-")
        if option.startswith("--") and name in files:
            del files[name]
            files[option] = value if equals else "".join(overrides[i + 1 : i + 2])
    stored = next(file for option, file in files.items() if option.endswith("features"))
    for option, file in files.items():
        if not (file or stored) and option.endswith("index"):
            raise ConfigError("data.index: expected the index of a data set (--data.index INDEX.csv), got none")
        if option.endswith("features"):
            require_folder(option, file or None)
        elif not (stored and option.endswith("index")):
            require_file(option, file or None)


def _require_run(folder: Path, recipe: Path) -> None:
    """Raises InputError if `--resume` finds no run in `folder`, but one relative to the folder of the recipe, or that
    holds the recipe; the message names it."""
    from cpr_fast.runtime.files import run_checkpoints

    if run_checkpoints(folder):
        return
    if found := next((place for place in (recipe.parent / folder, recipe.parent) if run_checkpoints(place)), None):
        state = "holds no checkpoint" if folder.is_dir() else ""
        raise InputError(
            f"run.out: {expected('the folder of a run to continue', folder.absolute(), state)}. run.out is relative to "
            f"the working directory, and {str(recipe)!r} lies elsewhere; to continue the run there, add "
            f"--run.out {shlex.quote(str(found.absolute()))}"
        )


def _checked_videos(config: Config, resume: bool | Literal["auto"]) -> Index:
    """Returns the training videos, after every check of the run that needs neither torch nor NVIDIA DALI."""
    from cpr_fast.pretrain.run.checks import check_run, plan_cycles
    from cpr_fast.pretrain.run.videos import on_features, training_videos
    from cpr_fast.runtime.files import require_new_run, require_run_folder

    require_run_folder(Path(config.run.out))
    require_device("run.device", config.run.device, "auto")
    if not resume and not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        require_new_run(Path(config.run.out))
    index = training_videos(config.data)
    config = on_features(config, index)
    plans = plan_cycles(config, len(index), int(os.environ.get("WORLD_SIZE", "1")))
    check_run(config, index, plans, stored_flow=config.data.flow == "stored")
    return index


@contextlib.contextmanager
def _explained_defaults() -> Iterator[None]:
    """Replaces the empty defaults in what is printed on stdout, "(default: )" and "(default: '')", by "(not set)"; the
    frame around the text, which may also break it into two lines, stays where it is."""
    # In lower case, because tyro draws frames only for an encoding of this spelling.
    printed = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding.lower())
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        printed.flush()
        text = printed.buffer.getvalue().decode(printed.encoding)
        empty = r"\(default:([\s│]*)((?:'')?\))"
        print(re.sub(empty, lambda found: "(not set)" + found[1] + " " * len(found[2]), text), end="")


def _help(config: Config, source: str) -> str:
    lines = []
    for name in COMMON:
        section, key = name.split(".")
        lines.append(
            f"  --{name.replace('_', '-'):<20} {getattr(getattr(config, section), key)!r}".replace("''", "(not set)")
        )
    return HELP.format(source=source, settings="\n".join(lines))
