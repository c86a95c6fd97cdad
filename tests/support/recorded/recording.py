"""The calls that the stand-ins of other packages record: one JSON line each in the file $RECORDED_CALLS."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def record(call: str, **arguments: Any) -> None:
    """Records a call. It raises what $FAILING_CALLS (a list of names) asks for, as if the network were down."""
    with Path(os.environ["RECORDED_CALLS"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"call": call, "process": os.getpid(), **arguments}) + "\n")
    if call in os.environ.get("FAILING_CALLS", "").split():
        raise ConnectionError(f"{call}: the network is down")


def recorded(path: Path, call: str = "") -> list[dict[str, Any]]:
    """Returns the recorded calls, all or those of one name."""
    calls = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return [row for row in calls if call in ("", row["call"])]
