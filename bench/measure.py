"""Measures time, peak memory and lower bounds of calls on one device, and describes the machine and the software.

On the CPU, the time is the CPU time of the process on one thread, which other load on the machine changes little. On
CUDA, events around a call measure it. All forms of a shape are timed in turn, round by round, so that a slow period of
the machine affects all of them.
"""

from __future__ import annotations

import ctypes
import functools
import getpass
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cpr_fast import _host
from cpr_fast.ops.binding import library as _library
from cpr_fast.wording import listed

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
CODE = ("bench", "cpr_fast", "csrc", "tests")  # folders in which a new file may change what is measured
DIRTY = "-dirty"  # the end of the commit of a result that was measured with uncommitted changes
# A path of this machine in a word of a command: the word, or what follows "=", ",", ":" or a space in it; no URL.
PATH = re.compile(r"(?:(?<=[=,:\s])|^)(?:/(?!/)|\.\.(?=/|$))[^:,]*")
WORK = "WORK"  # the name of the folder that scripts take as an argument without an option
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16)}
# What makes the kernels, torch, oneDNN and MKL of a process that starts with it use the instructions of a processor
# without AVX-512; on AMD processors MKL does not use AVX-512 in any case. torch.compile has a cache of its own there:
# with AVX-512, code that was cached for AVX2 writes past the end of its buffers.
AVX2 = {
    "CPR_FAST_CPU_VARIANT": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}_avx2"),
}
LAUNCH_S = {"cpu": 0.0, "cuda": 2.5e-6}  # time of one kernel launch: an assumption, unlike the measured `Rates`


@dataclass(frozen=True)
class Rates:
    """The best rates of the device, measured in this process. The floor of a call, its shortest possible time, is the
    larger of operations / flops and bytes / bytes_per_s."""

    device: str
    flops: dict[torch.dtype, float]  # rate of a large matrix product without TF32
    bytes_per_s: float  # rate of a large copy, bytes read plus bytes written

    def floor_s(self, operations: float, elements: float, dtype: torch.dtype) -> float:
        moved_s = elements * dtype.itemsize / self.bytes_per_s
        return max(operations / self.flops[dtype], moved_s) + LAUNCH_S[self.device]


def measure_rates(device: str) -> Rates:
    size = 1024 if device == "cpu" else 8192
    flops = {}
    for dtype in DTYPES[device]:
        a, b = torch.randn(2, size, size, device=device, dtype=dtype)
        product_s = min(samples_s({"": lambda a=a, b=b: a @ b}, device, budget_s=1)[""])
        flops[dtype] = 2 * size**3 / product_s
    source = torch.randn(2**25 if device == "cpu" else 2**28, device=device)
    target = torch.empty_like(source)
    copy_s = min(samples_s({"": lambda: target.copy_(source)}, device, budget_s=1)[""])
    return Rates(device, flops, 2 * source.numel() * source.itemsize / copy_s)


def samples_s(
    calls: dict[str, Callable], device: str, budget_s: float, clock=time.process_time, warm: bool = False
) -> dict[str, list[float]]:
    """Returns the seconds of every call in 5 to 201 rounds, about `budget_s` in total.

    Each round has a new random order: otherwise a form that always follows one that evicts the caches would always find
    them cold. warm=True runs each call once before it is timed, so that it finds the caches as it left them.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    order, draw = list(calls.items()), random.Random(0)
    start = time.perf_counter()
    for round_ in range(203):
        draw.shuffle(order)
        for name, call in order:
            if warm:
                call()
            sample = _once(call, device, clock)
            if round_ >= 2:  # the first two warm up
                times[name].append(sample)
        if round_ >= 6 and time.perf_counter() - start > budget_s:
            break
    return times


def _once(call: Callable, device: str, clock: Callable[[], float]) -> float:
    if device == "cpu":
        start = clock()
        call()
        return clock() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def summary(samples: list[float]) -> dict[str, float | int]:
    low, median, high = (1e3 * value for value in statistics.quantiles(samples, n=4))
    return {"time_ms": median, "low_ms": low, "high_ms": high, "fastest_ms": 1e3 * min(samples), "rounds": len(samples)}


def clip_rates(clips: int, times: list[float]) -> dict[str, float | int]:
    """Returns clips per second, the median and quartiles, of calls that load `clips` in these seconds each."""
    slow, median, fast = (clips / value for value in reversed(statistics.quantiles(times, n=4)))
    return {"clips_per_s": median, "low": slow, "high": fast, "rounds": len(times)}


def peak_mib(call: Callable, device: str) -> float:
    """Returns the memory in MiB that a call needs beyond its inputs; its outputs are included."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = call()
        torch.cuda.synchronize()
        del outputs
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    call()
    ctypes.CDLL(str(_library.PATH)).cpr_release_scratch()  # which the kernels keep for the next call
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak resident size to the current one
    before = _status_kib("VmRSS")
    call()
    return max(0.0, (_status_kib("VmHWM") - before) / 1024)


