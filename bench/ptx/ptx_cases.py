"""The calls whose instructions are counted, and how counts of small calls become those of large ones.

The blocks of a kernel do the same work, except for what depends on K. Counts of a block are therefore taken from two
interpreted calls as a line over one feature of the call, and multiplied by the blocks that the host code launches for
the large call, which it plans on the limits of the device (`DEVICES`) without executing anything:

    score, tensor_score      no feature: a tile of scores of one size is always the same work
    sieve                    no feature
    misled                   queries of a block
    stream                   tiles of a block; calls with a long sample have samples of their own
    select                   K
    streamed_stages          entries that are gathered
    all scans                tiles of 64 keys in a split of the memory; of the scan by warpgroups the PTX of sm_90a is
                             interpreted, of everything else that of sm_80
    finish                   splits of the memory
    tvl1                     no feature: the pairs share the work of one pair, whose blocks are as many as its tiles;
                             a team of one block has no barriers, which are the only atomic operations
"""

from __future__ import annotations

import re
import subprocess
import sys
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import cascade_forms
import loss_forms
import predict_gpu
import sass
from support.flow_references import DEFAULTS, moving_texture
from support.ptx.device import PtxDevice
from support.ptx.interpreter import Count, Launch

# What the host code asks a device for: shared memory that a block can opt in to, L2 cache, multiprocessors; and its
# compute capability.
DEVICES = {"A100": ((163 << 10, 40 << 20, 108), 80), "H100": ((227 << 10, 50 << 20, 132), 90)}
ROUTES = {
    "on chip": {},
    "on chip of an A100": {"processors": 108},  # fewer and larger tiles of scores
    "streamed": {"shared_limit": 0, "cache_size": 40 << 20},
    "streamed by 16 multiprocessors": {"shared_limit": 0, "cache_size": 40 << 20, "processors": 16},  # 4 tiles a block
    # Few queries, and many, with lists in shared memory.
    "streamed by an A100": {"shared_limit": 163 << 10, "cache_size": 40 << 20, "processors": 108},
    "shared by 16 multiprocessors": {"shared_limit": 163 << 10, "cache_size": 40 << 20, "processors": 16},
}
# The features and the products (the argument `precision`) of the precisions of cascade_select.
FORMATS = {
    "fp32": (torch.float32, 0),
    "bf16": (torch.bfloat16, 1),
    "bf16 of fp32": (torch.float32, 1),
}
_STAGES = re.compile(r"\dselect_(on_chip_)?kernel")
GLOBAL = ("load global", "store global", "copy async", "atomic")
SHARED = ("load shared", "store shared", "load matrix")


@dataclass(frozen=True)
class Call:
    op: str
    precision: str  # cascade_select: a key of FORMATS; mil_nce: float32 or bfloat16 (of the features)
    B: int
    K: int
    route: str = ""  # forced on cascade_select; otherwise that of the device
    architecture: str = "80"  # whose PTX is interpreted


@dataclass
class Kernel:
    """What the blocks of a kernel did in a call."""

    name: str
    entry: str
    blocks: int
    threads: int
    shared_bytes: int
    launches: int
    feature: float
    K: int  # of the call
    counts: Counter = field(default_factory=Counter)  # of all blocks, by key
    lines: Counter = field(default_factory=Counter)  # instructions of PTX by source line


@cache
def short_name(entry: str) -> str:
    """Returns score_kernel<float, 4, 4> for its mangled name."""
    text = subprocess.run(["c++filt", entry], check=True, capture_output=True, text=True).stdout
    found = re.search(r"(\w+_kernel)(<(?:[^<>]|<[^<>]*>)*>)?", text)
    arguments = re.sub(r"__nv_|\(int\)|\(bool\)|cpr::|\(anonymous namespace\)::| (?=>)", "", found[2] or "")
    return found[1] + arguments


