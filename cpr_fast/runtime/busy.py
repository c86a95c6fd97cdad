"""How busy the processor is with other programs while this one is measured.

Work takes longer while other programs use the same processor, so a printed estimate states whether that was the case.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from cpr_fast.wording import counted

STAT = Path("/proc/stat")  # proc(5): CPU time of every core since the start, in clock ticks
NOTICED = 0.1  # smaller shares change a time by less than its usual variation

_told = [False]  # whether `news` has returned the sentence about other programs


class OtherPrograms:
    """Measures, from its creation on, how much of the processor other programs use.

    Only the cores that this process may use are counted.
    """

    def __init__(self, stat: Path = STAT) -> None:
        self._stat, self._before = stat, _clocks(stat)

    def _since(self) -> tuple[float, float, float, int]:
        """Returns the seconds since the creation, the CPU time of this program and of all programs in them, and the
        number of cores; zeros on systems that do not report it."""
        before, now = self._before, _clocks(self._stat)
        if before is None or now is None:
            return 0.0, 0.0, 0.0, 0
        wall, own, used = (end - start for end, start in zip(now[:3], before[:3], strict=True))
        return wall, own, used, now[3]

    def sentence(self) -> str:
        """Returns a sentence to stand beside an expected time, or "" if other programs used hardly any of the cores of
        this process since the creation, and under torchrun, whose processes are no other programs."""
        wall, own, used, cores = self._since()
        taken = max(0.0, used - own) / wall if wall > 0 else 0.0
        if not cores or taken < NOTICED * cores or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return ""
        return (
            f"Other programs use {min(taken, cores):.1f} of {counted(cores, 'processor core')}, so that this takes "
            "longer than on an idle machine"
        )

    def news(self) -> str:
        """Returns the sentence if there is one and this was not called with that result before in this process."""
        if _told[0] or not (said := self.sentence()):
            return ""
        _told[0] = True
        return said


def _clocks(stat: Path) -> tuple[float, float, float, int] | None:
    """Returns wall time, CPU time of this process, and CPU time of all programs on the cores of this process, in
    seconds, and the number of these cores."""
    try:
        rows = [line.split() for line in stat.read_text(encoding="ascii").splitlines()]
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        # user, nice, system, and after idle and iowait: irq, softirq, steal
        ticks = [sum(map(int, (*row[1:4], *row[6:9]))) for row in rows if row and row[0] in cores]
        used = sum(ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):  # AttributeError: not Linux
        return None
    return (time.monotonic(), time.process_time(), used, len(ticks)) if ticks else None
