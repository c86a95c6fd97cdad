"""What the kernels are counted to do, against what their algorithms must do; and counts of larger calls."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[4] / "bench" / "ptx"))

import ptx_cases
import sass
from support.ptx.build import compile_ptx
from support.ptx.device import ARCHITECTURES
from support.ptx.interpreter import Count

D = 128


def by_opcode(device, op: str, kernel: str) -> Counter:
    counts: Counter = Counter()
    for count in device.counts(op):
        if ptx_cases.short_name(count.function).startswith(kernel):
            counts[count.opcode] += count.executed
    return counts


def test_every_score_is_one_chain_of_fused_multiply_adds(device):
    B, K = 32, 192
    ptx_cases.issue(device, ptx_cases.Call("cascade_select", "fp32", B, K))
    counts = by_opcode(device, "cascade_select", "score_kernel")
    assert counts["fma.rn.f32"] == 2 * B * K * D // 32  # two views, 32 lanes
    assert not {opcode for opcode in counts if opcode.startswith(("mul.f32", "mad.f32"))}


def test_every_product_of_the_tensor_core_scan_is_needed(device):
    B, K = 32, 192
    before = device.products()
    ptx_cases.issue(device, ptx_cases.Call("mil_nce", "bfloat16", B, K))
    # 16 x 8 x 16 in each: the scores once, and the weighted sum of the keys in two terms. A warpgroup has 64 rows.
    rows = B if device.architecture == "80" else 64
    assert device.products() - before == 3 * rows * K * D // 2048


def test_the_keys_are_read_in_whole_sectors_and_without_bank_conflicts(device):
    ptx_cases.issue(device, ptx_cases.Call("mil_nce", "bfloat16", 64, 192))
    counts = [c for c in device.counts("mil_nce") if re.search("(row|warpgroup)_scan_kernel", c.function)]
    copies = [c for c in counts if c.opcode == "cp.async.cg.shared.global"]
    assert sum(c.units for c in copies) == sum(c.least for c in copies) > 0
    matrices = [c for c in counts if c.kind == "load matrix"]
    assert sum(c.units for c in matrices) == sum(c.least for c in matrices) > 0


def test_instructions_have_the_lines_of_the_sources(device):
    ptx_cases.issue(device, ptx_cases.Call("cascade_select", "fp32", 2, 64))
    files = {Path(count.file).name for count in device.counts("cascade_select")}
    assert {"score.cuh", "tile.cuh", "select.cuh", "stages.cuh"} <= files


@pytest.mark.parametrize("device", ARCHITECTURES[:1], indirect=True)
@pytest.mark.parametrize(
    ("op", "precision", "B", "K"), [("cascade_select", "fp32", 64, 2048), ("mil_nce", "float32", 64, 2048)]
)
def test_counts_of_a_larger_call_follow_from_smaller_ones(device, op, precision, B, K):
    samples = [
        kernel
        for size in ((32, K // 8), (64, K // 8), (32, K // 2))
        for kernel in ptx_cases.interpret(device, ptx_cases.Call(op, precision, *size))
    ]
    call = ptx_cases.Call(op, precision, B, K)
    planned = ptx_cases.plan(device, call, *ptx_cases.DEVICES["H100"])
    expected = {row["kernel"]: row for row in ptx_cases.extrapolate(samples, call, planned)}
    for kernel in ptx_cases.interpret(device, call):
        row = expected[kernel.name]
        assert row["blocks"] * row["launches"] == kernel.blocks
        for key in ("ptx fp32", "ptx load shared", "sectors", "wavefronts"):
            # How many entries are near a threshold varies, and up to 512 survivors of a stage get one thread each, so
            # that fewer of the stages of a small K read vectors from shared memory.
            tolerance = (
                (0.25 if key in ("ptx load shared", "wavefronts") else 0.15) if "select" in kernel.name else 0.02
            )
            assert kernel.blocks * row["per_block"][key] == pytest.approx(kernel.counts[key], rel=tolerance), key


def test_a_call_without_a_sample_of_its_kernels_is_named(device):
    call = ptx_cases.Call("cascade_select", "fp32", 2, 64)
    with pytest.raises(LookupError, match="score_kernel<float, 4, 2>: no interpreted call"):
        ptx_cases.extrapolate([], call, ptx_cases.plan(device, call, *ptx_cases.DEVICES["H100"]))


def functions(text: str) -> dict[str, str]:
    """Returns the instructions of each function of PTX, with labels and the widening of bfloat16 as for sm_80."""
    text = re.sub(r"cvt\.f32\.bf16 (%\w+), (%\w+);", r"mov.b32 \1, {0,\2};", text)
    text = re.sub(r"(\$L__BB|\$L__tmp|\.loc|__local_depot)\S*[^\n]*", r"\1", text)
    parts = re.split(r"\.entry ", text.partition("\t.file\t")[0])[1:]
    return {part.partition("(")[0]: part for part in parts}


@pytest.mark.usefixtures("ptx_devices")
def test_both_architectures_have_the_same_instructions():
    """Both use mma.sync and cp.async; only the widening of bfloat16 differs: the counts of one hold for both. The scan
    by warpgroups is empty for sm_80."""
    for operator in ("cascade_select", "mil_nce", "tvl1_flow"):
        first, second = (functions(compile_ptx(operator, architecture).read_text()) for architecture in ARCHITECTURES)
        assert first and first.keys() == second.keys()
        for name, text in first.items():
            if "warpgroup_scan_kernel" in name:
                assert "wgmma" not in text and "wgmma.mma_async" in second[name]
            else:
                assert text == second[name], name


def test_machine_instructions_are_estimated_by_line():
    text = """
\t.section\t.text.kernel,"ax",@progbits
\t//## File "/x/a.cuh", line 3
        /*0000*/                   FFMA R1, R2, R3, R1 ;
        /*0010*/              @!P0 IADD3 R1, R2, R3, R1 ;
\t//## File "/x/a.cuh", line 7 inlined at "/x/b.cu", line 9
        /*0020*/                   LDG.E.128 R4, [R2.64] ;
        /*0030*/                   NOP ;
"""
    lines = sass.parse(text)["kernel"]
    assert lines == {("/x/a.cuh", 3): {"fp32": 1, "alu": 1}, ("/x/a.cuh", 7): {"global load": 1}}
    counts = [Count("kernel", "fma.rn.f32", "fp32", "/x/a.cuh", 3, 60, 60, 0, 0)]
    counts += [Count("kernel", "mov.u32", "move", "/x/a.cuh", 3, 40, 40, 0, 0)]
    counts += [Count("kernel", "ld.global.f32", "load global", "/x/a.cuh", 7, 8, 8, 0, 0)]
    estimated = sass.project(counts, lines)
    assert estimated["fp32"] == estimated["alu"] == 50 and estimated["global load"] == 8