def issue(device: PtxDevice, call: Call) -> None:
    """Makes a call on the inputs of the benchmarks."""
    if call.op == "cascade_select":
        dtype, products = FORMATS[call.precision]
        inputs = cascade_forms.make_inputs(call.B, call.K, "cpu", "forward", dtype)
        device.cascade_select(*inputs.all, precision=products)
    elif call.op == "mil_nce":
        inputs = loss_forms.make_inputs(call.B, call.K, "cpu", "forward", getattr(torch, call.precision))
        device.mil_nce(*inputs.all, temperature=loss_forms.TEMPERATURE, backward=False)
    else:
        device.tvl1_flow(moving_texture(call.B + 1, 256, call.K, seed=0)[None], DEFAULTS)


def plan(device: PtxDevice, call: Call, limits: tuple[int, int, int], capability: int) -> list[Launch]:
    """Returns the launches of a call on a device. Only shapes and alignment matter: the tensors are not written or
    read."""
    device.resize(*limits)
    device.set_capability(capability)
    device.set_dry(True)
    device.reset_counts()
    try:
        if call.op == "cascade_select":
            dtype, products = FORMATS[call.precision]
            queries, memory = (torch.empty(2, rows, 128, dtype=dtype) for rows in (call.B, call.K))
            keep = [max(5, call.K >> s) for s in range(1, 7)] + [5]
            device.cascade_select(queries, memory, cascade_forms.VIEWS, keep, precision=products)
        elif call.op == "mil_nce":
            dtype = getattr(torch, call.precision)
            rows, memory = torch.empty(call.B, 128, dtype=dtype), torch.empty(call.K, 128, dtype=dtype)
            positives = torch.empty(call.B, 5, dtype=torch.int64)
            device.mil_nce(rows, rows, memory, positives, backward=False)
        else:
            device.tvl1_flow(torch.empty(1, call.B + 1, 256, call.K, dtype=torch.uint8), DEFAULTS)
        return device.launches_of(call.op)
    finally:
        device.set_dry(False)
        device.resize()
        device.select()


