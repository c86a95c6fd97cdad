"""The command line: `cpr-fast COMMAND ...` or `python -m cpr_fast COMMAND ...`.

Each command lives in a file of its own below `cpr_fast.commands`, which is imported when the command runs. So
`--help`, `--version` and a misspelt command answer at once, without importing torch or NVIDIA DALI.

Results go to stdout, progress and logs to stderr. The exit code is 0 on success, 2 for bad input or a package that is
not installed (one line that names the option, file or package), 1 for any other failure (with its traceback), and
128 + N for a command that was stopped by signal N, after a run saved its state.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence

from cpr_fast import __version__
from cpr_fast.commands.inputs import check_inputs, with_home
from cpr_fast.errors import FailedError, InputError, how_to_install, out_of_memory
from cpr_fast.runtime.files import DISK_ERRORS, discard
from cpr_fast.runtime.interrupt import signals_raise
from cpr_fast.runtime.progress import first_process
from cpr_fast.wording import printable

GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Start here": {
        "quickstart": ("training", "Make a small data set, pretrain with CPR, evaluate, and write a report."),
        "doctor": ("data", "Check the installation and a data set, and measure where the time of a step goes."),
    },
    "Data": {
        "index": ("data", "List and check the videos of a data set."),
        "flow": ("data", "Compute the TV-L1 optical flow of every video of an index."),
        "synth": ("data", "Write a data set of synthetic action videos."),
        "embed": ("data", "Write a store of features, to train and mine without videos."),
        "ray": ("data", "Run index, flow, embed or dedup in shards on the machines of a Ray cluster."),
        "show-sample": ("data", "Write the clips that training reads from a video as a picture or a video."),
    },
    "Training": {
        "init": ("training", "Write a recipe that is sized to the videos of an index."),
        "recipes": ("training", "List the recipes that come with the package."),
        "explain": ("training", "Print what a recipe does, and where it deviates from the paper."),
        "pretrain": ("training", "Pretrain encoders: InfoNCE, CoCLR, CPR, IIC without labels; UberNCE with them."),
        "verify": ("reproduction", "Replay steps of a run, and compare them with its ledger bit for bit."),
        "diff": ("reproduction", "Say where two runs part: the first step and the first tensor that differ."),
        "reproduce": ("training", "Train and evaluate the rows of a table of the CPR paper."),
        "import-checkpoint": ("training", "Convert a published checkpoint (CoCLR, CPR, IIC, MIL-NCE)."),
        "export": ("training", "Write a checkpoint's encoders as safetensors, ONNX or a CoCLR checkpoint."),
    },
    "Evaluation": {
        "retrieve": ("evaluation", "Nearest-neighbour retrieval between videos: mAP, R@1, 5, 10, 20, 50."),
        "probe": ("evaluation", "Train a linear classifier on frozen features."),
        "finetune": ("evaluation", "Finetune the encoders as a classifier."),
        "search": ("evaluation", "Find the videos of an index that are most similar to your own."),
        "dedup": ("evaluation", "Find near-duplicates and clips of one source, and write an index with these sources."),
        "mine": ("evaluation", "Measure the mining quality (PMR, CMR) of any cascade on stored features."),
        "compare": ("evaluation", "Test whether the retrieval of two runs, or of two settings with seeds, differs."),
        "report": ("evaluation", "Write the HTML report of one or more training runs."),
    },
}
COMMANDS = {name: entry for group in GROUPS.values() for name, entry in group.items()}

# Commands that store parts of a long computation as they finish, see `_continues`.
CONTINUE = (
    "quickstart",
    "index",
    "flow",
    "embed",
    "ray",
    "pretrain",
    "reproduce",
    "retrieve",
    "probe",
    "finetune",
    "search",
    "dedup",
)

# Errors of the file system whose message names the path, which is all that a user needs.
PATH_ERRORS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
PATH_ERRNOS = (errno.ENAMETOOLONG, errno.ELOOP)  # error numbers of the same kind that have no exception class


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_closed_streams()
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(_help())
            return 0
        if arguments[0] in ("-V", "--version", "version"):
            print(f"cpr-fast {__version__}")
            return 0
        arguments = with_home(arguments)
        with signals_raise():
            code = _run(_command(arguments[0], arguments[1:]), arguments)
        sys.stdout.flush()  # flushed here, where an error such as a full disk can still be reported
        return code
    except (InputError, *PATH_ERRORS) as error:
        print(f"cpr-fast: {printable(str(error))}", file=sys.stderr)
        return 2
    except ImportError as error:
        if not (advice := how_to_install(error)):
            raise
        print(f"cpr-fast: {advice}", file=sys.stderr)
        return 2
    except FailedError as error:
        print(f"cpr-fast: {printable(str(error))}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not (reason := out_of_memory(error)):
            raise
        print(f"cpr-fast: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a further Ctrl-C ends the process while threads still finish
        if first_process():
            kept, then = ("what was finished is kept", "continue") if _continues(arguments) else (
                "nothing was kept", "start again")  # fmt: skip
            kept = "; ".join(getattr(stopped, "__notes__", [kept]))  # a command may know how much it is
            command = _continuing(arguments, "--auto-resume")
            print(f"cpr-fast: {str(stopped) or 'interrupted'}; {kept}; to {then}: {command}", file=sys.stderr)
        return 128 + getattr(stopped, "signum", signal.SIGINT)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
        discard(sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno in PATH_ERRNOS:
            print(f"cpr-fast: {printable(str(error))}", file=sys.stderr)
            return 2
        if error.errno not in DISK_ERRORS:
            raise
        name = repr(str(error.filename)) if error.filename else "a file or the output"
        print(
            f"cpr-fast: could not write {printable(name)}: {error.strerror}; complete files are kept", file=sys.stderr
        )
        discard(sys.stdout.fileno())  # what is buffered cannot be written, either
        return 2


def _open_closed_streams() -> None:
    """Opens the null device where the caller has closed stdin, stdout or stderr (`>&-`).

    Otherwise the next files that are opened get these numbers, and libraries print their warnings into them.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            discard(number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


def _help() -> str:
    lines = ["usage: cpr-fast COMMAND [OPTIONS]", "", "Pretrain video representations without labels.", ""]
    for title, commands in GROUPS.items():
        lines += [f"{title}:", *(f"  {name:<18} {summary}" for name, (_, summary) in commands.items()), ""]
    lines += ["`cpr-fast COMMAND --help` lists the options of a command; `cpr-fast --version` prints the version."]
    return "\n".join(lines)


def _command(name: str, arguments: list[str]) -> Callable[[list[str]], None]:
    """Returns the function that parses the arguments of a command and runs it, after a check of its input files."""
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(COMMANDS)}"
        raise InputError(f"unknown command {name!r}; {hint}")
    check_inputs(name, arguments)
    stem = name.replace("-", "_")
    module = importlib.import_module(f"cpr_fast.commands.{COMMANDS[name][0]}.{stem}")
    if hasattr(module, "parse_and_run"):
        return module.parse_and_run

    import tyro

    from cpr_fast.commands.options import require_known_options

    run = getattr(module, stem)
    require_known_options(name, run, arguments)
    return lambda arguments: tyro.cli(run, prog=f"cpr-fast {name}", args=arguments)


