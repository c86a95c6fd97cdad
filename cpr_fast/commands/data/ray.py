"""`cpr-fast ray`: runs a command in shards on the machines of a Ray cluster.

A shard is one process, `cpr-fast COMMAND … --shard i/n`, as in a SLURM array; Ray decides where it runs, and starts it
again elsewhere if it fails or its machine is lost. What a shard has finished is stored where the command writes, so a
shard that is started again, like a whole command, computes only the rest.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, NoReturn

from cpr_fast import __version__
from cpr_fast.commands.inputs import check_inputs, unknown_option
from cpr_fast.errors import FailedError, InputError
from cpr_fast.runtime.progress import announce, duration
from cpr_fast.wording import counted

SHARDED = ("index", "flow", "embed", "dedup")
POLL_S = 0.1
STOP_S = 30.0  # time that a shard has to end after a request to stop
LOOK_S, LOST_S = 30.0, 900.0  # how often machines are looked for while shards run, and how long without one
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>
TAIL = 20  # lines of a shard's errors that are kept
OPTIONS = ("--shards", "--cpus", "--gpus", "--retries", "--address", "--help")

HELP = f"""usage: cpr-fast ray [OPTIONS] COMMAND ARGUMENTS ...

Run COMMAND ({", ".join(SHARDED)}) in shards on a Ray cluster, which `ray start` or `ray up` has started, or without one
on the CPUs of this machine. Every machine needs this version of cpr_fast and the same paths. A shard whose process or
machine fails is run again elsewhere. The same command continues one that was stopped or failed.

    cpr-fast ray --shards 64 --cpus 8 flow data/index.csv --out flow

options:
  --shards N         Number of shards; by default as many as run at the same time. More of them lose less when a
                     machine fails, and share the work more evenly.
  --cpus N           CPUs, and threads, of a shard. Default: 1.
  --gpus N           GPUs of a shard, also a part of one. Default: 0.
  --retries N        How often a shard that failed is run again. Bad input is never run again. Default: 2.
  --address ADDRESS  Of the cluster, such as HOST:6379 or auto. By default that in $RAY_ADDRESS; otherwise a cluster is
                     started on this machine, and ends with the command.
  -h, --help         Print this text.
"""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, what it printed on stdout, and the last lines of its errors."""

    node: str
    code: int
    output: str
    errors: str
    elapsed_s: float


class ShardError(RuntimeError):
    """A shard failed, and may succeed when it is run again."""


