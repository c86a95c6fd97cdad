"""Types of command-line options that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

import tyro

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
