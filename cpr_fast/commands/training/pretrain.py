"""`cpr-fast pretrain`."""

from __future__ import annotations

from pathlib import Path

import tyro

from cpr_fast.commands.options import Json
from cpr_fast.commands.output import show_once
from cpr_fast.errors import InputError


def pretrain(
    config: tyro.conf.Positional[Path],
    *,
    resume: bool = False,
    auto_resume: bool = False,
    dump_memory: bool = False,
    json: Json = False,
) -> None:
    """Pretrain as a config says; any setting can be overridden: `--section.key value`.

    `cpr-fast pretrain CONFIG.toml --help` lists the settings with the file's values. Under `torchrun` every
    process trains on its share of a batch.

    Args:
        config: The TOML file.
        resume: Continue from the run folder's last checkpoint.
        auto_resume: Continue if there is one, else start: for jobs that are requeued.
        dump_memory: Write RUN/memory/cycle-N.npz after every epoch, for `cpr-fast mine`; as --run.dump-memory.
    """
    raise InputError(f"config: expected a .toml file, got {str(config)!r}")  # parse_and_run() handles those


def parse_and_run(arguments: list[str]) -> None:
    """`pretrain` with its overrides: the file's values are the defaults of a parser over every setting."""
    from cpr_fast.config import Config, load

    path = next((argument for argument in arguments if argument.endswith(".toml")), None)
    if path is None:
        tyro.cli(pretrain, prog="cpr-fast pretrain", args=arguments)
        return
    overrides = [argument for argument in arguments if argument not in (path, "--resume", "--auto-resume", "--json")]
    overrides = ["--run.dump-memory" if argument == "--dump-memory" else argument for argument in overrides]
    config = tyro.cli(Config, default=load(path), args=overrides, prog=f"cpr-fast pretrain {path}")

    from cpr_fast.pretrain.run.loop import pretrain as run

    folder = run(config, resume="auto" if "--auto-resume" in arguments else "--resume" in arguments)
    show_once({"run": str(folder)}, "--json" in arguments)
