"""The products of warpgroups in the interpreter: where a descriptor finds its elements, and the rules of the order."""

from __future__ import annotations

import pytest
import torch
from support.ptx.program import Program

BYTES = {0: 16, 1: 128, 2: 64, 3: 32}  # of a row of a swizzle atom, by the mode of a descriptor
SHARED = 16384


def swizzled(address: int, mode: int) -> int:
    """Applies CuTe's Swizzle<3, 4, 3>, <2, 4, 3> or <1, 4, 3> for rows of 128, 64 and 32 bytes."""
    bits = {0: 0, 1: 3, 2: 2, 3: 1}[mode]
    return address ^ (((address >> 7) & (2**bits - 1)) << 4)


def canonical(k: int, n: int, mode: int, transposed: bool, leading: int, stride: int) -> int:
    """Returns the byte of element (k, n) in the canonical layouts that the PTX ISA lists, T = 8 elements of 16 bits."""
    vectors = BYTES[mode] // 16
    if transposed and mode:  # ((T, vectors, m), (8, k)) : ((1, T, LBO), (T vectors, SBO))
        t, v, m = n % 8, n // 8 % vectors, n // 8 // vectors
        at = 2 * t + 16 * v + leading * m + 16 * vectors * (k % 8) + stride * (k // 8)
    elif transposed:  # ((T, 1, m), (8, k)) : ((1, T, SBO), (T, LBO))
        at = 2 * (n % 8) + stride * (n // 8) + 16 * (k % 8) + leading * (k // 8)
    elif mode:  # ((8, m), (T, 2)) : ((T vectors, SBO), (1, T))
        at = 16 * vectors * (n % 8) + stride * (n // 8) + 2 * k
    else:  # ((8, m), (T, 2)) : ((T, SBO), (1, LBO))
        at = 16 * (n % 8) + stride * (n // 8) + 2 * (k % 8) + leading * (k // 8)
    return swizzled(at, mode)


def strides(mode: int, transposed: bool, columns: int) -> tuple[int, int]:
    """Returns leading and stride bytes for which no two elements share a place, with gaps."""
    atom = 8 * BYTES[mode]
    if not transposed:
        return (128 * columns // 8 + 256 if mode == 0 else 0), max(atom, 128)
    if mode == 0:
        return 128 * columns // 8 + 128, 128
    return 2 * atom, atom


def descriptor(mode: int, leading: int, stride: int) -> int:
    return leading // 16 << 16 | stride // 16 << 32 | mode << 62


def product(columns: int, dtype: str, transposed: bool, b: int, accumulates: bool = True) -> str:
    sums = ", ".join(f"%f{i}" for i in range(columns // 2))
    return (
        f"setp.ne.b32 %p1, {int(accumulates)}, 0; wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{dtype}.{dtype} "
        f"{{{sums}}}, {{%r20, %r21, %r22, %r23}}, %rd{b}, %p1, 1, 1, {int(transposed)};\n"
    )


def prologue(columns: int) -> str:
    """Copies %rd1 to shared memory, loads a factor [threads][4] from %rd0 and sets the sums to the thread."""
    text = "mov.u32 %r1, memory; mul.wide.u32 %rd10, %r0, 16; add.s64 %rd10, %rd10, %rd0;\n"
    text += "".join(f"ld.global.b32 %r{20 + i}, [%rd10+{4 * i}];\n" for i in range(4))
    text += "mul.wide.u32 %rd11, %r0, 4; add.s64 %rd12, %rd11, %rd1; shl.b32 %r2, %r0, 2; add.s32 %r2, %r2, %r1;\n"
    for at in range(0, SHARED, 512):
        text += f"ld.global.b32 %r3, [%rd12+{at}]; st.shared.b32 [%r2+{at}], %r3;\n"
    text += "fence.proxy.async.shared::cta; bar.sync 0; cvt.rn.f32.u32 %f100, %r0;\n"
    return text + "".join(f"mov.f32 %f{i}, %f100;\n" for i in range(columns // 2))


def epilogue(columns: int) -> str:
    text = f"mul.wide.u32 %rd13, %r0, {2 * columns}; add.s64 %rd13, %rd13, %rd2;\n"
    return text + "".join(f"st.global.f32 [%rd13+{4 * i}], %f{i};\n" for i in range(columns // 2))


def run(interpreter, columns: int, body: str, a: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Runs a program on a factor [64, 16] in registers and an image of shared memory; returns the sums [64, columns],
    that the threads hold as the PTX ISA draws them."""
    words = a.view(4, 2, 8, 2, 4, 2).permute(0, 2, 4, 3, 1, 5).contiguous()  # warp, row, pair; half of k, of rows; k
    out = torch.full((128, columns // 2), -7.0)
    program = Program(interpreter, prologue(columns) + body + epilogue(columns), 3)
    program.run(words, image, out, threads=128, shared_bytes=SHARED)
    held = out.view(4, 8, 4, columns // 8, 2, 2)  # warp, row, pair of columns, group of columns, half of rows, column
    return held.permute(0, 4, 1, 3, 2, 5).reshape(64, columns)


def filled(mode: int, transposed: bool, b: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Returns an image of shared memory with factor b [16, columns] in it, NaN elsewhere, and its descriptor."""
    leading, stride = strides(mode, transposed, b.shape[1])
    image = torch.full((SHARED // 2,), torch.nan, dtype=b.dtype)
    places = [canonical(k, n, mode, transposed, leading, stride) // 2 for k in range(16) for n in range(b.shape[1])]
    assert len(set(places)) == len(places)
    image[torch.tensor(places)] = b.flatten()
    return image, descriptor(mode, leading, stride)


def integers(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(shape[-1])).to(dtype)


FENCE, COMMIT, WAIT = (f"wgmma.{name}.sync.aligned" for name in ("fence", "commit_group", "wait_group"))


@pytest.mark.parametrize("columns", [64, 128])
@pytest.mark.parametrize(("mode", "transposed"), [(mode, t) for mode in BYTES for t in (False, True)])
def test_a_descriptor_finds_every_element_in_the_canonical_layouts(interpreter, columns, mode, transposed):
    dtype = torch.float16 if mode % 2 else torch.bfloat16
    name = "f16" if mode % 2 else "bf16"
    a, b = integers(64, 16, dtype=dtype), integers(16, columns, dtype=dtype)
    image, bits = filled(mode, transposed, b)
    body = f"mov.u64 %rd20, {bits}; {FENCE}; {product(columns, name, transposed, 20)} {COMMIT}; {WAIT} 0;\n"
    before = torch.arange(128.0).view(4, 8, 4, 1, 1, 1).expand(4, 8, 4, columns // 8, 2, 2)
    expected = before.permute(0, 4, 1, 3, 2, 5).reshape(64, columns) + a.float() @ b.float()
    assert torch.equal(run(interpreter, columns, body, a, image), expected)


def test_a_factor_begins_within_a_swizzled_row(interpreter):
    """The address of a descriptor moves along k, and the rows are permuted by their place in shared memory."""
    a, b = integers(64, 16), integers(64, 64)  # the rows of b are four factors
    places = [swizzled(128 * n + 2 * k, 1) // 2 for k in range(64) for n in range(64)]
    image = torch.full((SHARED // 2,), torch.nan, dtype=b.dtype)
    image[torch.tensor(places)] = b.flatten()
    body = f"mov.u64 %rd20, {descriptor(1, 0, 1024)}; {FENCE};\n"
    for step in range(4):
        body += f"add.s64 %rd21, %rd20, {2 * step}; {product(64, 'bf16', False, 21, accumulates=step > 0)}"
    found = run(interpreter, 64, body + f"{COMMIT}; {WAIT} 0;\n", a, image)
    assert torch.equal(found, sum(a.float() @ part.float() for part in b.split(16)))


def test_sums_are_not_there_before_the_wait(interpreter):
    a, b = integers(64, 16), integers(16, 64)
    image, bits = filled(1, True, b)
    body = f"mov.u64 %rd20, {bits}; {FENCE}; {product(64, 'bf16', True, 20)} {COMMIT};\n"
    kept = "mov.f32 %f101, %f0;" + f"{WAIT} 0;\n" + "mov.f32 %f0, %f101;\n"
    found = run(interpreter, 64, body + kept, a, image)
    assert found[:, 0].isnan().sum() == 32 and not found[:, 1].isnan().any()  # the first sum of each thread


def test_a_wait_does_not_cover_what_is_not_committed(interpreter):
    image, bits = filled(1, True, integers(16, 64))
    body = f"mov.u64 %rd20, {bits}; {FENCE}; {product(64, 'bf16', True, 20)} {WAIT} 0;\n"
    with pytest.raises(RuntimeError, match="a thread ended before its products were complete"):
        run(interpreter, 64, body, integers(64, 16), image)


WRONG = {
    "without wgmma.fence": f"{{product}} {COMMIT}; {WAIT} 0;",
    "a register of a wgmma was written since": f"{FENCE}; {{write}} {{product}} {COMMIT}; {WAIT} 0;",
    "what a wgmma under way uses was written": f"{FENCE}; {{product}} {COMMIT}; {{write}} {WAIT} 0;",
    "descriptors that differ": f"{FENCE}; cvt.u64.u32 %rd21, %r0; add.s64 %rd20, %rd20, %rd21; {{product}}",
    "bits that have no meaning": f"{FENCE}; or.b64 %rd20, %rd20, {1 << 49}; {{product}}",
    "a factor outside the shared memory": f"{FENCE}; add.s64 %rd20, %rd20, {SHARED // 16}; {{product}}",
    "only of all groups": f"{FENCE}; {{product}} {COMMIT}; {WAIT} 1;",
    "that not every warp of a warpgroup reaches": "setp.lt.u32 %p2, %r0, 32; @%p2 bra over; "
    f"{FENCE}; {{product}} {COMMIT}; {WAIT} 0; over:",
}
WRITES = {  # registers first
    "a sum": "add.f32 %f3, %f100, %f100;",
    "a factor": "mov.u32 %r22, 7;",
    "shared memory": "mov.u32 %r3, 7; st.shared.b32 [%r2+1024], %r3;",
}


@pytest.mark.parametrize(
    ("message", "write"), [*((m, "") for m in WRONG if "{write}" not in WRONG[m]),
                           *(("what a wgmma under way uses was written", name) for name in WRITES),
                           *(("a register of a wgmma was written since", name) for name in list(WRITES)[:2])]
)  # fmt: skip
def test_what_breaks_the_rules_is_refused(interpreter, message, write):
    image, bits = filled(1, True, integers(16, 64))
    body = f"mov.u64 %rd20, {bits};" + WRONG[message].format(
        product=product(64, "bf16", True, 20), write=WRITES.get(write, "")
    )
    with pytest.raises(RuntimeError, match=message):
        run(interpreter, 64, body + "\n", integers(64, 16), image)


def test_products_are_counted_by_their_size(interpreter):
    image, bits = filled(1, True, integers(16, 128))
    body = f"mov.u64 %rd20, {bits}; {FENCE}; {product(128, 'bf16', True, 20)} {COMMIT}; {WAIT} 0;\n"
    text = prologue(128) + body + epilogue(128)
    program = Program(interpreter, text, 3)
    program.run(integers(128, 8), image, torch.zeros(128, 64), threads=128, shared_bytes=SHARED)
    count = program.count("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16")
    assert (count.executed, count.units, count.kind) == (4, 4 * 128 // 8, "warpgroup mma")