def _continues(arguments: Sequence[str]) -> bool:
    """Returns whether the same command, after it was stopped, uses what it had finished instead of computing it
    again."""
    return arguments[0] in CONTINUE and "--no-cache" not in arguments


def _continuing(arguments: Sequence[str], resume: str) -> str:
    """Returns the command that continues a stopped one from any folder: the same command in the working directory, to
    which its paths may be relative, and, for `pretrain`, with the option `resume`."""
    words = list(arguments)
    if words[0] == "pretrain" and not {"--resume", "--auto-resume"} & set(words):
        words.append(resume)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return f"in the folder {os.getcwd()!r}, the same torchrun command with `{shlex.join(words)}`"
    return f"cd {shlex.quote(os.getcwd())} && {shlex.join(['cpr-fast', *words])}"


def _run(run: Callable[[list[str]], None], arguments: list[str]) -> int:
    import logging

    from cpr_fast.runtime.interrupt import Interrupted
    from cpr_fast.runtime.progress import CurrentStderr

    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[CurrentStderr()])
    try:
        run(arguments[1:])
    except Interrupted as stopped:
        from cpr_fast.runtime import distributed

        if distributed.is_main():
            print(f"cpr-fast: {stopped}; to continue: {_continuing(arguments, '--resume')}", file=sys.stderr)
        distributed.finish()
        return 128 + stopped.signum
    return 0