def parse_and_run(arguments: Sequence[str]) -> None:
    """Parses the arguments after `cpr-fast ray`, runs the shards, and joins what they have written."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    options = _parse(arguments)
    command, words = options.command, options.words
    if command not in SHARDED:
        raise InputError(
            f"COMMAND: expected one of {', '.join(SHARDED)}, which have the option --shard, got {command!r}"
        )
    if any(word.partition("=")[0] == "--shard" for word in words):
        raise InputError("--shard: `cpr-fast ray` gives each process its shard; expected --shards N before COMMAND")
    check_inputs(command, words)
    try:
        import ray
    except ImportError:
        raise InputError("COMMAND: this needs Ray, which is not installed: run `pip install 'ray>=2.9'`") from None
    with _cluster(ray, options.address):
        shards = options.shards or _at_once(ray, options.cpus, options.gpus)
        announce(f"Running `{shlex.join(['cpr-fast', command, *words])}` in {counted(shards, 'shard')}")
        parts = [f"{shard}/{shards}" for shard in range(shards)]
        _run(ray, {f"shard {part}": [command, *words, "--shard", part] for part in parts}, options)
        # One more call joins what the shards have written, and prints the result. It has the CPUs and GPUs of a shard,
        # because a store of features is complete only for the kind of device that computed it.
        (joined,) = _run(ray, {"last call": [command, *words]}, options)
    print(joined.output, end="")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="cpr-fast ray", add_help=False, allow_abbrev=False)
    parser.add_argument("--shards", type=_at_least(1))
    parser.add_argument("--cpus", type=_at_least(1), default=1)
    parser.add_argument("--gpus", type=_gpus, default=0.0)
    parser.add_argument("--retries", type=_at_least(0), default=2)
    parser.add_argument("--address")
    parser.add_argument("command", metavar="COMMAND")
    parser.add_argument("words", nargs=argparse.REMAINDER)
    for name in _own_options(arguments):
        if name not in OPTIONS:
            raise unknown_option(name, OPTIONS, otherwise="`cpr-fast ray --help` lists the options")
    return parser.parse_args(arguments)


def _own_options(arguments: Sequence[str]) -> Iterator[str]:
    """Yields the options before COMMAND. Each takes one value, after an equals sign or as the next word."""
    words = iter(arguments)
    for word in words:
        name, equals, _ = word.partition("=")
        if not word.startswith("--"):
            return
        yield name
        if not equals:
            next(words, None)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; `cpr-fast ray --help` lists the options, which come before COMMAND")


def _at_least(least: int) -> Any:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return int(text)

    return number


def _gpus(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not (0 <= number < 1 or number.is_integer()) or number < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number or a part of one GPU, got {text!r}")
    return number


@contextmanager
def _cluster(ray: Any, address: str | None) -> Iterator[None]:
    """Connects to a cluster, or starts one on this machine, and leaves or ends it after the block."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    address = address or os.environ.get("RAY_ADDRESS") or "local"  # without one Ray would join a cluster that it finds
    own = {"include_dashboard": False} if address == "local" else {}
    announce("Starting Ray on this machine" if own else f"Connecting to Ray at {address}")
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **own)
    except (ConnectionError, ValueError) as error:
        raise InputError(f"--address: cannot connect to {address!r}: {str(error).splitlines()[0]}") from error
    try:
        for number, handler in handlers.items():  # Ray's would end the process without a message
            if threading.current_thread() is threading.main_thread():
                signal.signal(number, handler)
        yield
    finally:
        ray.shutdown()


def _at_once(ray: Any, cpus: int, gpus: float) -> int:
    """Returns how many shards the machines of the cluster can run at the same time. Raises InputError if none can."""
    if not (found := _places(ray, cpus, gpus)):
        raise InputError(f"--cpus, --gpus: no machine of the cluster has {counted(cpus, 'CPU')} and {gpus:g} GPUs")
    return found


