"""How the interpreter of PTX executes warps and blocks: divergence, barriers, memory, counts, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from support.ptx.program import Program

STORE = "mul.wide.u32 %rd20, %r0, 4; add.s64 %rd20, %rd20, %rd0; st.global.u32 [%rd20], %r9;"


def out(size: int = 32) -> torch.Tensor:
    return torch.full((size,), -7, dtype=torch.int32)


def test_threads_part_and_join_again(interpreter):
    """Each thread runs a loop of its own length with a branch in it; then all take part in a shuffle."""
    program = Program(interpreter, """
      mov.u32 %r1, 0; mov.u32 %r2, 0;
    loop:
      setp.ge.u32 %p1, %r1, %r0; @%p1 bra done;
      and.b32 %r3, %r1, 1; setp.eq.s32 %p2, %r3, 0; @%p2 bra even;
      add.s32 %r2, %r2, 100; bra.uni next;
    even:
      add.s32 %r2, %r2, 1;
    next:
      add.s32 %r1, %r1, 1; bra.uni loop;
    done:
      shfl.sync.bfly.b32 %r9, %r2, 0, 31, 0xffffffff;""" + STORE, 1)  # fmt: skip
    result = out()
    program.run(result)
    assert result.tolist() == [(t + 1) // 2 + t // 2 * 100 for t in range(32)]
    assert program.count("shfl.sync.bfly.b32").executed == 1 and program.count("shfl.sync.bfly.b32").lanes == 32


def test_the_low_bits_of_a_wide_register(interpreter):
    program = Program(interpreter, """
      cvt.u64.u32 %rd9, %r0; add.s64 %rd9, %rd9, 240;
      cvt.s64.s8 %rd9, %rd9; cvt.u32.u64 %r9, %rd9;""" + STORE, 1)  # fmt: skip
    result = out()
    program.run(result)
    assert result.tolist() == [(t + 240 + 128) % 256 - 128 for t in range(32)]


def test_threads_that_return_early_do_not_run_on(interpreter):
    program = Program(interpreter, "mov.u32 %r9, 1; setp.lt.u32 %p1, %r0, 7; @%p1 ret;" + STORE, 1)
    result = out()
    program.run(result)
    assert result.tolist() == [-7] * 7 + [1] * 25
    assert program.count("st.global.u32").lanes == 25


@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
def test_warps_exchange_values_through_shared_memory(interpreter, order):
    program = Program(interpreter, """
      mov.u32 %r1, memory; shl.b32 %r2, %r0, 2; add.s32 %r3, %r1, %r2; st.shared.u32 [%r3], %r0; bar.sync 0;
      sub.s32 %r4, 127, %r0; shl.b32 %r4, %r4, 2; add.s32 %r4, %r1, %r4; ld.shared.u32 %r9, [%r4];
      setp.eq.s32 %p1, %r0, 77; bar.red.or.pred %p2, 0, %p1; @!%p2 mov.u32 %r9, 0;""" + STORE, 1)  # fmt: skip
    interpreter.set_order(order)
    result = out(128)
    program.run(result, threads=128, shared_bytes=512)
    interpreter.set_order("forward")
    assert result.tolist() == list(range(127, -1, -1))


def test_blocks_of_a_cooperative_launch_wait_for_each_other(interpreter):
    program = Program(interpreter, """
      mov.u32 %r1, %ctaid.x; setp.ne.s32 %p1, %r0, 0; @%p1 bra end;
      atom.global.add.u32 %r2, [%rd0], 1;
    wait:
      ld.volatile.global.u32 %r3, [%rd0]; setp.eq.s32 %p2, %r3, 4; @%p2 bra end; nanosleep.u32 64; bra.uni wait;
    end:
      bar.sync 0;""", 1)  # fmt: skip
    result = torch.zeros(1, dtype=torch.int32)
    program.run(result, grid=(4, 1, 1), threads=64, cooperative=True)
    assert result.item() == 4
    with pytest.raises(RuntimeError, match="blocks that wait for each other"):
        program.run(torch.zeros(1, dtype=torch.int32), grid=(2, 1, 1), threads=64, cooperative=True)


@pytest.mark.parametrize(
    ("width", "type_", "stride", "sectors"), [(4, "u32", 4, 4), (4, "u32", 8, 8), (4, "u32", 128, 32), (4, "u32", 0, 1),
                                              (8, "u64", 8, 8), (16, "v4.f32", 16, 16), (2, "u16", 2, 2)]
)  # fmt: skip
def test_sectors_of_global_memory(interpreter, width, type_, stride, sectors):
    values = {"u32": "%r9", "u64": "%rd9", "u16": "%rs9", "v4.f32": "{%f1, %f2, %f3, %f4}"}[type_]
    load = f"mul.wide.u32 %rd20, %r0, {stride}; add.s64 %rd20, %rd20, %rd0; ld.global.{type_} {values}, [%rd20];"
    memory = torch.zeros(2048, dtype=torch.float64)
    start = -memory.data_ptr() % 64 // 8
    program = Program(interpreter, load, 1)
    program.run(memory[start:])
    count = program.count(f"ld.global.{type_}")
    assert (count.units, count.least) == (sectors, width)


@pytest.mark.parametrize("access", ["ld.shared.{type_} {values}, [%r1];", "st.shared.{type_} [%r1], {values};"])
@pytest.mark.parametrize(
    ("width", "type_", "stride", "wavefronts"), [(4, "u32", 4, 1), (4, "u32", 8, 2), (4, "u32", 128, 32),
                                                 (4, "u32", 132, 1), (4, "u32", 0, 1), (8, "u64", 8, 2),
                                                 (16, "v4.f32", 16, 4), (16, "v4.f32", 80, 4), (16, "v4.f32", 64, 16)]
)  # fmt: skip
def test_wavefronts_of_shared_memory(interpreter, access, width, type_, stride, wavefronts):
    values = {"u32": "%r9", "u64": "%rd9", "v4.f32": "{%f1, %f2, %f3, %f4}"}[type_]
    program = Program(interpreter, f"mul.lo.s32 %r1, %r0, {stride};" + access.format(type_=type_, values=values), 0)
    program.run(shared_bytes=8192)
    count = program.count(access.format(type_=type_, values="").split()[0])
    assert (count.units, count.least) == (wavefronts, max(1, width // 4))


def test_generic_accesses_are_counted_by_the_memory_they_find(interpreter):
    load = """
      mov.u64 %rd20, memory; cvta.shared.u64 %rd20, %rd20; mul.wide.u32 %rd21, %r0, 8; add.s64 %rd20, %rd20, %rd21;
      setp.lt.u32 %p1, %r0, 32; selp.b64 %rd20, %rd20, %rd0, %p1; ld.u32 %r9, [%rd20];"""
    program = Program(interpreter, load, 1)
    memory = torch.zeros(1, dtype=torch.int32)
    program.run(memory, threads=64, shared_bytes=256)  # the second warp reads global memory
    count = program.count("ld.u32")
    assert (count.units, count.shared_units, count.shared_least) == (1, 2, 1)


def test_an_asynchronous_copy_lands_when_it_is_waited_for(interpreter):
    copy = """
      mul.wide.u32 %rd20, %r0, 16; add.s64 %rd21, %rd20, %rd1; shl.b32 %r1, %r0, 4;
      st.shared.u32 [%r1], 5; setp.lt.u32 %p1, %r0, 20; selp.u32 %r2, 16, 0, %p1;
      cp.async.cg.shared.global [%r1], [%rd21], 16, %r2; cp.async.commit_group;
      {before} ld.shared.u32 %r9, [%r1]; cp.async.wait_group 0;""" + STORE  # fmt: skip
    source = torch.arange(128, dtype=torch.int32)
    early, late = out(), out()
    Program(interpreter, copy.format(before=""), 2).run(early, source, shared_bytes=512)
    Program(interpreter, copy.format(before="cp.async.wait_group 0;"), 2).run(late, source, shared_bytes=512)
    assert early.tolist() == [5] * 32
    assert late.tolist() == [4 * t if t < 20 else 0 for t in range(32)]


def test_products_of_matrices(interpreter):
    """Integers give exact sums in every model; terms far below the greatest are cut off, not rounded."""
    multiply = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    body = f"""
      mul.wide.u32 %rd20, %r0, 16; add.s64 %rd21, %rd20, %rd0; add.s64 %rd22, %rd20, %rd1;
      mul.wide.u32 %rd23, %r0, 8; add.s64 %rd23, %rd23, %rd2;
      ld.global.v4.u32 {{%r1, %r2, %r3, %r4}}, [%rd22]; ld.global.v2.u32 {{%r5, %r6}}, [%rd23];
      ld.global.v4.f32 {{%f1, %f2, %f3, %f4}}, [%rd21];
      {multiply} {{%f1, %f2, %f3, %f4}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%f1, %f2, %f3, %f4}};
      st.global.v4.f32 [%rd21], {{%f1, %f2, %f3, %f4}};"""

    def multiplied(a, b, c, model=(8, 1)):
        lane = torch.arange(32)
        row, column = lane // 4, lane % 4 * 2
        pairs = [(row, column), (row + 8, column), (row, column + 8), (row + 8, column + 8)]
        a_lanes = torch.stack([a[r, k + i] for r, k in pairs for i in (0, 1)], dim=1).bfloat16().contiguous()
        b_lanes = torch.stack([b[column + k + i, row] for k in (0, 8) for i in (0, 1)], dim=1).bfloat16().contiguous()
        places = [(row + r, column + i) for r in (0, 8) for i in (0, 1)]
        sums = torch.stack([c[r, k] for r, k in places], dim=1).contiguous()
        program = Program(interpreter, body, 3)
        interpreter.set_product_model(program.machine, *model)
        program.run(sums, a_lanes, b_lanes)
        result = torch.zeros(16, 8)
        for i, (r, k) in enumerate(places):
            result[r, k] = sums[:, i]
        return result

    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randint(-8, 9, shape, generator=generator).float() for shape in ((16, 16), (16, 8), (16, 8)))
    assert torch.equal(multiplied(a, b, c), a @ b + c)
    small = torch.zeros(16, 16)
    small[:, 0], small[:, 1:8] = (
        1,
        2.0**-25,
    )  # each is half a unit of the 25th bit; together they exceed one of the 24th
    ones, nothing = torch.ones(16, 8), torch.zeros(16, 8)
    assert torch.equal(multiplied(small, ones, nothing, (8, 0)), torch.ones(16, 8))
    assert torch.equal(multiplied(small, ones, nothing, (8, 2)), torch.full((16, 8), 1 + 2.0**-23))
    assert multiplied(a * torch.inf, b, c).isnan().any()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("frobnicate.u32 %r1, %r0;", "does not know the opcode frobnicate.u32"),
        ("mov.u32 %r1, %r99;", "unknown operand '%r99'"),
        ("setp.lt.u32 %p1, %r0, 7; @%p1 bra end; bar.sync 0; end:", "a barrier that only some threads of a warp reach"),
        ("setp.lt.u32 %p1, %r0, 32; @%p1 bra end; bar.sync 0; end: bar.sync 1;", "a barrier that not every warp"),
        (
            "setp.lt.u32 %p1, %r0, 7; @%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, 0xffffffff;",
            "threads that do not reach it",
        ),
        ("ld.shared.u32 %r1, [%r0+256];", "not aligned"),
        ("shl.b32 %r1, %r0, 2; ld.shared.u32 %r1, [%r1+1024];", "shared memory: outside the block's, address 0x400"),
        ("mov.u64 %rd1, 0; ld.global.u32 %r1, [%rd1];", "a null pointer"),
        ("mov.u64 %rd1, 4096; cp.async.commit_group;", "before its copies had landed"),
        ("trap;", "a trap of the kernel .*trap"),
    ],
)
def test_what_a_device_does_not_define_is_named(interpreter, body, message):
    with pytest.raises(RuntimeError, match=message):
        Program(interpreter, body, 0).run(threads=64, shared_bytes=512)
