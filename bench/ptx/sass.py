"""What ptxas makes of the PTX of the CUDA kernels: registers, and the machine instructions of every source line.

The interpreter counts instructions of PTX. How often the machine instructions of a line are executed is estimated from
them: as often as the PTX instructions of the same line on average. Loads, stores, shuffles and products of matrices,
which ptxas takes over one to one, correct the estimate (`ANCHORS`). Needs nvcc, and nvdisasm (of the CUDA toolkit, or
of the wheel of triton) on the PATH or in $NVDISASM.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

from support.cuda_emulation.compile import SOURCES
from support.ptx.build import CACHE, find_nvcc

# The unit of a multiprocessor that executes an instruction, by the start of its name; the first match counts.
UNITS = [
    ("tensor", ("HMMA",)),
    ("warpgroup", ("HGMMA",)),
    ("fp32", ("FFMA", "FADD", "FMUL", "HFMA2")),
    ("special", ("MUFU", "POPC", "FLO", "BREV", "I2F", "F2I", "F2F", "FRND", "I2I")),
    ("fp64", ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")),
    ("imad", ("IMAD",)),
    ("global load", ("LDG", "LD.")),
    ("global store", ("STG", "ST.")),
    ("shared load", ("LDS", "LDSM")),
    ("shared store", ("STS",)),
    ("local", ("LDL", "STL")),
    ("async copy", ("LDGSTS", "LDGDEPBAR")),
    ("atomic", ("ATOM", "RED")),
    ("shuffle", ("SHFL", "REDUX")),
    ("barrier", ("BAR", "WARPSYNC", "WARPGROUP", "BSSY", "BSYNC", "DEPBAR")),
    ("branch", ("BRA", "BRX", "EXIT", "CALL", "RET", "BREAK", "JMP")),
    ("constant", ("LDC", "ULDC", "S2R", "S2UR", "CS2R")),
]
UNITS.sort(key=lambda unit: -max(map(len, unit[1])))  # LDGSTS before LDG
_SECTION = re.compile(r"^\s*\.section\s+\.text\.([\w$.]+)")
_LINE = re.compile(r'//## File "([^"]+)", line (\d+)')
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_USED = re.compile(r"Used (\d+) registers")


def unit_of(instruction: str) -> str:
    best = max(
        ((len(start), name) for name, starts in UNITS for start in starts if instruction.startswith(start)),
        default=(0, "alu"),
    )
    return best[1]


def find_nvdisasm() -> str | None:
    return os.environ.get("NVDISASM") or shutil.which("nvdisasm")


def parse(text: str) -> dict[str, dict[tuple[str, int], Counter]]:
    """Returns the number of instructions of each unit by kernel and source line, from the output of nvdisasm -g."""
    kernels: dict[str, dict[tuple[str, int], Counter]] = {}
    lines: dict[tuple[str, int], Counter] = {}
    place = ("", 0)
    for line in text.splitlines():
        if found := _SECTION.match(line):
            lines = kernels.setdefault(found[1], defaultdict(Counter))
        elif found := _LINE.search(line):
            place = (found[1], int(found[2]))
        elif (found := _INSTRUCTION.match(line)) and found[1] != "NOP":
            lines[place][unit_of(found[1])] += 1
    return kernels


def disassemble(operator: str, architecture: str) -> tuple[dict, dict[str, int]]:
    """Returns the instructions as `parse`, and the registers of a thread, by kernel."""
    nvcc, nvdisasm = find_nvcc(), find_nvdisasm()
    assert nvcc is not None
    if nvdisasm is None:
        raise SystemExit("nvdisasm: not on the PATH; set NVDISASM (CUDA toolkit, or triton/backends/nvidia/bin)")
    cubin = CACHE / f"{operator}-{architecture}.cubin"
    cubin.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-std=c++17", "-O3", "-fmad=false", "-lineinfo", "--resource-usage", f"-I{SOURCES}"]
    source = SOURCES / "cuda" / operator / f"{operator}.cu"
    command = [nvcc, *flags, f"-arch=sm_{architecture}", "-cubin", str(source), "-o", str(cubin)]
    log = subprocess.run(command, check=True, capture_output=True, text=True)
    registers, kernel = {}, ""
    for line in (log.stdout + log.stderr).splitlines():
        if found := re.search(r"Compiling entry function '([^']+)'", line):
            kernel = found[1]
        elif found := _USED.search(line):
            registers.setdefault(kernel, int(found[1]))
    text = subprocess.run([nvdisasm, "-g", "-c", str(cubin)], check=True, capture_output=True, text=True).stdout
    return parse(text), registers


def project(counts: list, lines: dict[tuple[str, int], Counter]) -> Counter:
    """Returns the machine instructions that a kernel executed, by unit. counts: all its PTX instructions, executed or
    not; lines: its machine instructions."""
    executed, there = Counter(), Counter()
    for count in counts:
        place = (str(Path(count.file)), count.line)
        executed[place] += count.executed
        there[place] += 1
    average = sum(executed.values()) / max(1, sum(there.values()))
    total: Counter = Counter()
    for place, units in lines.items():
        rate = executed[place] / there[place] if there[place] else average
        for unit, number in units.items():
            total[unit] += number * rate
    return _anchored(counts, total)


# Units whose instructions ptxas takes over one to one, and the classes of PTX that they come from.
ANCHORS = {
    "tensor": ("mma",),
    "warpgroup": ("warpgroup mma",),
    "global load": ("load global",),
    "global store": ("store global",),
    "shared load": ("load shared", "load matrix"),
    "shared store": ("store shared",),
    "shuffle": ("shuffle",),
    "atomic": ("atomic",),
}


def _anchored(counts: list, total: Counter) -> Counter:
    """Replaces the estimates of the units in ANCHORS by the counts of their PTX, and divides the others by the ratio of
    estimate and count: above 1 where ptxas unrolls loops, because its copies of a line share the executions."""
    exact = Counter()
    for unit, kinds in ANCHORS.items():
        exact[unit] = sum(count.executed for count in counts if count.kind in kinds)
    estimated = sum(total[unit] for unit in ANCHORS)
    ratio = max(1.0, estimated / sum(exact.values())) if sum(exact.values()) else 1.0
    scaled = Counter({unit: number / ratio for unit, number in total.items() if unit not in ANCHORS})
    return scaled + exact
