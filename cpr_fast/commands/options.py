"""Types of command-line options that several commands share, and their checks."""

from __future__ import annotations

from typing import Annotated

import tyro

from cpr_fast.errors import InputError

CheckpointFiles = Annotated[
    tuple[str, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="CHECKPOINT", help="Of `pretrain` or `import-checkpoint`: FILE, or one per view, VIEW=FILE."),
]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]
Json = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help="Print one JSON object on stdout.")]


def parse_shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"--shard: expected i/n with 0 <= i < n, got {text!r}")
    return int(index), int(count)
