"""Writing and reading `metrics.jsonl`, which holds every number of a run's report: one JSON object per line."""

from __future__ import annotations

import json
import math
import platform
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from cpr_fast.errors import InputError
from cpr_fast.runtime.files import LineFile, naming, replacing
from cpr_fast.runtime.writers import Writer, send
from cpr_fast.wording import counted

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends rows to `RUN/metrics.jsonl`. Each row is one line, which is in the file when `write` returns.

    Several processes may write at the same time, such as `retrieve` while the run trains; see `LineFile`. NaN and
    infinity are written as null, because JSON has neither.

    Args:
        run_dir: The run folder; it is created if it does not exist.
        writers: Also get the rows, see `cpr_fast.runtime.writers`; they are closed with the file.
    """

    def __init__(self, run_dir: str | Path, *, writers: Sequence[Writer] = ()) -> None:
        self.path = Path(run_dir) / FILE
        self._file = LineFile(self.path)
        self._lock = threading.Lock()  # the watchdog writes from its own thread
        self._writers = writers

    def write(self, row: dict[str, Any]) -> None:
        """Appends one row. `row["kind"]` is the kind of row, such as "step" or "epoch".

        Raises InputError if the file cannot be written, for example because the disk is full.
        """
        row = _without_nan(row)
        with self._lock, naming(self.path, "the rows written so far are kept and the run can be resumed"):
            self._file.append(json.dumps(row, allow_nan=False))
        for writer in self._writers:
            send(writer, row)

    def close(self, *, failed: bool = False) -> None:
        """Closes the file, and the writers, which are told whether the run `failed`. Rows are on disk before that, so a
        run that is killed loses none."""
        self._file.close()
        writers, self._writers = self._writers, ()
        for writer in writers:
            writer.close(failed)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """Returns the rows of a run folder; an incomplete last line is left out.

    Raises:
        InputError: There is no `metrics.jsonl`, or a line is not a JSON object with a `kind`; only the last line may be
            incomplete.
    """
    path = Path(run_dir) / FILE
    if not path.is_file():
        raise InputError(f"run folder {str(run_dir)!r} has no {FILE}; expected a folder written by `cpr-fast pretrain`")
    lines = path.read_bytes().decode("utf-8", "replace").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            if number == len(lines):
                break
            raise InputError(f"{path}:{number}: expected one JSON object per line: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("kind"), str):
            raise InputError(f"{path}:{number}: expected a JSON object with a text 'kind', got {line[:60]!r}")
        rows.append(row)
    return rows


def rewind(run_dir: str | Path, *, step: int, epoch: int) -> None:
    """Removes the rows written after `step` steps and `epoch` epochs, which a resumed run will write again."""

    def kept(row: dict[str, Any]) -> bool:
        if row["kind"] in ("step", "cascade"):
            return row["step"] < step
        if row["kind"] == "outcome":
            return row["step"] <= step
        return row["kind"] not in ("epoch", "mined", "health", "alarm", "online") or row["epoch"] < epoch

    if not (path := Path(run_dir) / FILE).exists():
        read_metrics(run_dir)  # raises, and names the folder
    file = LineFile(path)
    try:
        with file.locked(), replacing(path) as temporary:  # a row that another process adds now waits for the new file
            rows = [row for row in read_metrics(run_dir) if kept(row)]
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    finally:
        file.close()


def environment(device: torch.device) -> dict[str, Any]:
    """Returns the environment that a run records: versions, device, commit, date (UTC) and command line."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
        "device": f"{device.type} ({name}, {counted(torch.get_num_threads(), 'thread')})",
        "commit": commit or None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]).replace("__main__.py", "cpr-fast", 1),
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