def _places(ray: Any, cpus: int, gpus: float) -> int:
    """Returns for how many shards the machines of the cluster have enough CPUs and GPUs, whether or not they are in
    use."""
    found = 0
    for node in ray.nodes():
        has = node["Resources"] if node["Alive"] else {}
        by_gpu = [int(has.get("GPU", 0) / gpus)] if gpus else []
        found += min([int(has.get("CPU", 0)) // cpus, *by_gpu])
    return found


def _last_seen(ray: Any, options: argparse.Namespace, seen: float) -> float:
    """Returns when the cluster last had a machine for a shard, given when it had one before. Ray itself would wait
    without end for machines that were lost. Raises FailedError after LOST_S without one."""
    if (now := time.monotonic()) - seen < LOOK_S:
        return seen
    if _places(ray, options.cpus, options.gpus):
        return now
    if now - seen > LOST_S:
        raise FailedError(f"no machine of the cluster has had {counted(options.cpus, 'CPU')} and {options.gpus:g} GPUs "
                          f"for {duration(now - seen)}: are its machines still there? What was finished is kept, and "
                          "the same command computes the rest")  # fmt: skip
    return seen


def _run(ray: Any, calls: dict[str, list[str]], options: argparse.Namespace) -> list[Ended]:
    """Runs named calls, the words after `cpr-fast`, and returns how they ended, in the order of their ends. Raises
    InputError for bad input, and FailedError if a call failed in all tries."""
    task = ray.remote(num_cpus=options.cpus, num_gpus=options.gpus, max_retries=options.retries,
                      retry_exceptions=[ShardError])(run_call)  # fmt: skip
    waiting = {task.remote(words, options.cpus, os.getcwd(), __version__): name for name, words in calls.items()}
    done: list[Ended] = []
    failed: dict[str, str] = {}
    seen = time.monotonic()
    try:
        while waiting:
            found, _ = ray.wait(list(waiting), num_returns=1, timeout=0)
            if not found:
                time.sleep(POLL_S)  # a signal that comes while Ray waits would be taken for Ctrl-C
                seen = _last_seen(ray, options, seen)
                continue
            ready = found[0]
            name = waiting.pop(ready)
            try:
                ended = ray.get(ready)
            except ray.exceptions.RayError as error:
                failed[name] = _reason(error)
                announce(f"{name.capitalize()} failed: {failed[name]}", end="")
                continue
            if ended.code == 2:
                raise InputError(f"{name} on {ended.node}: {ended.errors.removeprefix('cpr-fast: ')}")
            done.append(ended)
            left = f"; {len(waiting):,} left" if waiting else ""
            announce(f"{name.capitalize()} ended on {ended.node} after {duration(ended.elapsed_s)}{left}", end="")
    finally:
        _stop(ray, list(waiting))
    if failed:
        names = [name for name in calls if name in failed]
        raise FailedError(f"{len(failed)} of {counted(len(calls), 'process', 'processes')} failed "
                          f"({', '.join(names)}): {failed[names[0]]}; what was finished is kept, and the same command "
                          "computes the rest")  # fmt: skip
    return done


def _reason(error: Exception) -> str:
    """Returns why a process failed: the last line of its errors, or what Ray says of its machine."""
    cause = getattr(error, "cause", None)
    lines = str(cause if isinstance(cause, ShardError) else error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _stop(ray: Any, waiting: list[Any]) -> None:
    """Asks shards to stop, and waits until their processes have ended."""
    for task in waiting:
        ray.cancel(task)
    if waiting:
        ray.wait(waiting, num_returns=len(waiting), timeout=STOP_S + 5)


def run_call(words: list[str], cpus: int, folder: str, version: str) -> Ended:
    """Runs `cpr-fast` with these words on the machine that Ray has chosen. Raises ShardError if it fails but for bad
    input."""
    node, begin = socket.gethostname(), time.monotonic()

    def ended(code: int, output: str, errors: str) -> Ended:
        return Ended(node, code, output, errors, time.monotonic() - begin)

    if version != __version__:
        return ended(2, "", f"expected cpr_fast {version}, which was called, got {__version__}")
    if not os.path.isdir(folder):
        return ended(2, "", f"expected the folder {folder!r}, in which the command was called, on every machine")
    errors: collections.deque[str] = collections.deque(maxlen=TAIL)
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        code = _call(words, cpus, folder, output, errors)
        output.seek(0)
        text = "".join(errors).strip()
        if code not in (0, 2):
            raise ShardError(f"on {node}, exit code {code}: {text or 'no message'}")
        return ended(code, output.read(), _last_message(text))


def _call(words: list[str], cpus: int, folder: str, output: IO[str], errors: collections.deque[str]) -> int:
    """Returns the exit code of `cpr-fast` with these words, after it has ended or the task has been cancelled."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cpr_fast", *words], cwd=folder, text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(cpus)}, stdin=subprocess.DEVNULL, stdout=output,
        stderr=subprocess.PIPE, errors="replace", preexec_fn=_ends_with_its_parent)  # fmt: skip
    try:
        errors.extend(process.stderr)
        process.wait()
    finally:
        if process.poll() is None:  # Ray has cancelled the task
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
    return process.returncode


def _last_message(text: str) -> str:
    """Returns the last line of errors that is the command line's own, or all of them: tyro draws frames."""
    return next((line for line in reversed(text.splitlines()) if line.startswith("cpr-fast: ")), text)


def _ends_with_its_parent() -> None:
    """Lets the system send SIGTERM to this process when the worker that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