def features(call: Call, launches: list[Launch]) -> list[float]:
    """Returns the feature of each launch that its counts depend on."""
    splits, queries, found = 1, 1, []
    for launch in launches:
        if "sieve_kernel" in launch.kernel:
            queries = launch.grid[0]  # of the chunk
        if "scan_kernel" in launch.kernel:
            splits = launch.grid[1]
            tiles = -(-call.K // 64)
            found.append(-(-tiles // splits))
        elif "misled_stages_kernel" in launch.kernel:
            found.append(queries / launch.grid[0])
        elif "stream_kernel" in launch.kernel:
            found.append(call.K / 128 * -(-queries // 64) / launch.grid[0])
        elif "streamed_stages_kernel" in launch.kernel:
            found.append(predict_gpu.gathered_entries(call.K))
        else:
            found.append(splits if "finish_kernel" in launch.kernel else call.K if _STAGES.search(launch.kernel) else 0)
    return found


def keys_of(counts: list[Count]) -> Counter:
    """Returns the counts of one kernel by key: instructions of each class, and what they did to memory."""
    keys: Counter = Counter()
    for count in counts:
        keys[f"ptx {count.kind}"] += count.executed
        keys["lanes"] += count.lanes
        if count.kind in GLOBAL and count.units:
            keys["sectors"] += count.units
            keys["least sectors"] += count.least
            keys["global requests"] += count.executed
            keys["global loads"] += count.executed * (count.kind == "load global")
        elif count.kind == "warpgroup mma":
            # A product reads 32 bytes of shared memory for each of its columns, once for four warps.
            keys["warpgroup products"] += count.units
            keys["wavefronts"] += count.units / 2
            keys["least wavefronts"] += count.units / 2
        elif count.kind in SHARED:
            keys["wavefronts"] += count.units
            keys["least wavefronts"] += count.least
        keys["wavefronts"] += count.shared_units
        keys["least wavefronts"] += count.shared_least
        if count.kind == "branch":
            keys["divergent branches"] += count.units
    return keys


def architectures_of(entry: str) -> tuple[str, ...]:
    """Returns the architectures that have code for a kernel: of those that multiply by warpgroups, only sm_90a. The
    first is the one whose PTX is counted."""
    return ("90a",) if "warpgroup" in entry else ("80", "90a")


class Disassembly:
    """The machine code of the operators for both architectures."""

    def __init__(self):
        self._found: dict[tuple[str, str], tuple] = {}

    def of(self, operator: str, architecture: str) -> tuple[dict, dict]:
        if (operator, architecture) not in self._found:
            self._found[operator, architecture] = sass.disassemble(operator, architecture)
        return self._found[operator, architecture]

    def project(self, operator: str, entry: str, counts: list[Count]) -> Counter:
        keys: Counter = Counter()
        for architecture in architectures_of(entry):
            lines = self.of(operator, architecture)[0][entry]
            for unit, number in sass.project(counts, lines).items():
                keys[f"sm_{architecture} {unit}"] += number
        return keys


def interpret(device: PtxDevice, call: Call, code: Disassembly | None = None) -> list[Kernel]:
    """Executes a call and returns what its kernels did."""
    device.resize(**ROUTES[call.route] if call.route else {})
    device.reset_counts()
    issue(device, call)
    device.resize()
    launches = device.launches_of(call.op)
    counts = device.counts(call.op, all_=True)
    kernels: dict[str, Kernel] = {}
    for launch, feature in zip(launches, features(call, launches), strict=True):
        blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
        if launch.kernel in kernels:
            kernels[launch.kernel].blocks += blocks
            kernels[launch.kernel].launches += 1
            continue
        name = short_name(launch.kernel)
        made = Kernel(name, launch.kernel, blocks, launch.threads, launch.shared_bytes, 1, feature, call.K)
        own = counts if call.op == "tvl1_flow" else [count for count in counts if count.function == launch.kernel]
        made.counts = keys_of([count for count in own if count.executed])
        for count in own:
            made.lines[f"{Path(count.file).name}:{count.line}"] += count.executed
        if code is not None:
            made.counts += code.project(call.op, launch.kernel, own)
        kernels[launch.kernel] = made
    return list(kernels.values())


def per_block(samples: list[Kernel], feature: float) -> dict[str, float]:
    """Returns the counts of one block at a feature: on the line through the two samples with the next features below
    and above it, or through the two that come next to it on one side."""
    by_feature = {kernel.feature: kernel for kernel in reversed(samples)}
    known = sorted(by_feature)
    after = min(max(1, bisect_left(known, feature)), len(known) - 1)
    low, high = by_feature[known[max(0, after - 1)]], by_feature[known[after]]
    found = {}
    for key in set(low.counts) | set(high.counts):
        first, last = low.counts[key] / low.blocks, high.counts[key] / high.blocks
        slope = (last - first) / (high.feature - low.feature) if high.feature > low.feature else 0.0
        found[key] = max(0.0, first + slope * (feature - low.feature))
    return found


def extrapolate(samples: list[Kernel], call: Call, launches: list[Launch]) -> list[dict]:
    """Returns the launches of a call with the counts of one block each, from samples of the same kernels."""
    rows: list[dict] = []
    for launch, feature in zip(launches, features(call, launches), strict=True):
        name = short_name(launch.kernel)
        same = [kernel for kernel in samples if kernel.name == name]
        if name.startswith("stream_kernel"):  # fewer entries are gathered after a long sample
            long = predict_gpu.has_long_sample(call.K)
            same = [kernel for kernel in same if predict_gpu.has_long_sample(kernel.K) == long] or same
        if not same:
            raise LookupError(f"{name}: no interpreted call has this kernel")
        blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
        row = {"kernel": name, "blocks": blocks, "threads": launch.threads, "shared_bytes": launch.shared_bytes}
        row["per_block"] = per_block(same, feature)
        if call.op == "tvl1_flow":
            teams = min(call.B, blocks)
            scale = dict.fromkeys(row["per_block"], call.B * same[0].blocks / blocks)
            scale["ptx atomic"] = -(-call.B // teams) if blocks > teams else 0
            row["per_block"] = {key: value * scale[key] for key, value in row["per_block"].items()}
        if found := next((other for other in rows if other | {"launches": 0} == row | {"launches": 0}), None):
            found["launches"] += 1  # another chunk
        else:
            rows.append(row | {"launches": 1})
    return rows
