"""The file `ledger.jsonl` of a run folder: one JSON object per line, each chained to the one before.

The last entry of a row, `chain`, is the BLAKE2b digest of the previous row's `chain` and of the rest of the row. So a
row that was changed, removed or inserted does not fit the rows after it; rows that are missing at the end do not fit
the checkpoints, which hold the `chain` of their last step. The chain detects accidents and careless changes. It is not
a signature: whoever changes a row can compute all later digests again.

Imports neither torch nor NumPy, so that a command can refuse a damaged ledger before it loads them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from cpr_fast.errors import InputError
from cpr_fast.runtime.files import NOTHING_LEFT, naming, replacing
from cpr_fast.wording import counted

FILE = "ledger.jsonl"
START = "0" * 32  # what the first row is chained to
_END = re.compile(r', "chain": "([0-9a-f]{32})"\}')

log = logging.getLogger(__name__)


class LedgerError(InputError):
    """A ledger is missing, damaged, or does not fit the checkpoints of its run; the message says which."""


class Ledger:
    """Appends rows to `RUN/ledger.jsonl`, of which the run that holds the lock of its folder is the only writer.

    Each row is one write, and in the file when `write` returns. An incomplete last line, which a killed process leaves,
    is removed when the file is opened.

    Attributes:
        chain: the `chain` of the last row, 32 hexadecimal digits.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / FILE
        rows = read_ledger(run_dir) if self.path.exists() else []
        self.chain = rows[-1]["chain"] if rows else START
        with naming(self.path, NOTHING_LEFT):
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115, closed by `close`
            self._end = self.path.read_bytes().rfind(b"\n") + 1
            self._file.truncate(self._end)

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row, and its `chain`. Raises InputError if the file cannot be written."""
        body = json.dumps(row, allow_nan=False)
        chain = _chained(self.chain, body)
        line = f'{body[:-1]}, "chain": "{chain}"}}\n'.encode()
        with naming(self.path, "the rows written so far are kept and the run can be resumed"):
            try:
                written = 0
                while written < len(line):  # a full disk: the next write says why
                    written += self._file.write(line[written:])
            except OSError:
                with suppress(OSError):
                    self._file.truncate(self._end)
                raise
        self.chain, self._end = chain, self._end + len(line)

    def sync(self) -> None:
        """Waits until all rows are on the disk, so that no checkpoint is newer than the ledger after a power failure.

        Raises InputError if the disk fails.
        """
        with naming(self.path, "no checkpoint was written, and the run can be resumed from the one before"):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file. Further calls have no effect."""
        self._file.close()


def read_ledger(run_dir: str | Path) -> list[dict[str, Any]]:
    """Returns the rows of a run's ledger, with their `chain`. An incomplete last line, which a killed process leaves,
    is left out.

    Raises:
        LedgerError: there is no ledger, a line is not a row of one, or a row does not fit the row before it.
    """
    path = Path(run_dir) / FILE
    if not path.is_file():
        raise LedgerError(
            f"run folder {str(run_dir)!r} has no {FILE}; expected a folder that this version of `cpr-fast pretrain` "
            "has written"
        )
    rows, fault = _read(path)
    if fault:
        raise LedgerError(fault)
    return rows


def require_steps(rows: list[dict[str, Any]], first: int, run_dir: str | Path, *, written: int = 0) -> None:
    """Checks that a ledger holds every step from `first` (from 0) to its last one, and one at least.

    Args:
        rows: the rows of `read_ledger`.
        run_dir: the run folder, for the message.
        written: the number of steps after which the newest checkpoint was written. A run that still trains writes rows
            first, so the checkpoints must be listed before the rows are read.
    Raises:
        LedgerError: steps are missing.
    """
    path = Path(run_dir) / FILE
    steps = [row["step"] for row in rows if "plan" in row]
    end = steps[-1] + 1 if steps else 0
    if end < written:
        raise LedgerError(
            f"{path} is cut off: it ends after {counted(end, 'step')}, but a checkpoint was written after "
            f"{counted(written, 'step')}"
        )
    if end <= first:
        raise LedgerError(f"{path} ends after {counted(end, 'step')}: expected a step after step {first}")
    if missing := sorted(set(range(first, end)) - set(steps)):
        raise LedgerError(
            f"{path} lacks {counted(len(missing), 'step')} from step {missing[0] + 1} on: the run was continued by a "
            "version that wrote none, or after its ledger was lost"
        )