def _status_kib(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])


@functools.cache
def _opened_library() -> ctypes.CDLL:
    """Returns the library, opened once: opening takes 9 us, or more with cold caches, of the call that is timed."""
    return ctypes.CDLL(str(_library.PATH))


def force_variant(name: str | None) -> None:
    """Selects the instruction set of the CPU kernels; None for the one that is chosen without this call."""
    if _opened_library().cpr_force_cpu_variant(name.encode() if name else None):
        raise ValueError(f"CPU variant: expected one of {cpu_variants()}, got {name!r}")


def cpu_variants() -> list[str]:
    """Returns the variants whose speed can be measured: an emulated one has the results of its name, not the speed."""
    built = _host.build_info()
    emulated = built.get("cpu_variants_emulated", "").split(",")
    return [name for name in built["cpu_variants"].split(",") if name not in emulated]


def git(*arguments: str, checkout: Path = ROOT) -> str:
    """Returns what a command of git says of a checkout, or "" if it fails."""
    done = subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def commit_of(checkout: Path = ROOT) -> str:
    """Returns the commit of a checkout, with "-dirty" if a file differs from it or code was added, else "unknown".

    Files of bench/results do not count: a script writes there while it measures.
    """
    commit = git("describe", "--always", checkout=checkout)
    changed = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    added = ("ls-files", "--others", "--exclude-standard", "--", *CODE, ":!bench/results")
    dirty = any(git(*arguments, checkout=checkout) for arguments in (changed, added))
    return f"{commit}{DIRTY if dirty else ''}" if commit else "unknown"


def uncommitted(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the sentence that a page needs about rows measured with uncommitted changes; "" if there are none."""
    found = [row["commit"] for row in rows if row["commit"].endswith(DIRTY)]
    if not found:
        return ""
    many = f"All {len(rows)} rows" if len(found) == len(rows) > 1 else f"{len(found)} of {len(rows)} rows"
    were = "was" if len(found) == 1 else "were"
    return f"{many} {were} measured with uncommitted changes of the code ({listed(sorted(set(found)))})."


def recorded_command(words: Sequence[str]) -> str:
    """Returns the command of a process, of which `words` are the arguments of Python, as others can repeat it.

    Paths below the repository are relative to it. Any other absolute path, or one that begins with "..", belongs to one
    machine: it becomes the name of its option in capitals, as in `--out OUT`, and WORK if it follows no option.
    """
    option, shown = WORK, []
    for word in words:
        name, equals, _ = word.partition("=")
        is_option = word.startswith("-")
        if is_option:
            option = name.strip("-").replace("-", "_").upper() or WORK
        shown.append(PATH.sub(lambda found, option=option: _below_repository(found[0]) or option, word))
        if equals if is_option else shown[-1] == word:  # the option has its argument, or another one than paths
            option = WORK
    return shlex.join(["python", *shown])


def _below_repository(path: str) -> str | None:
    for place in map(Path, (os.path.abspath(path), os.path.realpath(path))):
        if place.is_relative_to(ROOT):
            return str(place.relative_to(ROOT))
    return None


def world(device: str) -> dict[str, str]:
    """Returns the description of machine and software that belongs to every result."""
    cpu = f"{cpu_name()}, {_host.build_info()['cpu_variant']}"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "commit": commit_of(),
        "torch": torch.__version__,
        "command": recorded_command(sys.orig_argv[1:]),
    }


def write_result(name: str, text: str, folder: Path = RESULTS) -> None:
    """Writes bench/results/<name>, or <name> in another folder, and replaces an existing file atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.tmp"
    partial.write_text(text)
    os.replace(partial, folder / name)


def cpu_name() -> str:
    """Returns the model name of the processor with family and model numbers, which identify it in virtual machines."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    fields = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    return f"{fields.get('model name')} (family {fields.get('cpu family')}, model {fields.get('model')})"
