"""Types of command-line options that several commands share, and checks that need neither torch nor a data set."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import tyro

from cpr_fast.errors import InputError

CheckpointFiles = Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="CHECKPOINT",
        help="A checkpoint of `pretrain` or `import-checkpoint`: FILE, or one for each view: rgb=FILE flow=FILE.",
    ),
]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Json = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Print one JSON object on stdout.")]


def require_file(option: str, path: str | Path | None) -> None:
    """Raises InputError naming the option if its file is given but is not there."""
    if path is not None and not Path(path).is_file():
        state = "is a folder" if Path(path).is_dir() else "does not exist"
        raise InputError(f"{option}: expected a file, but {str(path)!r} {state}")


def require_files(option: str, paths: Iterable[str | Path]) -> None:
    """Calls `require_file` for every path."""
    for path in paths:
        require_file(option, path)


def require_folder(option: str, path: str | Path) -> None:
    """Raises InputError naming the option if its folder is not there."""
    if not Path(path).is_dir():
        state = "is a file" if Path(path).exists() else "does not exist"
        raise InputError(f"{option}: expected a folder, but {str(path)!r} {state}")


def require_checkpoints(option: str, checkpoints: Iterable[str]) -> None:
    """Checks that the files of FILE or VIEW=FILE arguments are there."""
    given = list(checkpoints)
    if not given:
        raise InputError(f"{option}: expected a checkpoint file, got none")
    for text in given:
        view, equals, file = text.partition("=")
        is_pair = bool(equals) and view in ("rgb", "flow", "residual")
        require_file(option, file if is_pair else text)


def parse_shard(text: str) -> tuple[int, int]:
    """Returns (i, n) of "i/n". Raises InputError naming --shard."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"--shard: expected i/n with 0 <= i < n, got {text!r}")
    return int(index), int(count)