def require_chain(rows: list[dict[str, Any]], step: int, chain: str | None, run_dir: str | Path) -> None:
    """Checks that a checkpoint was written after the rows of a ledger up to its step.

    Args:
        rows: the rows of `read_ledger`.
        step: the number of steps after which the checkpoint was written.
        chain: what the checkpoint holds of the ledger; None if it holds nothing.
    Raises:
        LedgerError: it was written after other rows.
    """
    before = next((row["chain"] for row in reversed(rows) if row["step"] < step), START)
    if step and chain is not None and chain != before:
        raise LedgerError(
            f"{Path(run_dir) / FILE} does not fit the checkpoint after step {step}, which was written with the chain "
            f"{chain} instead of {before}: the ledger was written again, lacks rows, or belongs to another run"
        )


def step_files(run_dir: str | Path) -> list[tuple[int, Path]]:
    """Returns (steps done, path) of every checkpoint `step-*.pt` of a run folder, in the order of the steps."""
    found = [(re.fullmatch(r"step-(\d+)\.pt", path.name), path) for path in Path(run_dir).glob("checkpoints/step-*.pt")]
    return sorted((int(match[1]), path) for match, path in found if match)


def rewind(run_dir: str | Path, *, step: int, chain: str | None) -> None:
    """Removes the rows after `step` steps, which a resumed run will write again, and rows that cannot be read.

    A ledger that is damaged before that step, or lacks steps, does not stop the run: it is kept as
    `ledger.jsonl.damaged`, a warning says so, and `cpr-fast verify` will name the steps.

    Args:
        chain: what the checkpoint that the run continues from holds of the ledger; None if it holds nothing.
    """
    path = Path(run_dir) / FILE
    if not path.exists():
        log.warning("There is no %s: it will begin with step %d", FILE, step + 1)
        return
    rows, fault = _read(path)
    kept = [row for row in rows if row["step"] < step]
    if chain is None:
        fault = fault if len(kept) == len(rows) else ""  # a fault in rows that are removed does not matter
    elif chain == (kept[-1]["chain"] if kept else START):
        fault = ""
    else:
        fault = fault or f"{path} does not fit the checkpoint after step {step}"
    lines = path.read_bytes().split(b"\n")[: len(kept)]
    if fault:
        damaged = path.with_name(FILE + ".damaged")
        with replacing(damaged, durable=True) as temporary:
            shutil.copyfile(path, temporary)
        log.warning(
            "Warning: %s. It is kept as %s; the run continues with its first %s, and `cpr-fast verify` will not accept "
            "the steps before",
            fault, damaged.name, counted(len(kept), "row"),
        )  # fmt: skip
    with replacing(path, durable=True) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in lines))


def _chained(previous: str, body: str) -> str:
    return hashlib.blake2b(f"{previous}{body}".encode(), digest_size=16).hexdigest()


def _read(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Returns the rows of a ledger before the first fault, and what is wrong there, or ""."""
    rows: list[dict[str, Any]] = []
    chain = START
    lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    for number, line in enumerate(lines[:-1], 1):  # after the last line break: nothing, or an incomplete line
        end = _END.search(line)
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            row = None
        numbered = isinstance(row, dict) and all(type(row.get(name)) is int for name in ("step", "epoch", "cycle"))
        if not numbered or not end or end.end() != len(line):
            return rows, f"{path}:{number}: expected a row of a ledger, got {line[:60]!r}"
        if _chained(chain, line[: end.start()] + "}") != end[1]:
            return rows, f"{path}:{number}: this row or the one before it was changed: the chain of digests ends here"
        chain = end[1]
        rows.append(row)
    return rows, ""
