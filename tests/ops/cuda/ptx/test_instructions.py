"""Single instructions in the interpreter of PTX, against exact results."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from support.ptx.program import each_lane

SPECIAL = torch.tensor(
    [0.0, -0.0, 1.0, -1.5, float("nan"), float("inf"), -float("inf"), 1e-41, -1e-41, 3e38, 2.5, -2.5]
)
F32, I32, I64, F64 = torch.float32, torch.int32, torch.int64, torch.float64


def lanes(values, dtype=F32) -> torch.Tensor:
    """The values, repeated to 32 lanes."""
    values = torch.as_tensor(values, dtype=dtype)
    return values.repeat(32 // len(values) + 1)[:32].contiguous()


def drawn(seed: int, dtype=F32) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    if dtype.is_floating_point:
        return torch.tensor(generator.standard_normal(32), dtype=dtype)
    bits = 32 if dtype == I32 else 64
    return torch.tensor(generator.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), 32), dtype=dtype)


def run(interpreter, instruction, dtype, *sources) -> torch.Tensor:
    return each_lane(interpreter, instruction, torch.full((32,), -7, dtype=dtype), *sources)


def below(exact: Fraction) -> float:
    """The greatest float32 that is at most `exact`."""
    near = np.float32(float(exact))
    return float(near if Fraction(float(near)) <= exact else np.nextafter(near, np.float32(-np.inf)))


def test_fused_multiply_add_rounds_once_in_every_mode(interpreter):
    a, b, c = drawn(1), drawn(2), drawn(3) * 1e-4
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    down = run(interpreter, "fma.rm.f32 {0}, {1}, {2}, {3};", F32, a, b, c)
    assert down.tolist() == [below(value) for value in exact]
    nearest = run(interpreter, "fma.rn.f32 {0}, {1}, {2}, {3};", F32, a, b, c)
    assert nearest.tolist() == [float(np.float32(float(value))) for value in exact]
    zero = run(interpreter, "fma.rz.f32 {0}, {1}, {2}, {3};", F32, a, b, c)
    assert zero.tolist() == [below(abs(value)) * (1 if value >= 0 else -1) for value in exact]


def test_saturated_multiply_add_is_clamped_and_makes_zero_of_nan(interpreter):
    a = lanes([-2.0, 0.25, 3.0, np.nan, np.inf, -np.inf])
    found = run(interpreter, "fma.rn.sat.f32 {0}, {1}, {2}, {3};", F32, a, lanes([1.0]), lanes([0.5]))
    assert found[:6].tolist() == [0, 0.75, 1, 0, 1, 0]


def pairs(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """bfloat16 numbers in the halves of words."""
    return torch.stack([low, high], dim=1).bfloat16().view(I32)[:, 0].contiguous()


def halves(words: torch.Tensor) -> torch.Tensor:
    return words[:, None].view(torch.bfloat16)


def nearest_bfloat16(exact: Fraction) -> float:
    """The bfloat16 number nearest to `exact`, of two the one whose last bit is 0. It must not overflow."""
    _, exponent = np.frexp(float(exact))
    unit = Fraction(2) ** max(int(exponent) - 8, -133)  # between neighbours
    return float(round(exact / unit) * unit)


MULTIPLY_ADD_PAIR = "fma.rn.bf16x2 {0}, {1}, {2}, {3};"


def test_pairs_of_bfloat16_are_multiplied_and_added_with_one_rounding(interpreter):
    """The first products lie halfway between two numbers, and what is added decides, far below the last bit of a
    float32. Others are subnormal."""
    a, b, c = ((drawn(seed), drawn(seed + 1) * 1e-3) for seed in (11, 13, 15))
    a[0][:6], b[0][:6] = lanes([7.0, 7.0, 9.0, 9.0, -7.0, 9.0])[:6], lanes([37.0, 37.0, 29.0, 29.0, 37.0, -29.0])[:6]
    c[0][:6] = lanes([2.0**-30, -(2.0**-30)])[:6]
    a[1][:8], b[1][:8], c[1][:8] = torch.arange(61, 69) * 2.0**-132, 0.375, torch.arange(-9, -1) * 2.0**-133
    words = [pairs(*factor) for factor in (a, b, c)]
    found = halves(run(interpreter, MULTIPLY_ADD_PAIR, I32, *words)).flatten().tolist()
    factors = [[Fraction(x) for x in halves(word).flatten().tolist()] for word in words]
    expected = [nearest_bfloat16(x * y + z) for x, y, z in zip(*factors, strict=True)]
    assert found == expected
    assert expected[:12:2] == [260, 258, 262, 260, -258, -262]
    assert sum(0 < abs(value) < 2.0**-126 for value in expected) == 8


@pytest.mark.parametrize("half", ["low", "high"])
def test_pairs_of_bfloat16_keep_infinities_nan_and_zeros_of_either_sign(interpreter, half):
    rest = drawn(17)
    x, y = SPECIAL.repeat_interleave(len(SPECIAL)), SPECIAL.repeat(len(SPECIAL))
    for start in range(0, len(x), 32):
        a, c = lanes(x[start : start + 32]), lanes(y[start : start + 32])
        for factor in (1.0, -1.0, 0.0):
            inputs = [a, lanes([factor]), c]
            words = [pairs(value, rest) if half == "low" else pairs(rest, value) for value in inputs]
            result = run(interpreter, MULTIPLY_ADD_PAIR, I32, *words)
            own, other = (0, 1) if half == "low" else (1, 0)
            expected = a.bfloat16() * factor + c.bfloat16()  # the product is exact
            expected = expected.view(torch.int16).where(~expected.isnan(), torch.tensor(0x7FFF, dtype=torch.int16))
            found = halves(result)
            assert torch.equal(found[:, own].view(torch.int16), expected), (half, factor)
            same = rest.bfloat16().double()
            assert torch.equal(found[:, other], (same * same + same).bfloat16())


def test_bytes_are_chosen_from_two_words_as_they_are_or_as_their_signs(interpreter):
    low, high = lanes([0x80017F02 - 2**32], I32), lanes([0x04FF8003], I32)
    chosen = run(interpreter, "prmt.b32 {0}, {1}, {2}, 0x7530;", I32, low, high)
    assert chosen[0] == 0x04808002  # bytes 7, 5, 3 and 0
    signs = run(interpreter, "prmt.b32 {0}, {1}, {2}, 0xfdb9;", I32, low, high)
    assert signs[0] == 0x00FFFF00  # of bytes 7, 5, 3 and 1


def test_a_funnel_shift_takes_the_upper_bits_of_the_lower_word(interpreter):
    low, high = lanes([-(2**31), 5, -1], I32), lanes([3, -1, 0], I32)
    found = run(interpreter, "shf.l.wrap.b32 {0}, {1}, {2}, {3};", I32, low, high, lanes([1, 33, 4], I32))
    assert found[:3].tolist() == [7, -2, 15]


def test_minimum_and_maximum_of_nan_and_zeros_of_either_sign(interpreter):
    x, y = lanes([np.nan, 1, np.nan, -0.0, 0.0, 3]), lanes([2, np.nan, np.nan, 0.0, -0.0, -4])
    least = run(interpreter, "min.f32 {0}, {1}, {2};", F32, x, y)[:6]
    greatest = run(interpreter, "max.f32 {0}, {1}, {2};", F32, x, y)[:6]
    assert (
        least.view(I32).tolist()
        == lanes([2, 1, np.nan, -0.0, -0.0, -4])[:6]
        .view(I32)
        .where(~least.isnan(), torch.tensor(0x7FFFFFFF, dtype=I32))
        .tolist()
    )
    assert greatest[:2].tolist() == [2, 1] and greatest[2].isnan() and greatest[5] == 3
    assert not torch.signbit(greatest[3:5]).any()


def test_subnormal_numbers_are_flushed_only_with_ftz(interpreter):
    x = lanes([1e-41, -1e-41, 1.0])
    assert torch.equal(run(interpreter, "add.rn.f32 {0}, {1}, {2};", F32, x, torch.zeros(32)), x)
    flushed = run(interpreter, "add.rn.ftz.f32 {0}, {1}, {2};", F32, x, torch.zeros(32))
    assert flushed[:3].tolist() == [0, 0, 1]
    power = run(interpreter, "ex2.approx.ftz.f32 {0}, {1};", F32, lanes([-140.0, -126.0, 3.0, 0.5]))
    assert power[:3].tolist() == [0, 2**-126, 8] and abs(power[3] - 2**0.5) < 1e-7
    assert run(interpreter, "ex2.approx.f32 {0}, {1};", F32, lanes([-140.0]))[0] == 2.0**-140


def test_conversions_round_and_saturate(interpreter):
    to_integer = run(interpreter, "cvt.rzi.s32.f32 {0}, {1};", I32, lanes(SPECIAL))[: len(SPECIAL)]
    assert to_integer.tolist() == [0, 0, 1, -1, 0, 2**31 - 1, -(2**31), 0, 0, 2**31 - 1, 2, -2]
    halves = lanes([0.5, 1.5, 2.5, -0.5, -1.5], F64)
    assert run(interpreter, "cvt.rni.f64.f64 {0}, {1};", F64, halves)[:5].tolist() == [0, 2, 2, 0, -2]
    saturated = run(interpreter, "cvt.sat.f32.f32 {0}, {1};", F32, lanes([-1, 0.25, 7, np.nan]))
    assert saturated[:4].tolist() == [0, 0.25, 1, 0]
    narrow = run(interpreter, "cvt.s64.s32 {0}, {1};", I64, lanes([-5, 7], I32))
    assert narrow[:2].tolist() == [-5, 7]
    x, y = drawn(4) * 100, drawn(5) * 1e-6
    for name, dtype in (("bf16x2", torch.bfloat16), ("f16x2", torch.float16)):
        packed = run(interpreter, f"cvt.rn.{name}.f32 {{0}}, {{1}}, {{2}};", I32, x, y).view(dtype).view(32, 2)
        assert torch.equal(packed[:, 0], y.to(dtype)) and torch.equal(packed[:, 1], x.to(dtype))


@pytest.mark.parametrize(
    ("instruction", "function"),
    [
        ("mul.lo.s32", lambda x, y: x * y),
        ("mul.hi.s32", lambda x, y: x * y >> 32),
        ("add.s32", lambda x, y: x + y),
        ("shr.s32", lambda x, y: x >> min(y & 0xFFFFFFFF, 31)),
        ("shl.b32", lambda x, y: x << (y & 0xFFFFFFFF) if (y & 0xFFFFFFFF) < 32 else 0),
        ("div.s32", lambda x, y: abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)),
        ("xor.b32", lambda x, y: x ^ y),
    ],
)
def test_integers(interpreter, instruction, function):
    x = drawn(6, I32)
    y = lanes([0, 1, 5, 31, 32, 40, -3], I32) if instruction.startswith("sh") else drawn(7, I32) // 1000
    expected = [function(int(a), int(b)) for a, b in zip(x, y, strict=True)]
    found = run(interpreter, f"{instruction} {{0}}, {{1}}, {{2}};", I32, x, y)
    assert found.tolist() == [(value + 2**31) % 2**32 - 2**31 for value in expected]


def test_bits(interpreter):
    x, y = drawn(8, I32), drawn(9, I32)
    inserted = run(interpreter, "bfi.b32 {0}, {1}, {2}, 5, 12;", I32, x, y)
    mask = 0xFFF << 5
    assert [v & 0xFFFFFFFF for v in inserted.tolist()] == [
        (int(b) & 0xFFFFFFFF & ~mask) | (int(a) << 5 & mask) for a, b in zip(x, y, strict=True)
    ]
    zeros = run(interpreter, "bfind.shiftamt.u32 {0}, {1};", I32, lanes([0, 1, 255, -1], I32))
    assert zeros[:4].tolist() == [-1, 31, 24, 0]
    reversed_ = run(interpreter, "brev.b32 {0}, {1};", I32, lanes([1, 6], I32))
    assert reversed_[:2].tolist() == [-(2**31), 0b011 << 29]


def test_comparisons_with_nan(interpreter):
    x, y = lanes([1, np.nan, 2, -0.0]), lanes([1, 1, 1, 0.0])
    select = "setp.{name}.f32 %p1, {{1}}, {{2}}; selp.b32 {{0}}, 1, 0, %p1;"
    expected = {"eq": [1, 0, 0, 1], "neu": [0, 1, 1, 0], "lt": [0, 0, 0, 0], "geu": [1, 1, 1, 1], "ne": [0, 0, 1, 0]}
    for name, values in expected.items():
        assert run(interpreter, select.format(name=name), I32, x, y)[:4].tolist() == values, name


def test_shuffles_and_votes(interpreter):
    x = torch.arange(32, dtype=I32)
    members = "0xffffffff"
    butterfly = run(interpreter, f"shfl.sync.bfly.b32 {{0}}|%p1, {{1}}, 5, 31, {members};", I32, x)
    assert butterfly.tolist() == [lane ^ 5 for lane in range(32)]
    up = run(interpreter, f"shfl.sync.up.b32 {{0}}|%p1, {{1}}, 3, 0, {members}; @!%p1 mov.u32 {{0}}, 99;", I32, x)
    assert up.tolist() == [99] * 3 + list(range(29))
    segments = run(interpreter, f"shfl.sync.down.b32 {{0}}, {{1}}, 1, 0x181f, {members};", I32, x)  # groups of 8
    assert segments.tolist() == [lane if lane % 8 == 7 else lane + 1 for lane in range(32)]
    odd = f"and.b32 %r40, {{1}}, 1; setp.ne.s32 %p1, %r40, 0; vote.sync.ballot.b32 {{0}}, %p1, {members};"
    assert run(interpreter, odd, I32, x)[0] == 0xAAAAAAAA - 2**32


def test_packing(interpreter):
    x = drawn(10, I64)
    swapped = run(interpreter, "mov.b64 {{%r40, %r41}}, {1}; mov.b64 {0}, {{%r41, %r40}};", I64, x)
    assert torch.equal(swapped.view(I32).view(32, 2).flip(1), x.view(I32).view(32, 2))
    y = drawn(11, I32)
    upper = run(interpreter, "mov.b32 {{%rs1, %rs2}}, {1}; mov.b32 {0}, {{0, %rs2}};", I32, y)
    assert torch.equal(upper, y & -65536)
